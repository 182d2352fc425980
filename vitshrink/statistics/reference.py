"""The outputs of the dense model that a compressed one is compared with, again and again on the same batches."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.runtime.modes import evaluating
from vitshrink.runtime.precision import Passes
from vitshrink.statistics.calibration import CalibrationBatch, to_device

ROOM = 2**28
"""Bytes of outputs that are kept: all logits of a classifier, few tokens of a masked language model."""

Reference = Callable[[CalibrationBatch], Any]
"""Outputs for a batch, as transformers returns them."""


class DenseOutputs:
    """Computes the outputs for a batch once, as long as there is room for them."""

    def __init__(self, model: PreTrainedModel, passes: Passes = nullcontext, room: int = ROOM) -> None:
        self.model = model
        self.passes = passes
        self.room = room
        self._kept: dict[int, tuple[CalibrationBatch, Any]] = {}
        """By identity; the batch stands beside its outputs, so that no other one can get its identity."""

    @torch.no_grad()
    def __call__(self, batch: CalibrationBatch) -> Any:
        if id(batch) in self._kept:
            return self._kept[id(batch)][1]
        with evaluating(self.model), self.passes():
            outputs = self.model(**to_device(batch.inputs, next(self.model.parameters()).device))
        size = sum(tensor.nbytes for tensor in outputs.values() if isinstance(tensor, Tensor))
        if size <= self.room:
            self.room -= size
            self._kept[id(batch)] = batch, outputs
        return outputs
