"""The grid of a tensor that is rounded to 8 bits: the one on which errors cost least."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 4096
"""Of the histogram in which values lie: about 16 a step."""

SHARES = tuple(1 - 0.04 * step for step in range(21))
"""Of the largest and of the least value, beyond which others may be clipped."""

ROUNDS = 2
"""Of choosing the one bound after the other."""


@dataclass(frozen=True)
class Grid:
    """Whole numbers 0…``levels``, ``scale`` apart, of which ``zero`` stands for 0."""

    scale: float
    zero: int
    levels: int = 255

    @classmethod
    def between(cls, low: float, high: float, dtype: torch.dtype = torch.float32) -> "Grid":
        """That from about ``low`` to about ``high``, with 0 on it, and a scale that ``dtype`` holds."""
        low, high = min(low, 0.0), max(high, 0.0)
        least = torch.finfo(dtype).tiny
        scale = float(torch.tensor(max((high - low) / cls.levels, least)).to(dtype))
        return cls(scale, round(min(max(-low / scale, 0), cls.levels)))

    @classmethod
    def around(cls, most: float, dtype: torch.dtype = torch.float32) -> "Grid":
        """That from about -``most`` to ``most``, with 0 in its middle: what products of two inputs ask for."""
        scale = float(torch.tensor(max(2 * most / cls.levels, torch.finfo(dtype).tiny)).to(dtype))
        return cls(scale, (cls.levels + 1) // 2)

    def rounded(self, x: Tensor) -> Tensor:
        """x on the grid."""
        return ((x / self.scale).round().clamp(-self.zero, self.levels - self.zero)) * self.scale


@dataclass(frozen=True, eq=False)
class Values:
    """Values (k,) of a tensor, and what a squared error of each costs."""

    values: Tensor
    costs: Tensor

    @classmethod
    def of(cls, tokens: Tensor, costs: Tensor) -> "Values":
        """Of tokens (t, n), whose squared errors cost (n,), as a mean over the tokens."""
        low, high = float(tokens.min()), float(tokens.max())
        width = max((high - low) / BINS, torch.finfo(torch.float32).tiny)
        places = ((tokens - low) / width).long().clamp(0, BINS - 1)
        weights = (costs / len(tokens)).float().expand_as(tokens)
        found = torch.bincount(places.flatten(), weights.flatten(), BINS)
        filled = found > 0
        return cls((low + (torch.arange(BINS) + 0.5) * width)[filled], found[filled])

    @classmethod
    def joined(cls, parts: Sequence["Values"]) -> "Values":
        """Of several tensors that have one grid."""
        return cls(torch.cat([part.values for part in parts]), torch.cat([part.costs for part in parts]))

    def with_bounds(self, bounds: Tensor, costs: Tensor, count: int) -> "Values":
        """These, and ``bounds`` (2, n) that one of ``count`` tokens reached."""
        found = Values(bounds.flatten(), (costs / count).float().expand_as(bounds).flatten())
        return Values.joined([self, found])

    def loss(self, grid: Grid) -> float:
        return float((self.costs * (grid.rounded(self.values) - self.values).square()).sum())


def best_grid(values: Values, dtype: torch.dtype = torch.float32) -> tuple[Grid, float]:
    """The grid with the least loss, and that loss. What is clipped costs as what is rounded does: by its square."""
    if not len(values.values):  # nothing depends on it
        return Grid.between(-1, 1, dtype), 0.0
    least, most = min(float(values.values.min()), 0.0), max(float(values.values.max()), 0.0)
    best = (values.loss(Grid.between(least, most, dtype)), least, most)
    for _ in range(ROUNDS):
        low, high = best[1], best[2]
        best = min([best, *((values.loss(Grid.between(low, most * s, dtype)), low, most * s) for s in SHARES)])
        high = best[2]
        best = min([best, *((values.loss(Grid.between(least * s, high, dtype)), least * s, high) for s in SHARES)])
    return Grid.between(best[1], best[2], dtype), best[0]


def best_grid_around(values: Values, dtype: torch.dtype = torch.float32) -> Grid:
    """As ``best_grid``, of those with 0 in their middle."""
    most = float(values.values.abs().max()) if len(values.values) else 1.0
    return min((Grid.around(most * share, dtype) for share in SHARES), key=values.loss)
