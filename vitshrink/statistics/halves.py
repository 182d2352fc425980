"""Symmetric and triangular matrices in half of the room: blocks of rows, each from the diagonal on.

A half of a matrix (n, n) is one vector. Sums of halves are halves of sums.
"""

from bisect import bisect_left
from collections.abc import Iterator
from math import isqrt

import torch
from torch import Tensor

BLOCK = 128
"""Rows that lie together: narrow enough to leave out half of a wide matrix, and wide enough to be multiplied fast."""


def length(n: int) -> int:
    """Numbers in the half of a matrix (n, n)."""
    return sum((min(start + BLOCK, n) - start) * (n - start) for start in range(0, n, BLOCK))


def order(half: Tensor) -> int:
    """n of the matrix (n, n) of which this is the half."""
    return bisect_left(range(isqrt(2 * len(half)) + 1), len(half), key=length)


def blocks(half: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The first row of each block, and its rows (rows, n - first); what is written there is written into the half."""
    n, begin = order(half), 0
    for start in range(0, n, BLOCK):
        shape = min(start + BLOCK, n) - start, n - start
        yield start, half[begin : begin + shape[0] * shape[1]].view(shape)
        begin += shape[0] * shape[1]


def half_of(matrix: Tensor) -> Tensor:
    """Of a symmetric or upper triangular matrix (n, n)."""
    found = matrix.new_empty(length(len(matrix)))
    for start, rows in blocks(found):
        rows.copy_(matrix[start : start + len(rows), start:])
    return found


def half_gram(x: Tensor) -> Tensor:
    """The half of xᵀx, of x (tokens, n)."""
    found = x.new_empty(length(x.shape[1]))
    for start, rows in blocks(found):
        torch.matmul(x[:, start : start + len(rows)].T, x[:, start:], out=rows)
    return found


def symmetric(half: Tensor) -> Tensor:
    """The matrix (n, n) of a half; what lies under its diagonal is copied from above it."""
    n = order(half)
    found = half.new_empty(n, n)
    for start, rows in blocks(half):
        found[start : start + len(rows), start:] = rows
        found[start:, start : start + len(rows)] = rows.T
    return found


def upper(half: Tensor) -> Tensor:
    """The upper triangular matrix (n, n) of a half."""
    n = order(half)
    found = half.new_zeros(n, n)
    for start, rows in blocks(half):
        found[start : start + len(rows), start:] = rows
    return found


def diagonal(half: Tensor) -> Tensor:
    """Of the matrix of a half, (n,)."""
    return torch.cat([rows.diagonal() for _, rows in blocks(half)])
