"""The blocks of a model, walked one by one on what really reaches them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitshrink.models.blocks import hidden_of
from vitshrink.runtime.modes import evaluating
from vitshrink.runtime.paging import in_file, rest
from vitshrink.statistics.calibration import CalibrationBatch, to_device, token_mask


@dataclass(eq=False)
class HiddenBatch:
    """One calibration batch on its way through the blocks."""

    hidden: Tensor
    """(batch, tokens, width)"""
    arguments: tuple[Any, ...]
    """What else a block is called with: attention masks, mostly."""
    keywords: dict[str, Any]
    mask: Tensor | None

    def through(self, block: nn.Module) -> Tensor:
        return hidden_of(block(self.hidden, *self.arguments, **self.keywords))


@torch.no_grad()
def hidden_batches(
    model: nn.Module, first_block: nn.Module, batches: Iterable[CalibrationBatch], pages: Path | None = None
) -> list[HiddenBatch]:
    """The batches as they enter the first block: embeddings are computed once and kept, in files of ``pages``."""

    def stop(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        raise _FirstBlockReached(arguments, keywords)

    device = next(model.parameters()).device
    reached = []
    handle = first_block.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        for batch in batches:
            mask = token_mask(batch, device)
            try:
                with evaluating(model):
                    model(**to_device(batch.inputs, device))
            except _FirstBlockReached as call:
                hidden = in_file(call.arguments[0], pages)
                reached.append(HiddenBatch(hidden, call.arguments[1:], call.keywords, mask))
                rest()
    finally:
        handle.remove()
    return reached


class _FirstBlockReached(Exception):  # noqa: N818 - a signal, not an error
    """Carries what the first block would have been called with out of a forward pass."""

    def __init__(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.arguments = arguments
        self.keywords = keywords
