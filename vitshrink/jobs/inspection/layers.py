"""What the linear layers of a model look like to a low-rank method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitshrink.methods import get_method
from vitshrink.methods.ranks import break_even_rank
from vitshrink.models.targets import Target
from vitshrink.statistics.stats import LinearStats


@dataclass(frozen=True)
class LayerInspection:
    """One layer and its spectrum: plain, or weighted by the activations where there were calibration data.

    Attributes:
        effective_rank: exp of the entropy of the spectrum's shares (Roy and Vetterli, 2007); min(m, n) when it is flat.
        energy: rank → share of the squared spectrum that this rank keeps; the ranks are in ascending order.
    """

    name: str
    shape: tuple[int, int]
    parameters: int
    break_even: int
    effective_rank: float
    energy: dict[int, float]


def rank_at(fraction: float, shape: tuple[int, int]) -> int:
    """The rank that is this fraction of the full rank, at least 1."""
    return max(1, round(fraction * min(shape)))


def inspect_layers(
    model: nn.Module, targets: Sequence[Target], stats: Mapping[str, LinearStats], fractions: Sequence[float]
) -> list[LayerInspection]:
    """Inspect every target; ranks are ``fractions`` of the full rank. Raises NumericsError."""
    found = []
    method = get_method("whitened" if stats else "svd")
    for target in targets:
        weight = model.get_submodule(target.name).weight
        assert isinstance(weight, Tensor)
        with torch.no_grad():
            loss = method.factorize(weight.double(), stats.get(target.name), centered=bool(stats)).loss
        shares = (loss[:-1] - loss[1:]).clamp_min(0) / loss[0].clamp_min(1e-300)
        ranks = sorted({rank_at(fraction, target.shape) for fraction in fractions})
        found.append(
            LayerInspection(
                target.name,
                target.shape,
                weight.numel(),
                break_even_rank(*target.shape),
                float(torch.special.entr(shares).sum().exp()),
                {rank: float(1 - loss[rank] / loss[0].clamp_min(1e-300)) for rank in ranks},
            )
        )
    return found
