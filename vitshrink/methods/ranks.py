"""Rank arithmetic: how many numbers a rank costs, and where a factorization stops paying.

The only place that knows these formulas. ``m`` is the number of outputs of a layer, ``n`` its number of inputs.
"""

from typing import Literal

Storage = Literal["factors", "gauge"]
"""``factors``: up (m, r) and down (r, n). ``gauge``: one r × r block of the two is the identity and is not stored."""


def rank_cost(out_features: int, in_features: int, rank: int, storage: Storage = "factors") -> int:
    """Stored numbers of a rank-``rank`` layer: r(m + n), or r(m + n - r) with the gauge fixed (arXiv 2501.19090)."""
    free = rank if storage == "gauge" else 0
    return rank * (out_features + in_features - free)


def dense_cost(out_features: int, in_features: int) -> int:
    """Stored numbers of the dense layer: m n."""
    return out_features * in_features


def break_even_rank(out_features: int, in_features: int, storage: Storage = "factors") -> int:
    """Largest rank that stores strictly fewer numbers than the dense layer (0 when there is none)."""
    full = min(out_features, in_features)
    if storage == "gauge":
        return full - 1  # r(m+n-r) < mn  <=>  (m-r)(n-r) > 0
    return min((out_features * in_features - 1) // (out_features + in_features), full)


def largest_rank(
    out_features: int, in_features: int, budget: float, storage: Storage = "factors", multiple: int = 1
) -> int:
    """Largest rank (a multiple of ``multiple``, below break-even) that costs at most ``budget`` numbers, or 0."""
    low, high = 0, break_even_rank(out_features, in_features, storage) // multiple
    while low < high:  # the cost grows strictly with the rank up to the full rank
        middle = (low + high + 1) // 2
        if rank_cost(out_features, in_features, middle * multiple, storage) <= budget:
            low = middle
        else:
            high = middle - 1
    return low * multiple
