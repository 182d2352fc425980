"""The sizes that a model may get, and what its plans would lose at them: from one calibration, nothing built."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vitshrink.compression.compressor import Compressor
from vitshrink.compression.findings import Findings
from vitshrink.compression.sizes import budget_of, file_of
from vitshrink.config.options import parse_quantity

BITS = 1.5, 8.0
"""Of a weight that becomes an integer, at the smallest and the largest size."""

KEPT = 0.25, 0.95
"""Of the numbers in layers that may become two factors, likewise."""

ROOM = 1.02
"""The smallest size, in parts of the least that any plan reaches: coding takes a little more than is predicted."""

UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3}


@dataclass(frozen=True)
class Prospect:
    """A size, and the sum of what the candidates of its plan lose."""

    target_size: str
    room: int
    """Bytes that the file of weights may take."""
    budget: int
    """The same in the currency of the compressor."""
    loss: float


def prospects(compressor: Compressor, findings: Findings, count: int, dtype: torch.dtype) -> Iterator[Prospect]:
    """About ``count`` sizes, small to large: what may be chosen grows by the same factor from each to the next.

    Sizes are rounded to three digits, and those that become the same are one. Raises TargetError.
    """
    offers = compressor.offers(findings)
    fixed, numbers = compressor.fixed(offers), sum(offer.kept.cost.parameters for offer in offers)
    low, high = (share * numbers for share in ((each / 8 for each in BITS) if _in_bits(compressor) else KEPT))
    low = max(low, ROOM * (compressor.least_budget(findings) - fixed))
    high = max(low, min(high, 0.98 * (compressor.whole - fixed)))
    budgets = (fixed + low * (high / low) ** (number / (count - 1)) for number in range(count))
    for size in dict.fromkeys(written(file_of(compressor, int(budget), dtype)) for budget in budgets):
        room = parse_quantity(size, "--target-size")
        budget = budget_of(compressor, room, dtype)
        plan = compressor.plan(findings, budget)
        yield Prospect(size, room, budget, sum(candidate.loss for candidate in plan.values()))


def _in_bits(compressor: Compressor) -> bool:
    return compressor.material.currency == "bytes"


def written(nbytes: int) -> str:
    """Bytes as ``--target-size`` takes them, in three digits, rounded up."""
    unit = next((name for name, each in UNITS.items() if nbytes >= each), "kB")
    value = nbytes / UNITS[unit]
    digits = max(0, 2 - math.floor(math.log10(value)))
    return f"{math.ceil(value * 10**digits) / 10**digits:.{digits}f}{unit}"
