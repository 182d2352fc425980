"""From offers and a budget to a candidate for every site. No plan ever costs more than its budget.

Nothing here knows what a form is: sites are compared by what their candidates cost and lose, and by grade.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from vitshrink.compression.candidates import Offer, Plan, least_cost, plan_cost, whole_cost
from vitshrink.errors import TargetError

BISECTIONS = 60
"""Halvings of an interval: float64 has no more to give."""

Losses = Mapping[str, Sequence[float]]
"""By site, of its ladder."""

Rungs = dict[str, int]
"""By site, the number of its rung on the ladder."""


def _plan(offers: Sequence[Offer], rungs: Rungs) -> Plan:
    return {offer.name: offer.ladder[rungs[offer.name]] for offer in offers}


def _rung_of(offer: Offer, plan: Plan) -> int:
    return offer.ladder.index(plan[offer.name])


def _spend(offers: Sequence[Offer], budget: int, rungs: Rungs, losses: Losses) -> Plan:
    """Use what is left of the budget: one step up at a time, each where a unit of cost buys the most.

    A site that is kept stays so, and none is bought back whole.
    """
    rungs = dict(rungs)
    left = budget - plan_cost(offers, _plan(offers, rungs))
    while True:
        best: tuple[float, Offer, int] | None = None
        for offer in offers:
            rung = rungs[offer.name]
            if rung + 1 >= len(offer.candidates):
                continue
            price = offer.costs[rung + 1] - offer.costs[rung]
            if price <= left:
                loss = losses[offer.name]
                gain = (loss[rung] - loss[rung + 1]) / price
                if best is None or gain > best[0]:
                    best = (gain, offer, price)
        if best is None:
            return _plan(offers, rungs)
        _, offer, price = best
        rungs[offer.name] += 1
        left -= price


def hull_of(offer: Offer, losses: Sequence[float]) -> list[tuple[int, float, int]]:
    """The lower convex hull of (cost, loss, rung) over the ladder."""
    hull: list[tuple[int, float, int]] = []
    for point in zip(offer.costs, losses, range(len(losses)), strict=True):
        while len(hull) > 1 and slope(hull[-2], hull[-1]) >= slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def slope(start: tuple[int, float, int], end: tuple[int, float, int]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])


def _least_total_loss(offers: Sequence[Offer], budget: int, losses: Losses) -> Plan:
    """Minimize the summed loss within the budget: the Lagrangian solution on the sites' convex hulls.

    Every step along a hull has a price; steps are taken from the best gain a unit of cost downwards, a step that no
    longer fits ends its site, and what is left over is spent on single candidates between the hull's corners.
    """
    rungs: Rungs = {offer.name: 0 for offer in offers}
    left = budget - least_cost(offers)
    steps = []
    for offer in offers:
        hull = hull_of(offer, losses[offer.name])
        steps += [(slope(start, end), offer.name, end[0] - start[0], end[2]) for start, end in pairwise(hull)]
    ended: set[str] = set()
    for _, name, price, rung in sorted(steps, key=lambda step: step[0]):
        if name in ended:
            continue
        if price > left:
            ended.add(name)
            continue
        rungs[name] = rung
        left -= price
    return _spend(offers, budget, rungs, losses)


def _shares(offers: Sequence[Offer]) -> Losses:
    """Loss as a fraction of what a site loses where nothing of it is left: one minus its energy."""
    return {offer.name: [loss / max(offer.nothing, 1e-300) for loss in offer.losses] for offer in offers}


def uniform_rank(offers: Sequence[Offer], budget: int) -> Plan:
    """One rank for all sites, the largest that fits; a site that this rank does not shrink stays as it is."""
    largest = max((offer.graded[-1].grade for offer in offers if offer.graded), default=0)
    return next(
        plan
        for grade in range(largest, -1, -1)
        if plan_cost(offers, plan := of_grade(offers, max(grade, 1))) <= budget or grade <= 1
    )


def of_grade(offers: Sequence[Offer], grade: int) -> Plan:
    """This grade everywhere, or the nearest below that is on offer; sites that it does not shrink stay as they are."""
    return {offer.name: offer.nearest(grade) for offer in offers}


def explained_variance(offers: Sequence[Offer], share: float) -> Plan:
    """The cheapest candidate that keeps this share of each site's energy; a site where none does stays as it is."""
    shares = _shares(offers)
    return {
        offer.name: next(
            (each for each, lost in zip(offer.ladder, shares[offer.name], strict=True) if lost <= 1 - share), offer.kept
        )
        for offer in offers
    }


def uniform_ratio(offers: Sequence[Offer], budget: int) -> Plan:
    """The same fraction of its cost for every site."""

    def plan_at(fraction: float) -> Plan:
        if fraction >= 1:
            return {offer.name: offer.kept for offer in offers}
        return {offer.name: offer.within(fraction * offer.costs[-1]) or offer.cheapest for offer in offers}

    low, high, best = 0.0, 1.0, plan_at(0.0)
    if whole_cost(offers) <= budget:
        return plan_at(high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        plan = plan_at(middle)
        if plan_cost(offers, plan) <= budget:
            low, best = middle, plan
        else:
            high = middle
    return _spend(offers, budget, {offer.name: _rung_of(offer, best) for offer in offers}, _shares(offers))


def energy(offers: Sequence[Offer], budget: int) -> Plan:
    """Greedy mixed ranks that keep the most energy (Azizi et al. 2024, arXiv 2402.06004).

    Energy is 1 − loss / loss of nothing, in the method's own metric. A site is raised where a unit of cost buys the
    largest share of its energy, until the budget is spent; a site may also be bought back whole.
    """
    return _least_total_loss(offers, budget, _shares(offers))


def loss(offers: Sequence[Offer], budget: int) -> Plan:
    """Least total loss: for methods whose losses share one unit, such as ``curvature``."""
    return _least_total_loss(offers, budget, {offer.name: offer.losses for offer in offers})


def measured(offers: Sequence[Offer], budget: int) -> Plan:
    """Least total loss at the model's output, where the effects of every component were measured: for any method."""
    return loss(offers, budget)


Allocation = Callable[[Sequence[Offer], int], Plan]
ALLOCATIONS: dict[str, Allocation] = {
    "uniform-rank": uniform_rank,
    "uniform-ratio": uniform_ratio,
    "energy": energy,
    "loss": loss,
    "measured": measured,
}


def allocate(offers: Sequence[Offer], budget: int, allocation: Allocation) -> Plan:
    """A plan within ``budget``, in the currency of the offers.

    Raises:
        TargetError: even the cheapest candidate everywhere costs more; the message says how much.
    """
    if budget >= whole_cost(offers):
        return {offer.name: offer.kept for offer in offers}
    unit = offers[0].currency
    least = least_cost(offers)
    if budget < least:
        raise TargetError(f"the budget is {budget:,} {unit}, but even the smallest ranks need {least:,}.")
    plan = allocation(offers, budget)
    if plan_cost(offers, plan) > budget:
        # A single fixed rule (one rank everywhere) may not reach what mixed ranks can.
        raise TargetError(
            f"this allocation needs at least {plan_cost(offers, plan):,} {unit}; the budget is {budget:,}."
        )
    return plan
