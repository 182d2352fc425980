"""From error curves and a budget to a rank for every layer. No plan ever costs more than its budget."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from vitshrink.errors import TargetError
from vitshrink.ranks import Storage, break_even_rank, dense_cost, largest_rank, rank_cost

BISECTIONS = 60
"""Halvings of an interval: float64 has no more to give."""


@dataclass(frozen=True)
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


Plan = dict[str, int | None]
"""Layer name → rank, or None: stays dense."""


def plan_cost(curves: Sequence[Curve], plan: Mapping[str, int | None]) -> int:
    """Stored numbers of all layers under ``plan``."""
    return sum(curve.cost(plan[curve.name]) for curve in curves)


def least_cost(curves: Sequence[Curve]) -> int:
    """The smallest budget that any plan meets."""
    return sum(curve.cost(curve.cheapest) for curve in curves)


def _largest_feasible(curves: Sequence[Curve], budget: int, plan_at: Callable[[float], Plan]) -> Plan:
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


def _spend(curves: Sequence[Curve], budget: int, plan: Plan, losses: Mapping[str, list[float]]) -> Plan:
    """Use what is left of the budget: raise ranks one step at a time, each time where a parameter buys the most."""
    plan = dict(plan)
    left = budget - plan_cost(curves, plan)
    while True:
        best: tuple[float, Curve, int, int] | None = None
        for curve in curves:
            rank = plan[curve.name]
            if rank is None or rank + curve.multiple not in curve.ranks:
                continue
            price = curve.cost(rank + curve.multiple) - curve.cost(rank)
            if price <= left:
                loss = losses[curve.name]
                gain = (loss[rank] - loss[rank + curve.multiple]) / price
                if best is None or gain > best[0]:
                    best = (gain, curve, rank + curve.multiple, price)
        if best is None:
            return plan
        _, curve, rank, price = best
        plan[curve.name] = rank
        left -= price


def _hull(curve: Curve, loss: list[float]) -> list[tuple[int, float, int | None]]:
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


def _least_total_loss(curves: Sequence[Curve], budget: int, losses: Mapping[str, list[float]]) -> Plan:
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


def _shares(curves: Sequence[Curve]) -> dict[str, list[float]]:
    """Loss as a fraction of what the layer loses at rank 0: one minus its energy."""
    return {curve.name: (curve.loss / curve.loss[0].clamp_min(1e-300)).tolist() for curve in curves}


def uniform_rank(curves: Sequence[Curve], budget: int) -> Plan:
    """One rank for all layers, the largest that fits; a layer that this rank does not shrink stays dense."""
    return next(
        plan
        for rank in range(max((curve.ranks[-1] for curve in curves if curve.ranks), default=0), -1, -1)
        if plan_cost(curves, plan := fixed_rank(curves, max(rank, 1))) <= budget or rank <= 1
    )


def fixed_rank(curves: Sequence[Curve], rank: int) -> Plan:
    """``rank`` everywhere, rounded down to the multiple; layers it does not shrink stay dense."""
    plan: Plan = {}
    for curve in curves:
        rounded = max(rank // curve.multiple, 1) * curve.multiple
        plan[curve.name] = rounded if rounded in curve.ranks else None
    return plan


def explained_variance(curves: Sequence[Curve], share: float) -> Plan:
    """The smallest rank on offer that keeps this share of each layer's energy; a layer where none does stays dense."""
    shares = _shares(curves)
    return {
        curve.name: next((rank for rank in curve.ranks if shares[curve.name][rank] <= 1 - share), None)
        for curve in curves
    }


def uniform_ratio(curves: Sequence[Curve], budget: int) -> Plan:
    """The same fraction of parameters in every layer."""

    def plan_at(fraction: float) -> Plan:
        plan: Plan = {}
        for curve in curves:
            rank = largest_rank(*curve.shape, fraction * dense_cost(*curve.shape), curve.storage, curve.multiple)
            plan[curve.name] = None if fraction >= 1 or curve.cheapest is None else max(rank, curve.cheapest)
        return plan

    return _spend(curves, budget, _largest_feasible(curves, budget, plan_at), _shares(curves))


def energy(curves: Sequence[Curve], budget: int) -> Plan:
    """Greedy mixed ranks that keep the most layer energy (Azizi et al. 2024, arXiv 2402.06004).

    Energy is 1 − loss(r) / loss(0) in the method's own metric. The rank is raised where a parameter buys the largest
    share of its layer's energy, until the budget is spent; a layer may also be bought back whole.
    """
    return _least_total_loss(curves, budget, _shares(curves))


def loss(curves: Sequence[Curve], budget: int) -> Plan:
    """Least total loss: for methods whose losses share one unit, such as ``curvature``."""
    return _least_total_loss(curves, budget, {curve.name: curve.loss.tolist() for curve in curves})


def measured(curves: Sequence[Curve], budget: int) -> Plan:
    """Least total loss at the model's output, where the effects of every component were measured: for any method."""
    return loss(curves, budget)


Allocation = Callable[[Sequence[Curve], int], Plan]
ALLOCATIONS: dict[str, Allocation] = {
    "uniform-rank": uniform_rank,
    "uniform-ratio": uniform_ratio,
    "energy": energy,
    "loss": loss,
    "measured": measured,
}


def allocate(curves: Sequence[Curve], budget: int, allocation: Allocation) -> Plan:
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
