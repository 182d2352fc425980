"""Block by block: each block learns to give what the dense block gave, on what the blocks before it really hand on."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.config.options import FinetuneConfig
from vitshrink.models.geometry import sides
from vitshrink.models.structures.following import borrowed_parameters
from vitshrink.models.targets import blocks_of
from vitshrink.recovery.preparation import Prepared
from vitshrink.recovery.splitting import Split
from vitshrink.recovery.techniques.hidden import unexplained
from vitshrink.recovery.training_set import TrainingBatch
from vitshrink.runtime.modes import evaluating
from vitshrink.runtime.observer import Job
from vitshrink.statistics.walk import HiddenBatch, hidden_batches

LEARNING_RATE = 1e-4
MEMORY = 2**31
"""Bytes of hidden states that are kept; samples beyond it are left out."""


def reconstruct(
    ready: Prepared, dense: PreTrainedModel, split: Split, config: FinetuneConfig, job: Job
) -> list[dict[str, float]]:
    """Train each block of a model against the dense block's output, in place; a block that got worse is put back.

    Memory holds the hidden states of the batches once for each model, whatever the depth. The relative squared error
    of the held-out batches says whether a block got better.

    Returns:
        ``block``, ``before`` and ``after`` of every block.
    """
    model, blocks = ready.model, list(blocks_of(ready.model))
    with job.stage("blockwise", "Reconstructing blocks", len(blocks)) as advance, evaluating(model):
        batches, held_out = (
            [batch.to(ready.accelerator.device) for batch in split.data.batches(indices, config.batch_size)]
            for indices in (split.training, split.held_out)
        )
        batches = batches_that_fit(dense, batches)
        training, judging = (Streams.of(model, dense, each, ready.accelerator.autocast) for each in (batches, held_out))
        # what several blocks read cannot be fitted to the first of them
        shared = {id(parameter) for parameter in borrowed_parameters(model)}
        trainable = {id(parameter) for parameter in ready.parameters.values()} - shared
        history = []
        for index, (block, dense_block) in enumerate(zip(blocks, blocks_of(dense), strict=True)):
            for streams in (training, judging):
                streams.aim_at(dense_block)
            learning = [parameter for parameter in block.parameters() if id(parameter) in trainable]
            before, after = _fit(block, learning, training, judging, config.blockwise)
            history.append({"block": index, "before": before, "after": after})
            for streams in (training, judging):
                streams.pass_on(block)
            advance(1)
    return history


@dataclass(eq=False)
class Streams:
    """The hidden states of the same batches on their way through two models."""

    own: Sequence[HiddenBatch]
    dense: Sequence[HiddenBatch]
    autocast: Callable[[], AbstractContextManager[Any]]
    wanted: Sequence[Tensor] = ()
    """(batch, tokens, width) of each batch: what the dense block gives."""
    weights: Tensor | None = None
    """(tokens, width): what errors count at each place; all alike where it is None."""

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        dense: PreTrainedModel,
        batches: Sequence[TrainingBatch],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> Self:
        own, others = (hidden_batches(each, blocks_of(each)[0], batches) for each in (model, dense))
        return cls(own, others, autocast)

    def aim_at(self, dense_block: nn.Module, weights: Tensor | None = None) -> None:
        """Run the dense block."""
        self.wanted, self.weights = self._through(dense_block, self.dense), weights

    def loss(self, block: nn.Module, position: int) -> Tensor:
        """The relative squared error (), of one batch."""
        with self.autocast():
            output = self.own[position].through(block)
        return unexplained(output, self.wanted[position], self.own[position].mask, self.weights)

    @torch.no_grad()
    def error(self, block: nn.Module) -> float:
        """The mean relative squared error of all batches."""
        outputs = self._through(block, self.own)
        errors = [
            unexplained(o, w, b.mask, self.weights) for o, w, b in zip(outputs, self.wanted, self.own, strict=True)
        ]
        return torch.stack(errors).mean().item()

    def pass_on(self, block: nn.Module) -> None:
        """What both blocks give is what the next ones read."""
        for batch, output in zip(self.own, self._through(block, self.own), strict=True):
            batch.hidden = output
        for batch, output in zip(self.dense, self.wanted, strict=True):
            batch.hidden = output

    @torch.no_grad()
    def _through(self, block: nn.Module, stream: Sequence[HiddenBatch]) -> list[Tensor]:
        with self.autocast():
            return [batch.through(block).float() for batch in stream]


def _fit(
    block: nn.Module, learning: Sequence[nn.Parameter], training: Streams, judging: Streams, epochs: int
) -> tuple[float, float]:
    """Train one block, and leave it in its best state; returns its held-out error before and after."""
    before = best = judging.error(block)
    kept = [parameter.detach().clone() for parameter in learning]
    group = {"params": learning}  # a list would have to hold something
    optimizer = torch.optim.AdamW([group], lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    batches = len(training.own)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs * batches))
    for _ in range(epochs if learning else 0):
        for position in torch.randperm(batches).tolist():
            training.loss(block, position).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        error = judging.error(block)
        if error < best:
            best, kept = error, [parameter.detach().clone() for parameter in learning]
    with torch.no_grad():
        for parameter, value in zip(learning, kept, strict=True):
            parameter.copy_(value)
    return before, best


def batches_that_fit(model: PreTrainedModel, batches: list[TrainingBatch]) -> list[TrainingBatch]:
    """As many of the batches as there is memory for three copies of their hidden states, and one at least."""
    room, width = MEMORY, model.config.hidden_size
    for count, batch in enumerate(batches):
        pixels = batch.inputs.get("pixel_values")
        tokens = (
            batch.inputs["input_ids"].numel()
            if pixels is None
            else len(pixels) * (pixels.shape[-1] * pixels.shape[-2] // math.prod(sides(model.config.patch_size)) + 2)
        )
        room -= 3 * 4 * tokens * width
        if room < 0:
            return batches[: max(1, count)]
    return batches
