"""Walk the blocks of a model in order, so that a layer can be repaired on what really reaches it after compression."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import nn

from vitshrink.compression.repairs.bias import shifted_bias
from vitshrink.compression.repairs.residual import fit_residual
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.targets import Target
from vitshrink.runtime.modes import evaluating
from vitshrink.statistics.calibration import CalibrationBatch, StatisticsCollector, one_by_one
from vitshrink.statistics.needs import Needs
from vitshrink.statistics.stats import LinearStats
from vitshrink.statistics.walk import HiddenBatch, hidden_batches


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
    batches: Sequence[CalibrationBatch],
    *,
    walked: bool = True,
    on_layer: Callable[[str], None] = lambda _name: None,
) -> None:
    """Refit the residual of every low-rank layer on the activations of the compressed model, layer by layer, in place.

    Each layer sees inputs that all layers before it, already compensated, have produced.

    Args:
        model: compressed; its LowRankLinear layers are changed.
        dense: the original layer of every low-rank target.
        walked: whether the blocks can be run one after another; where not, the whole model is run for every layer.
    """
    batches_now = hidden_batches(model, blocks[0], batches) if walked else []
    by_block = {block: [group for _, group in found] for block, found in groupby(stages(targets), key=lambda s: s[0])}
    with evaluating(model):
        for index, block in enumerate(blocks):
            for group in by_block.get(index, []):
                low_rank = [target for target in group if isinstance(model.get_submodule(target.name), LowRankLinear)]
                if low_rank and walked:
                    stats = _stage_statistics(model, block, low_rank, batches_now)
                elif low_rank:
                    stats = _whole_statistics(model, low_rank, batches)
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


def _whole_statistics(
    model: nn.Module, targets: Sequence[Target], batches: Sequence[CalibrationBatch]
) -> dict[str, LinearStats]:
    with StatisticsCollector(model, targets, Needs.COVARIANCE, full_gram=True) as collector:
        one_by_one(collector, batches, lambda _samples: None)
        return collector.statistics()


def refit(layer: LowRankLinear, dense: nn.Linear, stats: LinearStats) -> None:
    """Fit the layer's residual, then its bias, to the inputs that ``stats`` describes."""
    weight = dense.weight.double()
    covariance = stats.covariance(centered=layer.bias is not None)
    up, down = layer.factors()
    up, down = fit_residual(weight, up.double(), down.double(), covariance)
    layer.set_factors(up, down)
    if layer.bias is not None:
        layer.bias.copy_(shifted_bias(dense.bias.double(), weight, up @ down, stats.mean))
