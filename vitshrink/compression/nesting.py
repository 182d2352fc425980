"""Sites within sites: an attention or an MLP as a whole, or each of its matrices by itself."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from vitshrink.compression.allocation import hull_of, slope
from vitshrink.compression.candidates import Candidate, Cost, Offer, Plan


@dataclass(frozen=True)
class Parts:
    """What each site within another becomes, by name."""

    chosen: tuple[tuple[str, Candidate], ...]

    @property
    def label(self) -> str:
        return "part by part"

    @property
    def rank(self) -> None:
        return None

    @property
    def bits(self) -> None:
        return None


def nested(offers: Sequence[Offer]) -> list[Offer]:
    """One offer for a site and those within it: its own candidates, and the best of each of the others together.

    For a price λ of a unit of cost the best of several sites are, at once, the best of each: their sums for falling λ
    are the corners of a convex hull. So the hull of both kinds is what one Lagrangian over all sites needs.
    """
    by_name = {offer.name: offer for offer in offers}
    within = {part for offer in offers for part in offer.site.parts}
    found = []
    for offer in offers:
        parts = [by_name[name] for name in offer.site.parts if name in by_name]
        if offer.name not in within:
            found.append(offer.with_more(_together(offer, parts)) if parts else offer)
    return found


def _together(whole: Offer, parts: Sequence[Offer]) -> Iterable[Candidate]:
    """The best of all parts for every λ, from the cheapest to the dearest."""
    rungs = {part.name: 0 for part in parts}
    steps = [
        (slope(start, end), number, end[2])
        for number, part in enumerate(parts)
        for start, end in pairwise(hull_of(part, part.losses))
    ]
    rest = [_less(whole.kept.cost, [part.kept.cost for part in parts])]
    for _, number, rung in [(0.0, 0, 0), *sorted(steps, key=lambda step: step[0])]:
        rungs[parts[number].name] = rung
        chosen = [part.ladder[rungs[part.name]] for part in parts]
        named = tuple((part.name, each) for part, each in zip(parts, chosen, strict=True))
        costs = [*(each.cost for each in chosen), *rest]
        yield Candidate(Parts(named), _sum(costs), sum(each.loss for each in chosen))


def _sum(costs: Sequence[Cost]) -> Cost:
    times = [each.nanoseconds for each in costs]
    known = [time for time in times if time is not None]
    return Cost(
        sum(each.parameters for each in costs),
        sum(each.bytes for each in costs),
        sum(known) if len(known) == len(times) else None,
    )


def _less(whole: Cost, parts: Sequence[Cost]) -> Cost:
    """What a site takes beside those within it."""
    found = _sum(parts)
    known = whole.nanoseconds is not None and found.nanoseconds is not None
    return Cost(
        whole.parameters - found.parameters,
        whole.bytes - found.bytes,
        (whole.nanoseconds or 0) - (found.nanoseconds or 0) if known else None,
    )


def spread(plan: Mapping[str, Candidate]) -> Plan:
    """A plan that names sites within others where these are chosen part by part, in place of the others."""
    found: Plan = {}
    for name, candidate in plan.items():
        found |= dict(candidate.form.chosen) if isinstance(candidate.form, Parts) else {name: candidate}
    return found
