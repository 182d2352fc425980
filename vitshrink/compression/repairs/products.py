"""A smaller layer as a product of two matrices, which repairs change: its factors, or its matrix and an identity."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitshrink.models.structures import structure_of
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.structures.narrow import Narrow
from vitshrink.models.targets import Target
from vitshrink.statistics.calibration import CalibrationBatch, collect
from vitshrink.statistics.needs import Needs

Product = LowRankLinear | nn.Linear


def product_of(model: nn.Module, name: str) -> Product:
    """The smaller layer of this name."""
    layer = model.get_submodule(name)
    assert isinstance(layer, LowRankLinear | nn.Linear)
    return layer


def factors_of(layer: Product) -> tuple[Tensor, Tensor]:
    """up (m, k) and down (k, n): of a layer with fewer inputs these are the components, of another its outputs."""
    if isinstance(layer, LowRankLinear):
        return layer.factors()
    spec, weight = structure_of(layer), layer.weight
    if isinstance(spec, Narrow) and spec.inputs is not None:
        return weight, torch.eye(weight.shape[1]).to(weight)
    return torch.eye(weight.shape[0]).to(weight), weight


@torch.no_grad()
def set_factors(layer: Product, up: Tensor, down: Tensor) -> None:
    """Store ``up @ down``."""
    if isinstance(layer, LowRankLinear):
        layer.set_factors(up, down)
    else:
        layer.weight.copy_(up @ down)


def narrow_targets(model: nn.Module, targets: Sequence[Target]) -> list[Target]:
    """The layers that repairs change where an MLP or an attention is narrower: those that write, and the queries."""
    found = []
    for target in targets:
        layer = model.get_submodule(target.name)
        if target.role not in ("query", "output", "fc2") or not isinstance(layer, nn.Linear) or layer.bias is None:
            continue
        if (shape := (layer.out_features, layer.in_features)) != target.shape:
            found.append(replace(target, shape=shape))
    return found


def means_of(model: nn.Module, targets: Sequence[Target], batches: Sequence[CalibrationBatch]) -> dict[str, Tensor]:
    """Of what the layers read in ``model``, (n,) each, by name."""
    found = collect(model, targets, batches, Needs.SCALES)
    return {name: each.mean for name, each in found.items()}
