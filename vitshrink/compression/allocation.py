"""From error curves and a budget to a rank for every layer. No plan ever costs more than its budget."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from vitshrink.errors import TargetError
from vitshrink.methods.ranks import Storage, break_even_rank, dense_cost, largest_rank, rank_cost

BISECTIONS = 60
"""Halvings of an interval: float64 has no more to give."""


class Offer(Protocol):
    """Something to choose the rank of: a layer, or a part of an attention."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def loss(self) -> Tensor:
        """By rank, from 0; what a rank that is not on offer loses is not asked for."""

    @property
    def ranks(self) -> Sequence[int]:
        """On offer, in ascending order: those that cost less than what is there."""

    @property
    def cheapest(self) -> int | None:
        """The smallest rank on offer."""

    def cost(self, rank: int | None) -> int:
        """Stored numbers at ``rank``; None: left as it is."""

    def within(self, budget: float) -> int:
        """The largest rank on offer that costs at most ``budget`` numbers, or 0."""

    def nearest(self, rank: int) -> int | None:
        """What a user who asks for ``rank`` gets; None: it would not make this smaller."""


@dataclass(frozen=True, eq=False)
class Menu:
    """An offer whose costs follow no formula.

    Attributes:
        dense: stored numbers of what is there; costs: those of every rank that there is.
    """

    name: str
    shape: tuple[int, int]
    dense: int
    costs: Mapping[int, int]
    loss: Tensor
    multiple: int = 1

    def cost(self, rank: int | None) -> int:
        return self.dense if rank is None else self.costs[rank]

    @cached_property
    def ranks(self) -> Sequence[int]:
        return sorted(rank for rank, cost in self.costs.items() if rank % self.multiple == 0 and cost < self.dense)

    @property
    def cheapest(self) -> int | None:
        return next(iter(self.ranks), None)

    def within(self, budget: float) -> int:
        return max((rank for rank in self.ranks if self.costs[rank] <= budget), default=0)

    def nearest(self, rank: int) -> int | None:
        return max((offered for offered in self.ranks if offered <= rank), default=None)


@dataclass(frozen=True, eq=False)
class Curve:
    """What each rank of one layer costs and loses.

    Attributes:
        name: the layer; shape: (m, n).
        loss: (k + 1,), loss at rank 0…k, never rising. Losses of two layers compare only where the method says so.
    """

    name: str
    shape: tuple[int, int]
    loss: Tensor
    storage: Storage = "factors"
    multiple: int = 1

    def cost(self, rank: int | None) -> int:
        """Stored numbers at ``rank``; None is the dense layer."""
        return dense_cost(*self.shape) if rank is None else rank_cost(*self.shape, rank, self.storage)

    @property
    def ranks(self) -> range:
        """The ranks on offer: multiples of ``multiple`` that cost less than the dense layer."""
        return range(self.multiple, break_even_rank(*self.shape, self.storage) + 1, self.multiple)

    @property
    def cheapest(self) -> int | None:
        return self.ranks[0] if len(self.ranks) else None

    def within(self, budget: float) -> int:
        return largest_rank(*self.shape, budget, self.storage, self.multiple)

    def nearest(self, rank: int) -> int | None:
        rounded = max(rank // self.multiple, 1) * self.multiple
        return rounded if rounded in self.ranks else None


Plan = dict[str, int | None]
"""Layer name → rank, or None: stays dense."""


def plan_cost(curves: Sequence[Offer], plan: Mapping[str, int | None]) -> int:
    """Stored numbers of all layers under ``plan``."""
    return sum(curve.cost(plan[curve.name]) for curve in curves)


def least_cost(curves: Sequence[Offer]) -> int:
    """The smallest budget that any plan meets."""
    return sum(curve.cost(curve.cheapest) for curve in curves)


def _largest_feasible(curves: Sequence[Offer], budget: int, plan_at: Callable[[float], Plan]) -> Plan:
    """The most generous of the plans ``plan_at(0…1)``, whose costs rise with their argument, within the budget."""
    low, high = 0.0, 1.0
    best = plan_at(low)
    if plan_cost(curves, plan_at(high)) <= budget:
        return plan_at(high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        plan = plan_at(middle)
        if plan_cost(curves, plan) <= budget:
            low, best = middle, plan
        else:
            high = middle
    return best


def _spend(curves: Sequence[Offer], budget: int, plan: Plan, losses: Mapping[str, list[float]]) -> Plan:
    """Use what is left of the budget: raise ranks one step at a time, each time where a parameter buys the most."""
    plan = dict(plan)
    left = budget - plan_cost(curves, plan)
    while True:
        best: tuple[float, Offer, int, int] | None = None
        for curve in curves:
            rank = plan[curve.name]
            if rank is None or rank == curve.ranks[-1]:
                continue
            following = curve.ranks[curve.ranks.index(rank) + 1]
            price = curve.cost(following) - curve.cost(rank)
            if price <= left:
                loss = losses[curve.name]
                gain = (loss[rank] - loss[following]) / price
                if best is None or gain > best[0]:
                    best = (gain, curve, following, price)
        if best is None:
            return plan
        _, curve, rank, price = best
        plan[curve.name] = rank
        left -= price


def _hull(curve: Offer, loss: list[float]) -> list[tuple[int, float, int | None]]:
    """The lower convex hull of (cost, loss, rank) over the ranks on offer and the dense layer, which loses nothing."""
    points: list[tuple[int, float, int | None]] = [(curve.cost(rank), loss[rank], rank) for rank in curve.ranks]
    points.append((curve.cost(None), 0.0, None))
    hull: list[tuple[int, float, int | None]] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(start: tuple[int, float, int | None], end: tuple[int, float, int | None]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])


def _least_total_loss(curves: Sequence[Offer], budget: int, losses: Mapping[str, list[float]]) -> Plan:
    """Minimise the summed loss within the budget: the Lagrangian solution on the layers' convex hulls.

    Every step along a hull has a price; steps are taken from the best gain a parameter downwards, a step that no longer
    fits ends its layer, and what is left over is spent on single ranks between the hull's corners.
    """
    plan: Plan = {curve.name: curve.cheapest for curve in curves}
    left = budget - plan_cost(curves, plan)
    steps = []
    for curve in curves:
        hull = _hull(curve, losses[curve.name])
        steps += [(_slope(start, end), curve.name, end[0] - start[0], end[2]) for start, end in pairwise(hull)]
    ended: set[str] = set()
    for _, name, price, rank in sorted(steps, key=lambda step: step[0]):
        if name in ended:
            continue
        if price > left:
            ended.add(name)
            continue
        plan[name] = rank
        left -= price
    return _spend(curves, budget, plan, losses)


def _shares(curves: Sequence[Offer]) -> dict[str, list[float]]:
    """Loss as a fraction of what the layer loses at rank 0: one minus its energy."""
    return {curve.name: (curve.loss / curve.loss[0].clamp_min(1e-300)).tolist() for curve in curves}


def uniform_rank(curves: Sequence[Offer], budget: int) -> Plan:
    """One rank for all layers, the largest that fits; a layer that this rank does not shrink stays dense."""
    return next(
        plan
        for rank in range(max((curve.ranks[-1] for curve in curves if curve.ranks), default=0), -1, -1)
        if plan_cost(curves, plan := fixed_rank(curves, max(rank, 1))) <= budget or rank <= 1
    )


def fixed_rank(curves: Sequence[Offer], rank: int) -> Plan:
    """``rank`` everywhere, or the nearest below that is on offer; layers it does not shrink stay dense."""
    return {curve.name: curve.nearest(rank) for curve in curves}


def explained_variance(curves: Sequence[Offer], share: float) -> Plan:
    """The smallest rank on offer that keeps this share of each layer's energy; a layer where none does stays dense."""
    shares = _shares(curves)
    return {
        curve.name: next((rank for rank in curve.ranks if shares[curve.name][rank] <= 1 - share), None)
        for curve in curves
    }


def uniform_ratio(curves: Sequence[Offer], budget: int) -> Plan:
    """The same fraction of parameters in every layer."""

    def plan_at(fraction: float) -> Plan:
        plan: Plan = {}
        for curve in curves:
            rank = curve.within(fraction * curve.cost(None))
            plan[curve.name] = None if fraction >= 1 or curve.cheapest is None else max(rank, curve.cheapest)
        return plan

    return _spend(curves, budget, _largest_feasible(curves, budget, plan_at), _shares(curves))


def energy(curves: Sequence[Offer], budget: int) -> Plan:
    """Greedy mixed ranks that keep the most layer energy (Azizi et al. 2024, arXiv 2402.06004).

    Energy is 1 − loss(r) / loss(0) in the method's own metric. The rank is raised where a parameter buys the largest
    share of its layer's energy, until the budget is spent; a layer may also be bought back whole.
    """
    return _least_total_loss(curves, budget, _shares(curves))


def loss(curves: Sequence[Offer], budget: int) -> Plan:
    """Least total loss: for methods whose losses share one unit, such as ``curvature``."""
    return _least_total_loss(curves, budget, {curve.name: curve.loss.tolist() for curve in curves})


def measured(curves: Sequence[Offer], budget: int) -> Plan:
    """Least total loss at the model's output, where the effects of every component were measured: for any method."""
    return loss(curves, budget)


Allocation = Callable[[Sequence[Offer], int], Plan]
ALLOCATIONS: dict[str, Allocation] = {
    "uniform-rank": uniform_rank,
    "uniform-ratio": uniform_ratio,
    "energy": energy,
    "loss": loss,
    "measured": measured,
}


def allocate(curves: Sequence[Offer], budget: int, allocation: Allocation) -> Plan:
    """A plan within ``budget`` stored numbers.

    Raises:
        TargetError: even the smallest rank everywhere costs more; the message says how much.
    """
    if budget >= sum(curve.cost(None) for curve in curves):
        return {curve.name: None for curve in curves}
    least = least_cost(curves)
    if budget < least:
        raise TargetError(
            f"the layers to factorise have to fit in {budget:,} parameters, but the smallest ranks need {least:,}."
        )
    plan = allocation(curves, budget)
    if plan_cost(curves, plan) > budget:
        # A single fixed rule (one rank everywhere) may not reach what mixed ranks can.
        raise TargetError(
            f"this allocation cannot go below {plan_cost(curves, plan):,} parameters; {budget:,} are allowed."
        )
    return plan
