"""Deviations of the integers of a matrix, as the class of a row plus the class of a column, by maximum likelihood."""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitshrink.models.normal_tables import CLASSES, ESCAPE, FIRST, GRID, PRECISION, TABLES, WIDER, tables

_MAGNITUDES = 256
"""Larger integers are divided by a power of two, and their class is made narrower by as much: the rest are lower bits,
which take the same room in every class that leaves them."""

_SWEEPS = 2

Classes = NDArray[np.int64]


def fitted(integers: NDArray[Any]) -> tuple[Classes, Classes]:
    """Classes of rows (m,) and columns (n,) of integers (m, n), which together may leave the range of classes."""
    values = np.abs(integers.astype(np.int32))
    halvings = np.maximum(np.frexp(values.astype(np.float32))[1] - 8, 0)
    magnitudes, narrower = values >> halvings, GRID * halvings
    rows, columns = _moments(values.astype(np.float32) ** 2)
    for _ in range(_SWEEPS):
        rows = rows + _better(magnitudes, rows[:, None] + columns - narrower, axis=1)
        columns = columns + _better(magnitudes, rows[:, None] + columns - narrower, axis=0)
    return rows, columns


def _moments(squares: NDArray[np.float32]) -> tuple[Classes, Classes]:
    m, n = squares.shape
    rows, columns = np.ones(m, np.float32), np.ones(n, np.float32)
    for _ in range(3):
        columns = (1 / rows) @ squares / m + np.float32(1e-4)
        rows = squares @ (1 / columns) / n + np.float32(1e-4)
    logs = [np.rint(GRID * np.log2(each) / 2).astype(np.int64) for each in (rows, columns)]
    return logs[0] - FIRST, logs[1]


def _better(magnitudes: NDArray[np.int32], classes: Classes, axis: int) -> Classes:
    """By how much to change a class of each row (axis 1) or column (axis 0)."""
    lengths, changes = _lengths(), np.array([0, -1, 1])
    last = len(lengths) // _MAGNITUDES - 2
    index = (np.clip(classes, 1, last) * _MAGNITUDES + magnitudes).astype(np.int64)
    totals = [lengths.take(index + change * _MAGNITUDES).sum(axis) for change in changes]
    best: Classes = changes[np.argmin(totals, axis=0)]
    return best


@cache
def _lengths() -> NDArray[np.float32]:
    """Bits that an integer takes, by class and magnitude, (classes × magnitudes,)."""
    magnitudes = np.arange(_MAGNITUDES)
    made: list[NDArray[Any]] = []
    for number in range(CLASSES):
        if number < TABLES:
            counts = tables().frequencies[number, : ESCAPE + 1].astype(np.float64)
            counts[ESCAPE] = 0
            within = np.where(counts > 0, PRECISION - np.log2(np.maximum(counts, 1)), np.inf)
            bits = np.concatenate([within, np.full(_MAGNITUDES - len(within), np.inf)])
        else:
            bits = 1 + made[number - GRID][(magnitudes + 1) // 2]
        made.append(bits)
    for number in reversed(range(CLASSES)):
        wider = made[min(number + WIDER, CLASSES - 1)]
        made[number] = np.where(np.isinf(made[number]), PRECISION + wider, made[number])
    return np.concatenate(made).astype(np.float32)
