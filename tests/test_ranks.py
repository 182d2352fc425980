"""Rank arithmetic against counting."""

from hypothesis import given
from hypothesis import strategies as st

from vitshrink.methods.ranks import break_even_rank, dense_cost, largest_rank, rank_cost

sizes = st.integers(1, 300)
storages = st.sampled_from(["factors", "gauge"])


def test_costs_of_a_vit_b_layer() -> None:
    assert rank_cost(768, 768, 100) == 153_600
    assert rank_cost(768, 768, 100, "gauge") == 143_600
    assert break_even_rank(768, 768) == 383
    assert break_even_rank(3072, 768) == 614
    assert break_even_rank(768, 768, "gauge") == 767


@given(sizes, sizes, storages)
def test_break_even_is_the_last_rank_that_saves_something(m: int, n: int, storage: str) -> None:
    rank = break_even_rank(m, n, storage)  # type: ignore[arg-type]
    assert 0 <= rank <= min(m, n)
    assert rank == 0 or rank_cost(m, n, rank, storage) < dense_cost(m, n)  # type: ignore[arg-type]
    assert rank == min(m, n) or rank_cost(m, n, rank + 1, storage) >= dense_cost(m, n)  # type: ignore[arg-type]


@given(sizes, sizes, storages, st.integers(0, 100_000), st.integers(1, 16))
def test_largest_rank_fits_and_the_next_does_not(m: int, n: int, storage: str, budget: int, multiple: int) -> None:
    rank = largest_rank(m, n, budget, storage, multiple)  # type: ignore[arg-type]
    assert rank % multiple == 0
    assert rank_cost(m, n, rank, storage) <= budget  # type: ignore[arg-type]
    after = rank + multiple
    assert after > break_even_rank(m, n, storage) or rank_cost(m, n, after, storage) > budget  # type: ignore[arg-type]
