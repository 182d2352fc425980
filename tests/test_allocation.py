"""Plans: never over budget, optimal where they say so, and plain about what cannot be reached."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitshrink.compression.allocation import ALLOCATIONS, allocate, explained_variance, of_grade
from vitshrink.compression.candidates import Candidate, Cost, Offer, Plan, Site, least_cost, plan_cost, whole_cost
from vitshrink.compression.forms.coded import Integers
from vitshrink.compression.forms.low_rank import LowRank
from vitshrink.errors import TargetError
from vitshrink.methods.ranks import Storage, break_even_rank, rank_cost


def offer(
    name: str,
    shape: tuple[int, int],
    decay: float,
    scale: float = 1.0,
    storage: Storage = "factors",
    multiple: int = 1,
    others: Sequence[Candidate] = (),
) -> Offer:
    """The ranks of a layer whose spectrum decays."""
    energies = scale * torch.exp(-decay * torch.arange(min(shape), dtype=torch.float64))
    tail = energies.flip(0).cumsum(0).flip(0)
    losses = torch.cat([tail, tail.new_zeros(1)]).tolist()
    ranks = range(multiple, break_even_rank(*shape, storage) + 1, multiple)
    candidates = [
        Candidate(LowRank(rank), Cost(rank_cost(*shape, rank, storage), 0), losses[rank], rank) for rank in ranks
    ]
    return Offer.of(
        Site(name, "matrix", shape),
        "parameters",
        Candidate(None, Cost(shape[0] * shape[1], 0)),
        [*candidates, *others],
        nothing=losses[0],
        most=ranks[-1] + multiple - 1 if ranks else 0,
    )


def ranks_of(plan: Plan) -> dict[str, int | None]:
    return {name: None if each.form is None else each.form.rank for name, each in plan.items()}


layers = st.lists(
    st.tuples(st.integers(2, 40), st.integers(2, 40), st.floats(0, 2), st.floats(0, 100)), min_size=1, max_size=6
)


@settings(max_examples=150, deadline=None)
@given(
    layers,
    st.floats(0, 1.2),
    st.sampled_from(sorted(ALLOCATIONS)),
    st.sampled_from(["factors", "gauge"]),
    st.sampled_from([1, 2, 8]),
)
def test_no_plan_costs_more_than_its_budget(
    shapes: list[tuple[int, int, float, float]], fraction: float, allocation: str, storage: Storage, multiple: int
) -> None:
    offers = [
        offer(str(i), (m, n), decay, scale, storage=storage, multiple=multiple)
        for i, (m, n, decay, scale) in enumerate(shapes)
    ]
    budget = int(fraction * whole_cost(offers))
    try:
        plan = allocate(offers, budget, ALLOCATIONS[allocation])
    except TargetError:
        if allocation == "uniform-rank":
            assert all(plan_cost(offers, of_grade(offers, rank)) > budget for rank in range(1, 41))
        else:
            assert budget < least_cost(offers)
        return
    assert plan_cost(offers, plan) <= budget
    assert set(plan) == {each.name for each in offers}
    for each in offers:
        chosen = plan[each.name]
        assert chosen is each.kept or (chosen in each.candidates and each.price(chosen) < each.price(each.kept))


def test_ranks_that_make_nothing_smaller_are_not_on_offer() -> None:
    for storage, multiple in itertools.product(("factors", "gauge"), (1, 8)):
        found = offer("a", (40, 30), 0.1, storage=storage, multiple=multiple)  # type: ignore[arg-type]
        ranks = [rank for rank in range(1, 31) if rank % multiple == 0 and rank_cost(40, 30, rank, storage) < 1200]  # type: ignore[arg-type]
        assert [each.grade for each in found.candidates] == ranks
        assert found.cheapest.grade == ranks[0]
        for room in range(0, 1200, 7):
            within = max((rank for rank in ranks if rank_cost(40, 30, rank, storage) <= room), default=0)  # type: ignore[arg-type]
            assert (found.within(room) or found.kept).grade == within
        for rank in range(multiple, ranks[-1] + 1):
            assert found.nearest(rank).grade == rank // multiple * multiple
        assert found.nearest(ranks[-1] + multiple) is found.kept


def test_of_two_candidates_of_one_cost_the_better_is_on_offer_and_what_a_cheaper_one_beats_is_not() -> None:
    kept = Candidate(None, Cost(100, 400))
    good, same, worse, dear = (
        Candidate(Integers(0, bits), Cost(100, nbytes), loss)
        for bits, nbytes, loss in ((8, 100, 0.1), (8, 100, 0.2), (8, 120, 0.3), (8, 400, 0.0))
    )
    found = Offer.of(Site("a", "matrix", (10, 10)), "bytes", kept, [worse, same, dear, good])
    assert list(found.candidates) == [good]


def test_a_site_takes_the_form_that_loses_least_for_its_cost() -> None:
    """Two levers under one loss: integers where the spectrum is flat, ranks where it is steep."""
    small = 256
    integers = [
        Candidate(Integers(0, 8), Cost(16 * small, 0), 2.0),
        Candidate(Integers(0, 4), Cost(8 * small, 0), 9.0),
    ]
    flat, steep = offer("flat", (128, 128), 0.0, others=integers), offer("steep", (128, 128), 3.0, others=integers)
    plan = allocate([flat, steep], 16 * small + 2 * small, ALLOCATIONS["loss"])
    assert plan["flat"].form == Integers(0, 8)
    assert isinstance(plan["steep"].form, LowRank)
    assert allocate([flat, steep], 9 * small, ALLOCATIONS["loss"])["flat"].form == Integers(0, 4)


@settings(max_examples=60, deadline=None)
@given(layers, st.floats(0.05, 1), st.sampled_from([1, 2]))
def test_explained_variance_is_kept_by_the_smallest_rank_that_does(
    shapes: list[tuple[int, int, float, float]], share: float, multiple: int
) -> None:
    offers = [offer(str(i), (m, n), decay, 1.0, multiple=multiple) for i, (m, n, decay, _) in enumerate(shapes)]
    for each in offers:
        enough = [one for one in each.candidates if one.loss / each.nothing <= 1 - share]
        assert explained_variance(offers, share)[each.name] == (enough[0] if enough else each.kept)


@pytest.mark.parametrize("allocation", sorted(ALLOCATIONS))
def test_the_whole_budget_keeps_everything_dense(allocation: str) -> None:
    offers = [offer("a", (8, 8), 0.1), offer("b", (16, 8), 0.1)]
    assert ranks_of(allocate(offers, 64 + 128, ALLOCATIONS[allocation])) == {"a": None, "b": None}


def test_uniform_ratio_keeps_about_the_same_fraction_everywhere() -> None:
    offers = [offer("a", (64, 64), 0.1), offer("b", (256, 64), 1.0), offer("c", (64, 256), 0.01)]
    plan = allocate(offers, int(0.5 * (64 * 64 + 2 * 64 * 256)), ALLOCATIONS["uniform-ratio"])
    for each in offers:
        assert abs(each.price(plan[each.name]) / each.price(each.kept) - 0.5) < 0.1


@pytest.mark.parametrize(("budget", "plan"), [(9_000, (20, 20)), (19_000, (None, 46))])
def test_uniform_rank_is_the_largest_that_fits(budget: int, plan: tuple[int | None, int]) -> None:
    """A layer that the rank would enlarge stays dense."""
    offers = [offer("a", (64, 64), 0.1), offer("b", (256, 64), 1.0)]
    assert ranks_of(allocate(offers, budget, ALLOCATIONS["uniform-rank"])) == dict(zip("ab", plan, strict=True))


def test_energy_gives_rank_to_the_layer_with_the_flat_spectrum() -> None:
    plan = ranks_of(
        allocate([offer("flat", (40, 40), 0.0), offer("steep", (40, 40), 1.0)], 2_000, ALLOCATIONS["energy"])
    )
    assert plan["steep"] is not None
    assert plan["flat"] is None or plan["flat"] > plan["steep"]


@settings(max_examples=100, deadline=None)
@given(layers, st.floats(-6, 0), st.sampled_from(["energy", "loss"]), st.sampled_from(["factors", "gauge"]))
def test_no_plan_of_the_same_size_loses_less(
    shapes: list[tuple[int, int, float, float]], exponent: float, allocation: str, storage: Storage
) -> None:
    """A plan that is best at a price a number is best at its size: what it costs is the budget here."""
    price = 10**exponent
    offers = [offer(str(i), (m, n), decay, scale, storage=storage) for i, (m, n, decay, scale) in enumerate(shapes)]

    def lost(site: Offer, chosen: Candidate) -> float:
        return chosen.loss / (max(site.nothing, 1e-300) if allocation == "energy" else 1.0)

    best = {
        site.name: min(site.ladder, key=lambda each, site=site: lost(site, each) + price * site.price(each))  # type: ignore[misc]
        for site in offers
    }
    chosen = allocate(offers, plan_cost(offers, best), ALLOCATIONS[allocation])
    found, least = (sum(lost(site, plan[site.name]) for site in offers) for plan in (chosen, best))
    assert found <= least * (1 + 1e-9) + 1e-12


def test_between_such_sizes_what_is_left_buys_single_ranks() -> None:
    offers = [offer("a", (5, 6), 0.4), offer("b", (6, 5), 0.8), offer("c", (6, 6), 0.1)]

    def energy_lost(plan: Plan) -> float:
        return sum(plan[each.name].loss / each.nothing for each in offers)

    plans = [dict(zip("abc", chosen, strict=True)) for chosen in itertools.product(*(each.ladder for each in offers))]
    lost = []
    for budget in range(least_cost(offers), 90):
        lost.append(energy_lost(allocate(offers, budget, ALLOCATIONS["energy"])))
        best = min(energy_lost(plan) for plan in plans if plan_cost(offers, plan) <= budget)
        assert lost[-1] <= best + 0.09, "a knapsack is solved on its convex hull, and here lacks no more than this"
    assert lost == sorted(lost, reverse=True)


def test_fixed_rank_leaves_dense_what_it_would_enlarge() -> None:
    offers = [offer("small", (8, 8), 0.1), offer("large", (64, 64), 0.1)]
    assert ranks_of(of_grade(offers, 10)) == {"small": None, "large": 10}


def test_ranks_are_multiples() -> None:
    offers = [offer("a", (64, 64), 0.1, multiple=8), offer("b", (256, 64), 0.2, multiple=8)]
    for allocation in ALLOCATIONS.values():
        plan = ranks_of(allocate(offers, 9_000, allocation))
        assert all(rank is None or rank % 8 == 0 for rank in plan.values())


def test_what_cannot_be_reached_says_what_can() -> None:
    offers = [offer("a", (8, 8), 0.1), offer("b", (16, 8), 0.1)]
    with pytest.raises(TargetError, match="smallest ranks need 40"):
        allocate(offers, 39, ALLOCATIONS["energy"])


def test_a_zero_layer_gets_the_smallest_rank() -> None:
    offers = [offer("zero", (16, 16), 0.1, scale=0.0), offer("b", (16, 16), 0.01)]
    assert ranks_of(allocate(offers, 32 * 4, ALLOCATIONS["energy"]))["zero"] == 1
