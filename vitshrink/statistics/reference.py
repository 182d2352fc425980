"""The outputs of the dense model that a compressed one is compared with, again and again on the same batches."""

from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.runtime.modes import evaluating
from vitshrink.runtime.precision import Passes
from vitshrink.statistics.calibration import CalibrationBatch, to_device

ROOM = 2**28
"""Bytes of outputs that are kept: all logits of a classifier, few tokens of a masked language model."""

Reference = Callable[[CalibrationBatch], Any]
"""Outputs for a batch, as transformers returns them."""

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Kept(dict[Key, Value], Generic[Key, Value]):
    """Outputs by what they were computed for. It takes no more than ``room`` bytes: later ones are computed again."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def keep(self, values: Mapping[Key, Value], nbytes: int) -> None:
        """Keep all of ``values``, which take ``nbytes`` together, or none."""
        if nbytes <= self.room:
            self.room -= nbytes
            self.update(values)


class DenseOutputs(nn.Module):
    """Runs the dense model once on each batch, as long as there is room for the outputs.

    It is called with a batch, as a ``Reference``, or with inputs by name, in place of the model.
    """

    def __init__(self, model: PreTrainedModel, passes: Passes = nullcontext, room: int = ROOM) -> None:
        super().__init__()
        self.model = model
        self.passes = passes
        self._kept: Kept[int, tuple[Tensor, Any]] = Kept(room)
        """By identity of the first input, which stands beside the outputs, so that no other tensor can get it."""

    @torch.no_grad()
    def forward(self, batch: CalibrationBatch | None = None, **inputs: Tensor) -> Any:
        """Outputs as transformers returns them, without gradients."""
        given = inputs if batch is None else batch.inputs
        first = next(iter(given.values()))
        if id(first) in self._kept:
            return self._kept[id(first)][1]
        with evaluating(self.model), self.passes():
            outputs = self.model(**to_device(given, next(self.model.parameters()).device))
        nbytes = sum(tensor.nbytes for tensor in outputs.values() if isinstance(tensor, Tensor))
        self._kept.keep({id(first): (first, outputs)}, nbytes)
        return outputs
