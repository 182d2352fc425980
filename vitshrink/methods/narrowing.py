"""Fewer inputs of a layer: what stays predicts what goes, at least loss at the model's output."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitshrink.errors import NumericsError
from vitshrink.methods.registry import Factorization
from vitshrink.statistics.algebra import roots
from vitshrink.statistics.stats import LinearStats

RIDGES = 1e-6, 1e-5, 1e-4, 1e-3, 1e-2
"""Of the mean variance, to be added to the covariance of the inputs, of which some never vary: the first that does."""

POOL = 4
"""Inputs that are looked at one by one, for each that goes in a step: what is cheap by itself may be dear once another
has gone that says the same."""

SHRINKAGE = 0.1
"""Of H towards its mean eigenvalue, as in ``curvature``."""


@dataclass(frozen=True, eq=False)
class Elimination:
    """The order in which inputs of a layer go, as nested factors: what is left after any of them is a slice.

    Attributes:
        order: (n,), the inputs; the first ``r`` stay where ``r`` are kept.
        factors: ``up[:, :r] @ down[:r]`` is W with what the kept inputs predict of the others added to their columns;
            its other columns are zero.
    """

    order: Tensor
    factors: Factorization


Choose = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From R W (k, j), the inverse covariance P (j, j) and the numbers (j,) of the inputs that are there, to the places
among them of those that go next, the first one first."""


def fewest(step: int) -> Choose:
    """The ``step`` inputs that cost least."""

    def choose(RW: Tensor, P: Tensor, there: Tensor) -> Tensor:
        pool = (RW.square().sum(0) / P.diagonal()).topk(min(POOL * step, len(there)), largest=False).indices
        return pool[_one_by_one(RW[:, pool], P[pool][:, pool], range(len(pool)), min(step, len(there)))]

    return choose


def one_of_each(head: int) -> Choose:
    """Of every head of ``head`` inputs the one that costs least."""

    def choose(RW: Tensor, P: Tensor, there: Tensor) -> Tensor:
        losses, heads = RW.square().sum(0) / P.diagonal(), there // head
        every = sorted(set(heads.tolist()))
        pools = [
            torch.where(heads == each, losses, torch.inf).topk(min(POOL, len(there)), largest=False) for each in every
        ]
        pool = torch.cat([found.indices[found.values.isfinite()] for found in pools])
        return pool[_one_by_one(RW[:, pool], P[pool][:, pool], heads[pool].tolist(), len(every))]

    return choose


def _one_by_one(RW: Tensor, P: Tensor, owners: Sequence[int], number: int) -> Tensor:
    """The places of ``number`` inputs, each the cheapest of those whose owner has not lost one, after those before."""
    left, found = list(range(len(owners))), list[int]()
    while len(found) < number:
        best = left[int((RW[:, left].square().sum(0) / P.diagonal()[left]).argmin())]
        found.append(best)
        left = [each for each in left if owners[each] != owners[best]]
        row = P[best] / P[best, best]
        RW, P = RW - torch.outer(RW[:, best], row), P - torch.outer(P[best], row)
    return torch.tensor(found, device=RW.device)


def one_head(head: int) -> Choose:
    """All inputs of the head that costs least."""

    def choose(RW: Tensor, P: Tensor, there: Tensor) -> Tensor:
        heads = there // head
        groups = [(heads == each).nonzero()[:, 0] for each in sorted(set(heads.tolist()))]
        cheapest: Tensor = min(groups, key=lambda group: _cost(RW, P, group))
        return cheapest

    return choose


def _cost(RW: Tensor, P: Tensor, group: Tensor) -> float:
    """tr(R W_g P_gg⁻¹ W_gᵀ Rᵀ): what is lost where all inputs of a group go."""
    lower = torch.linalg.cholesky(P[group][:, group])
    return float(torch.linalg.solve_triangular(lower, RW[:, group].T, upper=False).square().sum())


@torch.no_grad()
def eliminated(weight: Tensor, covariance: Tensor, root: Tensor, choose: Choose) -> Elimination:
    """Take all inputs from y = W x away, those that cost least first.

    With P the inverse covariance of the inputs that are there, an input j that goes leaves the error w_j e_j, where
    e_j = P_j· x / P_jj is what the others do not predict of it, of variance 1 / P_jj. What they do predict is added to
    their columns: w_i ← w_i − w_j P_ji / P_jj; P becomes that of the others. Errors of different steps are
    uncorrelated, so that losses add up exactly, ‖R w_j‖² / P_jj each, with H = RᵀR (Optimal Brain Surgeon, Hassibi and
    Stork 1993, for columns). Several that go together do so one after the other within a triangular factor.

    Args:
        weight: (m, n), float64.
        covariance: (n, n) of the inputs around their mean.
        root: (k, m), R.

    Raises NumericsError where the covariance is not finite, or nothing varies.
    """
    n = weight.shape[1]
    P, W = torch.cholesky_inverse(torch.linalg.cholesky(positive(covariance))), weight
    there = torch.arange(n, device=weight.device)
    ups, downs, orders = [], [], []
    while len(there):
        gone = choose(root @ W, P, there)
        stays = torch.ones(len(there), dtype=torch.bool, device=weight.device).index_fill(0, gone, False)
        # L Lᵀ = P_gg: the errors are W_g L⁻ᵀ (L⁻¹ P_g· x), and what is in brackets is uncorrelated, of variance one
        lower = torch.linalg.cholesky(P[gone][:, gone])
        down = torch.linalg.solve_triangular(lower, P[gone], upper=False)
        up = torch.linalg.solve_triangular(lower, W[:, gone].T, upper=False).T
        whole = down.new_zeros(len(gone), n)
        whole[:, there] = down
        ups.append(up.flip(1))
        downs.append(whole.flip(0))
        orders.append(there[gone].flip(0))
        W = W[:, stays] - up @ down[:, stays]
        P = P[stays][:, stays] - down[:, stays].T @ down[:, stays]
        there = there[stays]
    up, down = torch.cat(ups[::-1], 1), torch.cat(downs[::-1])
    energies = (root @ up).square().sum(0)
    return Elimination(torch.cat(orders[::-1]), Factorization.from_spectrum(up, down, energies).check_finite())


def positive(covariance: Tensor) -> Tensor:
    """With a ridge, so that it can be inverted. Raises NumericsError where it is not finite, or nothing varies."""
    mean = covariance.diagonal().mean()
    for ridge in RIDGES:
        damped = covariance + ridge * mean * torch.eye(len(covariance)).to(covariance)
        if not torch.linalg.cholesky_ex(damped).info and torch.isfinite(damped).all():
            return damped
    raise NumericsError(
        "the covariance of the inputs is not positive: the inputs are constant, or a statistic is NaN or Inf."
    )


def output_root(weight: Tensor, stats: LinearStats) -> Tensor:
    """R (m, m) with RᵀR the curvature H at the outputs of a layer W (m, n); of one that nothing depends on, zero."""
    if stats.gradient_gram is None:
        raise NumericsError("narrower layers need calibration statistics with gradients.")
    m = weight.shape[0]
    identity = torch.eye(m, dtype=weight.dtype, device=weight.device)
    if stats.gradient_power <= 0:
        return torch.zeros_like(identity)
    return roots((1 - SHRINKAGE) * stats.gradient_gram + SHRINKAGE * stats.gradient_power / m * identity)[0]


@torch.no_grad()
def neurons(weight: Tensor, stats: LinearStats, step: int) -> Elimination:
    """Neurons of an MLP with the second layer W (m, n), ``step`` at a time."""
    return eliminated(weight, stats.covariance(centered=True), output_root(weight, stats), fewest(step))
