"""Frequencies of integers that are normally distributed, for an entropy coder: the same on every machine.

A class stands for a deviation, four to the octave. What is wider than the last table is coded by its upper bits, whose
deviation a table has, and by its lower bits as they are: within so short an interval all values are about as likely.
"""

from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

GRID = 4
"""Classes an octave. Half as many cost a normal variable 0.01 bits more, and twice as many save 0.002."""

FIRST = -11
"""Of class 0, in classes from deviation 1: 0.15, where -1 and 1 are as rare as a table can say."""

TABLES = 28
"""Classes with a table of their own: up to deviation 16."""

CLASSES = TABLES + 11 * GRID
"""Up to deviation 2^15: with their lower bits their tables reach all integers of 16 bits."""

PRECISION = 12
"""Frequencies are in units of 2^-12."""

TOTAL = 1 << PRECISION

ESCAPE = 127
"""Symbol for an integer that its class has no frequency for: it follows in a wider class."""

WIDER = 2 * GRID
"""Classes from that of an escape to that of the integer it stands for, which is four times as wide."""

REACH = 96
"""No table has an integer this large."""

_DIGITS = Context(prec=30)
_LEAST = Decimal("0.25")
"""Expected count from which an integer is in the table: an escape costs a few bits more than the rarest symbol."""

_FAR = 6
"""Deviations beyond which there is nothing, in units of a table."""


_SHIFTS = np.maximum(np.arange(256) - (TABLES - 1) + GRID - 1, 0).astype(np.uint8) // GRID


@dataclass(frozen=True, eq=False)
class Tables:
    """Of all classes with a table.

    Attributes:
        frequencies, starts: (TABLES, 256), uint32, by symbol modulo 256; a frequency of 0 is an integer to be escaped.
        slots: (TABLES × TOTAL,), uint32: which symbol a slot belongs to, 8 bits; its frequency, 12 bits; and how far
            the slot is from its first one, 12 bits.
    """

    frequencies: NDArray[np.uint32]
    starts: NDArray[np.uint32]
    slots: NDArray[np.uint32]


def shifts(classes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """How many lower bits each of these classes leaves as they are."""
    return _SHIFTS.take(classes)


@cache
def tables() -> Tables:
    """Computed at the first call, in a few hundredths of a second."""
    frequencies = np.zeros((TABLES, 256), np.uint32)
    for number in range(TABLES):
        found = _frequencies(number)
        for magnitude, frequency in enumerate(found):
            frequencies[number, [magnitude, -magnitude]] = frequency
        frequencies[number, ESCAPE] = 1
    starts = (np.cumsum(frequencies, axis=1) - frequencies).astype(np.uint32)
    counts = frequencies.ravel()
    symbols = np.tile(np.arange(256, dtype=np.uint32), TABLES)
    distance = np.tile(np.arange(TOTAL, dtype=np.uint32), TABLES) - np.repeat(starts.ravel(), counts)
    slots = np.repeat(symbols << 24 | counts << PRECISION, counts) | distance
    return Tables(frequencies, starts, slots)


def _frequencies(number: int) -> list[int]:
    """Of 0, 1, 2 …, each of which its negative shares; together with an escape they fill the table."""
    with localcontext(_DIGITS):
        deviation = _deviation(number)
        below = [2 * _half(Decimal(2 * q + 1) / (2 * deviation)) for q in range(REACH)]  # P(|x| < q + ½)
    shares = [TOTAL * (far - near) / 2 for near, far in pairwise(below)]
    kept = [max(1, round(share)) for share in shares if share >= _LEAST]
    return [TOTAL - 1 - 2 * sum(kept), *kept] if kept else [TOTAL - 3, 1]


def _deviation(number: int) -> Decimal:
    """2 to the power of a number of quarters: square roots are exact to the last digit on every machine."""
    octaves, quarters = divmod(number + FIRST, GRID)
    return Decimal(2) ** octaves * (Decimal(2) ** quarters).sqrt().sqrt()


def _half(z: Decimal) -> Decimal:
    """P(0 < x < z) of a standard normal x, by its series, whose terms are all positive."""
    if z > _FAR:
        return Decimal("0.5")
    term = total = z
    count = 1
    while term > total * Decimal("1e-24"):
        count += 2
        term *= z * z / count
        total += term
    return total * (-z * z / 2).exp() / _ROOT_OF_2_PI


_ROOT_OF_2_PI = Decimal("2.50662827463100050241576528481")
