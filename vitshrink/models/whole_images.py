"""Encoders of masked autoencoders, which hide patches of an image at random, made to read all of it."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def whole_images(model: PreTrainedModel) -> list[str]:
    """Make a masked autoencoder's encoder read all patches, in their order, in place. Returns what to know of it."""
    hiding: list[Any] = [module for module in model.modules() if hasattr(module, "random_masking")]
    for module in hiding:
        module.random_masking = _nothing_hidden
    if not hiding:
        return []
    return [f"{type(model).__name__} hides patches at random when it is called; here it reads whole images."]


def _nothing_hidden(patches: Tensor, noise: object = None) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    """In the place of ``random_masking``: patches (batch, n, width), which are hidden (none), and their places."""
    places = torch.arange(patches.shape[1], device=patches.device).expand(patches.shape[:2])
    return patches, torch.zeros_like(places, dtype=patches.dtype), places
