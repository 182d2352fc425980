"""Choosing which inputs of a low-rank layer carry the identity (pivoting factorization, PIFA, arXiv 2501.19090)."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from vitshrink.errors import NumericsError

STRIDE = 8
"""Windows of pivots start at multiples of this, or end at the last input."""

WELL_CONDITIONED = 200.0
"""A window at either end costs one multiplication less than one in the middle, and is taken up to this condition."""


ROUGH = 1e3
"""Conditions up to this are told in float32."""


def best_window(rows: Tensor) -> int:
    """First of the ``rank`` neighboring inputs that are best made the identity; rows (rank, in) are orthonormal.

    The block at the start or the end is taken when it is well conditioned, otherwise the best conditioned of all.

    Raises:
        NumericsError: no block spans the row space.
    """
    rank, n = rows.shape
    ends = {start: _condition(_gram(rows, start)) for start in (0, n - rank)}
    best = min(ends, key=lambda start: ends[start])
    if ends[best] <= WELL_CONDITIONED:
        return best
    between = {start: _condition(gram.float(), ends[best]) for start, gram in _grams(rows)}
    if between and min(between.values()) > ROUGH:
        between = {start: _condition(_gram(rows, start), ends[best]) for start in between}
    found = ends | between
    best = min(found, key=lambda start: found[start])
    if not found[best] < 1e7:
        raise NumericsError("no block of adjacent inputs spans the row space.")
    return best


def _gram(rows: Tensor, start: int) -> Tensor:
    """Of the block of inputs from ``start`` on, (rank, rank)."""
    block = rows[:, start : start + len(rows)]
    return block @ block.T


def _grams(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Of the blocks between the first one and the last one, each made of the one before; good while it is asked for."""
    rank, n = rows.shape
    gram = _gram(rows, 0)
    for start in range(STRIDE, n - rank, STRIDE):
        left, entered = rows[:, start - STRIDE : start], rows[:, start - STRIDE + rank : start + rank]
        gram.addmm_(left, left.T, alpha=-1).addmm_(entered, entered.T)
        yield start, gram


def _condition(gram: Tensor, most: float = math.inf) -> float:
    """Frobenius norm of the inverse of a block, of which the largest singular value is at most 1, from B Bᵀ.

    Infinite if it has none, or where the norm exceeds ``most``, as a factor's diagonal tells.

    At least its condition, and told by two triangular operations, which are faster than eigenvalues. Its
    square exceeds by ``rank`` that of the coefficients of the other inputs, which have to be stored.
    """
    root, failed = torch.linalg.cholesky_ex(gram)
    if failed or float(root.diagonal().min()) * most < 1:
        return math.inf
    return float(torch.linalg.solve_triangular(root, torch.eye(len(root)).to(root), upper=False).norm())


def pivots_first(rows: Tensor) -> Tensor:
    """A permutation (in,) of the inputs that puts ``rank`` well-conditioned pivots first; the others keep their order.

    For inputs that may be permuted freely, such as the hidden units of an MLP; rows (rank, in) are orthonormal.
    Column-pivoted Gram-Schmidt: each time the input that the chosen ones explain least.
    """
    rank, n = rows.shape
    rows = rows.float()  # this only ranks the inputs
    left = rows.square().sum(0)
    basis = rows.new_zeros(rank, rank)
    order = []
    for step in range(rank):
        pivot = int(left.argmax())
        order.append(pivot)
        direction = rows[:, pivot]
        for _ in range(2):  # once is not enough when little of the input is left
            direction = direction - basis[:step].T @ (basis[:step] @ direction)
        basis[step] = direction / direction.norm().clamp_min(1e-30)
        left -= (basis[step] @ rows).square()
        left[pivot] = -torch.inf
    chosen = torch.tensor(order, device=rows.device)
    others = torch.ones(n, dtype=torch.bool, device=rows.device).index_fill(0, chosen, False).nonzero().flatten()
    return torch.cat([chosen, others])
