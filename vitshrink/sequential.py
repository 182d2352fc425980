"""Walk the blocks of a model in order, so that a layer can be repaired on what really reaches it after compression."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from vitshrink.calibration import CalibrationBatch, StatisticsCollector, to_device
from vitshrink.compensation import fit_residual, shifted_bias
from vitshrink.lowrank import LowRankLinear
from vitshrink.methods import Needs
from vitshrink.models import Target
from vitshrink.modes import evaluating
from vitshrink.stats import LinearStats


class _FirstBlockReached(Exception):  # noqa: N818 - a signal, not an error
    """Carries what the first block would have been called with out of a forward pass."""

    def __init__(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.arguments = arguments
        self.keywords = keywords


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
        output = block(self.hidden, *self.arguments, **self.keywords)
        assert isinstance(output, Tensor)
        return output


@torch.no_grad()
def hidden_batches(model: nn.Module, first_block: nn.Module, batches: Iterable[CalibrationBatch]) -> list[HiddenBatch]:
    """The batches as they enter the first block: embeddings are computed once and kept."""

    def stop(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        raise _FirstBlockReached(arguments, keywords)

    device = next(model.parameters()).device
    reached = []
    handle = first_block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for batch in batches:
            mask = None if batch.mask is None else batch.mask.to(device)
            try:
                with evaluating(model):
                    model(**to_device(batch.inputs, device))
            except _FirstBlockReached as call:
                reached.append(HiddenBatch(call.arguments[0], call.arguments[1:], call.keywords, mask))
    finally:
        handle.remove()
    return reached


def stages(targets: Sequence[Target]) -> Iterator[tuple[int, list[Target]]]:
    """Targets that read the same input, in the order in which a forward pass meets them, with their block."""
    for (block, _), group in groupby(targets, key=lambda target: (target.block, target.input_group)):
        yield block, list(group)


@torch.no_grad()
def compensate_residuals(
    model: nn.Module,
    blocks: nn.ModuleList,
    targets: Sequence[Target],
    dense: Mapping[str, nn.Linear],
    batches: Iterable[CalibrationBatch],
    *,
    on_layer: Callable[[str], None] = lambda _name: None,
) -> None:
    """Refit the residual of every low-rank layer on the activations of the compressed model, layer by layer, in place.

    Each layer sees inputs that all layers before it, already compensated, have produced.

    Args:
        model: compressed; its LowRankLinear layers are changed.
        dense: the original layer of every low-rank target.
    """
    batches_now = hidden_batches(model, blocks[0], batches)
    by_block = {block: [group for _, group in found] for block, found in groupby(stages(targets), key=lambda s: s[0])}
    with evaluating(model):
        for index, block in enumerate(blocks):
            for group in by_block.get(index, []):
                low_rank = [target for target in group if isinstance(model.get_submodule(target.name), LowRankLinear)]
                if low_rank:
                    stats = _stage_statistics(model, block, low_rank, batches_now)
                for target in low_rank:
                    layer = model.get_submodule(target.name)
                    assert isinstance(layer, LowRankLinear)
                    refit(layer, dense[target.name], stats[target.name])
                    on_layer(target.name)
            for batch in batches_now:
                batch.hidden = batch.through(block)


def _stage_statistics(
    model: nn.Module, block: nn.Module, targets: Sequence[Target], batches: Sequence[HiddenBatch]
) -> dict[str, LinearStats]:
    with StatisticsCollector(model, targets, Needs.COVARIANCE, full_gram=True) as collector:
        for number, batch in enumerate(batches):
            collector.next_batch(batch.mask, number)
            batch.through(block)
        return collector.statistics()


def refit(layer: LowRankLinear, dense: nn.Linear, stats: LinearStats) -> None:
    """Fit the layer's residual, then its bias, to the inputs that ``stats`` describes."""
    weight = dense.weight.double()
    covariance = stats.covariance(centred=layer.bias is not None)
    up, down = layer.factors()
    up, down = fit_residual(weight, up.double(), down.double(), covariance)
    layer.set_factors(up, down)
    if layer.bias is not None:
        layer.bias.copy_(shifted_bias(dense.bias.double(), weight, up @ down, stats.mean))
