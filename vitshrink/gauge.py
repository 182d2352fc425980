"""Choosing which inputs of a low-rank layer carry the identity (pivoting factorisation, PIFA, arXiv 2501.19090)."""

import torch
from torch import Tensor

from vitshrink.errors import NumericsError

STRIDE = 8
"""Windows of pivots start at multiples of this, or end at the last input."""

WELL_CONDITIONED = 200.0
"""A window at either end costs one multiplication less than one in the middle, and is taken up to this condition."""


def best_window(down: Tensor) -> int:
    """First input of the best block of ``rank`` neighbouring inputs of down (rank, in) to be made the identity.

    The block at the start or the end is taken when it is well conditioned, otherwise the best conditioned of all.

    Raises:
        NumericsError: no block spans the row space.
    """
    rank, n = down.shape
    rows = torch.linalg.qr(down.T).Q.T
    ends = {start: _condition(rows, start, rank) for start in (0, n - rank)}
    best = min(ends, key=lambda start: ends[start])
    if ends[best] <= WELL_CONDITIONED:
        return best
    conditions = ends | {start: _condition(rows, start, rank) for start in range(STRIDE, n - rank, STRIDE)}
    best = min(conditions, key=lambda start: conditions[start])
    if not conditions[best] < 1e8:
        raise NumericsError("no block of neighbouring inputs spans the row space.")
    return best


def _condition(rows: Tensor, start: int, rank: int) -> float:
    return float(torch.linalg.cond(rows[:, start : start + rank]).nan_to_num(torch.inf))


def pivots_first(down: Tensor) -> Tensor:
    """A permutation (in,) of the inputs that puts ``rank`` well-conditioned pivots first; the others keep their order.

    For inputs that may be permuted freely, such as the hidden units of an MLP. Column-pivoted Gram-Schmidt: each time
    the input that the chosen ones explain least.
    """
    rank, n = down.shape
    rest = torch.linalg.qr(down.T).Q.T.clone()
    chosen = torch.zeros(n, dtype=torch.bool, device=down.device)
    order = []
    for _ in range(rank):
        norms = rest.square().sum(0).masked_fill(chosen, -1)
        pivot = int(norms.argmax())
        order.append(pivot)
        chosen[pivot] = True
        direction = rest[:, pivot] / rest[:, pivot].norm().clamp_min(1e-300)
        rest -= torch.outer(direction, direction @ rest)
    others = (~chosen).nonzero().flatten()
    return torch.cat([torch.tensor(order, device=down.device), others])
