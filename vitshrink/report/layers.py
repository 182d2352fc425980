"""The layers of a report, told apart by block and place in the block."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitshrink.report.record import Report


@dataclass(frozen=True)
class Layer:
    """One factorisable layer; ``kept`` is the fraction of its weights that is stored."""

    name: str
    block: int | None
    place: str
    shape: tuple[int, int]
    rank: int | None
    parameters: int
    kept: float
    relative_error: float | None
    reason: str | None


def layers(report: Report) -> list[Layer]:
    return [_layer(entry) for entry in report.layers]


def _layer(entry: Mapping[str, Any]) -> Layer:
    name, (outputs, inputs) = str(entry["name"]), entry["shape"]
    match = re.search(r"\.(\d+)\.", name)
    rank = entry.get("rank")
    parameters = int(entry.get("parameters") or outputs * inputs)
    return Layer(
        name=name,
        block=int(match[1]) if match else None,
        place=name[match.end() :] if match else name,
        shape=(outputs, inputs),
        rank=rank,
        parameters=parameters,
        kept=1.0 if rank is None else parameters / (outputs * inputs),
        relative_error=entry.get("relative_error"),
        reason=entry.get("reason"),
    )
