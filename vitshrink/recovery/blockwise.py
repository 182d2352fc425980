"""Block by block: each block learns to give what the dense block gave, on what the blocks before it really hand on."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.models.geometry import sides
from vitshrink.models.structures.following import borrowed_parameters
from vitshrink.models.targets import blocks_of
from vitshrink.recovery.hidden import unexplained
from vitshrink.recovery.samples import TrainingBatch
from vitshrink.statistics.walk import HiddenBatch, hidden_batches

MEMORY = 2**31
"""Bytes of hidden states that are kept; samples beyond it are left out."""


def reconstruct(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Sequence[TrainingBatch],
    held_out: Sequence[TrainingBatch],
    *,
    epochs: int,
    learning_rate: float,
    parameters: Mapping[str, nn.Parameter],
    autocast: Callable[[], AbstractContextManager[Any]],
    on_block: Callable[[int], None] = lambda _blocks: None,
) -> list[dict[str, float]]:
    """Train each block of ``model`` against the dense block's output, in place; a block that got worse is put back.

    Memory holds the hidden states of the batches once for each model, whatever the depth. ``parameters`` are those
    that may learn; the relative squared error of the held-out batches says whether a block got better.

    Returns:
        ``block``, ``before`` and ``after`` of every block.
    """
    batches = batches[: max(1, _fitting(dense, batches))]
    streams = [hidden_batches(each, blocks_of(each)[0], batches) for each in (model, dense)]
    judges = [hidden_batches(each, blocks_of(each)[0], held_out) for each in (model, dense)]
    # what several blocks read cannot be fitted to the first of them
    shared = {id(parameter) for parameter in borrowed_parameters(model)}
    names = {id(parameter): name for name, parameter in parameters.items() if id(parameter) not in shared}
    history = []
    for index, (block, dense_block) in enumerate(zip(blocks_of(model), blocks_of(dense), strict=True)):
        wanted, wanted_held_out = (_through(dense_block, stream[1], autocast) for stream in (streams, judges))
        learning = [p for p in block.parameters() if id(p) in names]
        before = _error(block, judges[0], wanted_held_out, autocast)
        best, kept = before, [p.detach().clone() for p in learning]
        group = {"params": learning}  # a list would have to hold something
        optimizer = torch.optim.AdamW([group], lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        steps = max(1, epochs * len(batches))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(epochs if learning else 0):
            for position in torch.randperm(len(batches)).tolist():
                with autocast():
                    output = streams[0][position].through(block)
                loss = unexplained(output, wanted[position], streams[0][position].mask)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(learning, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            error = _error(block, judges[0], wanted_held_out, autocast)
            if error < best:
                best, kept = error, [p.detach().clone() for p in learning]
        with torch.no_grad():
            for parameter, value in zip(learning, kept, strict=True):
                parameter.copy_(value)
        history.append({"block": index, "before": before, "after": best})
        for streamed, targets in ((streams, wanted), (judges, wanted_held_out)):
            for batch, output in zip(streamed[0], _through(block, streamed[0], autocast), strict=True):
                batch.hidden = output
            for batch, output in zip(streamed[1], targets, strict=True):
                batch.hidden = output
        on_block(1)
    return history


def _fitting(model: PreTrainedModel, batches: Sequence[TrainingBatch]) -> int:
    """How many of the batches' hidden states fit into memory, for three copies of them."""
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
            return count
    return len(batches)


@torch.no_grad()
def _through(
    block: nn.Module, stream: Sequence[HiddenBatch], autocast: Callable[[], AbstractContextManager[Any]]
) -> list[Tensor]:
    with autocast():
        return [batch.through(block).float() for batch in stream]


@torch.no_grad()
def _error(
    block: nn.Module,
    stream: Sequence[HiddenBatch],
    wanted: Sequence[Tensor],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> float:
    outputs = _through(block, stream, autocast)
    errors = [unexplained(o, w, b.mask) for o, w, b in zip(outputs, wanted, stream, strict=True)]
    return torch.stack(errors).mean().item()
