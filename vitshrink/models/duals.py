"""Dual encoders: an image tower and a text tower whose vectors lie in one space (CLIP, SigLIP).

transformers runs both towers at once. A job reads images and texts apart, since neither tower knows of the other before
their vectors are compared; ``read_apart`` lets the whole model take either.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

DUALS = ("CLIPModel", "SiglipModel")
"""Classes of transformers: both towers, ``get_image_features`` and ``get_text_features``."""

TOWERS: Mapping[str, str] = {"text_model": "input_ids", "vision_model": "pixel_values"}
"""The part of a dual encoder that reads an input, and that input."""

Side = Literal["image", "text"]
SIDES: Mapping[Side, str] = {"image": "vision_model", "text": "text_model"}
PROJECTIONS: Mapping[Side, str] = {"image": "visual_projection", "text": "text_projection"}
"""Where a dual encoder has its towers and, if it has any, what brings their vectors to the same width."""

FILLED = ("siglip",)
"""Types of models that read texts filled up to their full length, without a mask, as they were trained."""


@dataclass
class Vectors(ModelOutput):
    """What one tower says of a batch."""

    embeds: Tensor | None = None
    """(batch, width), each of length 1."""


class _Apart:
    """Mixed into the class of a dual encoder: it may be given images alone, or texts alone."""

    def forward(self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None, **others: Any) -> Any:
        whole: Any = super()
        if input_ids is not None and pixel_values is not None:
            return whole.forward(input_ids=input_ids, pixel_values=pixel_values, **others)
        if input_ids is not None:
            found = whole.get_text_features(input_ids=input_ids, **others)
        else:
            found = whole.get_image_features(pixel_values=pixel_values, **others)
        return Vectors(embeds=torch.nn.functional.normalize(found.pooler_output, dim=-1))


def towers_of(base: nn.Module) -> list[str]:
    """The names of the two towers of a dual encoder; nothing for any other model."""
    found = [name for name in TOWERS if isinstance(getattr(base, name, None), nn.Module)]
    return found if len(found) == len(TOWERS) else []


def tower_of(model: PreTrainedModel, side: Side) -> PreTrainedModel:
    """One tower of a dual encoder as a model of its own, with the projection where there is one; it shares all tensors.

    A tower of CLIP gives its vectors before they are normalized, as ``image_embeds`` or ``text_embeds``; that of SigLIP
    as ``pooler_output``.
    """
    tower: PreTrainedModel = model.get_submodule(SIDES[side])  # type: ignore[assignment]
    projection = getattr(model, PROJECTIONS[side], None)
    if projection is None:
        found: PreTrainedModel = tower
    else:
        config = copy.deepcopy(tower.config)
        config.projection_dim = model.config.projection_dim
        found = getattr(transformers, f"{type(tower).__name__}WithProjection")._from_config(config)
        setattr(found, SIDES[side], tower)
        setattr(found, PROJECTIONS[side], projection)
    found.config.architectures = [type(found).__name__]
    found.eval()
    return found


def read_apart(model: PreTrainedModel) -> None:
    """Let a dual encoder take images or texts alone, in place, and in all copies; any other model is left alone."""
    if type(model).__name__ in DUALS and not isinstance(model, _Apart):
        model.__class__ = _apart(type(model))


def read_together(model: PreTrainedModel) -> None:
    """Undo ``read_apart``: what is handed to a user is of the class of transformers."""
    if isinstance(model, _Apart):
        model.__class__ = type(model).__mro__[2]


def _apart(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of a dual encoder that is read apart: of the same name, which is written into configs."""
    if kind.__name__ not in _CLASSES:
        _CLASSES[kind.__name__] = type(kind.__name__, (_Apart, kind), {"__module__": kind.__module__})
    return _CLASSES[kind.__name__]


_CLASSES: dict[str, type[PreTrainedModel]] = {}
"""One for each dual encoder that was met, so that models of one class stay of one class."""
