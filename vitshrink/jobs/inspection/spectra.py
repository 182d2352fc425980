"""What each rank keeps of a layer, of its weights and of its outputs, by the methods that differ in the metric."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitshrink.jobs.inspection.activations import Activations
from vitshrink.methods import Factorization, get_method
from vitshrink.methods.ranks import largest_rank
from vitshrink.models.targets import Target
from vitshrink.statistics.stats import LinearStats

METHODS = ("svd", "asvd", "whitened")
HALF = 0.5
"""Fraction of a layer's numbers at which the predicted losses are compared."""


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """Curves over the rank, from 0 to the full rank k, (k + 1,) each.

    Attributes:
        explained: method → share of the squared spectrum that the method decomposes: of W for ``svd``, of W S for
            ``asvd``.
        lost: method → share of the output energy E‖Wx‖² that is lost on sampled tokens: the same measure for all.
        scales: E|x_j| of the input channels over their mean, (n,): equal ones leave ASVD nothing to do.
        predicted_loss: loss at the model's output, in nats to second order, where the layer alone is compressed to
            half of its numbers; None without gradients.
    """

    name: str
    block: int
    role: str
    explained: dict[str, Tensor]
    lost: dict[str, Tensor]
    scales: Tensor
    predicted_loss: float | None


@torch.no_grad()
def layer_spectra(
    model: nn.Module,
    targets: Sequence[Target],
    stats: Mapping[str, LinearStats],
    activations: Activations,
    curvature: Mapping[str, LinearStats],
) -> list[LayerSpectrum]:
    """Spectra of every target. ``stats`` hold covariances, ``curvature`` what the method of that name needs.

    Raises:
        NumericsError: a decomposition that does not converge.
    """
    found = []
    for target in targets:
        weight = model.get_submodule(target.name).weight
        assert isinstance(weight, Tensor)
        W, statistics = weight.double(), stats[target.name]
        factors = {name: get_method(name).factorize(W, statistics, centered=False) for name in METHODS}
        tokens = activations.inputs[target.input_group].to(W)
        assert statistics.abs_mean is not None
        found.append(
            LayerSpectrum(
                name=target.name,
                block=target.block,
                role=target.role,
                explained={name: 1 - _share(factors[name].loss).cpu() for name in ("svd", "asvd")},
                lost={name: output_loss(W, each, tokens).cpu() for name, each in factors.items()},
                scales=(statistics.abs_mean / statistics.abs_mean.mean().clamp_min(1e-300)).cpu(),
                predicted_loss=_predicted(target, W, curvature.get(target.name)),
            )
        )
    return found


def output_loss(W: Tensor, factors: Factorization, x: Tensor) -> Tensor:
    """Share of the energy of W x, x (tokens, n), that is lost at each rank, (k + 1,); 0 where there is no energy."""
    exact = x @ W.T
    components = x @ factors.down.T
    error = exact.square().sum().clamp_min(1e-300)
    # ‖y − Σ_{i<r} c_i u_i‖² for all r, from inner products alone: no rank is tried by itself
    projections = (components * (exact @ factors.up)).sum(0)
    cross = (components.T @ components) * (factors.up.T @ factors.up)
    energy = torch.cat([cross.new_zeros(1), cross.cumsum(0).cumsum(1).diagonal()])
    lost = error - 2 * torch.cat([projections.new_zeros(1), projections.cumsum(0)]) + energy
    return (lost / error).clamp(0, None)


def _share(loss: Tensor) -> Tensor:
    return loss / loss[0].clamp_min(1e-300)


def _predicted(target: Target, W: Tensor, statistics: LinearStats | None) -> float | None:
    if statistics is None:
        return None
    loss = get_method("curvature").factorize(W, statistics, centered=True).loss
    m, n = target.shape
    return float(loss[largest_rank(m, n, HALF * m * n, "gauge")])
