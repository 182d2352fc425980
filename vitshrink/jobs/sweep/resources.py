"""What a job needs of a machine, as a sweep says it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from vitshrink.config.fields import did_you_mean
from vitshrink.config.quantities import parse_quantity
from vitshrink.config.written import plain
from vitshrink.errors import UsageError


@dataclass(frozen=True)
class Resources:
    """Processors, GPUs and bytes of memory of one job, for engines that find machines for jobs."""

    cpus: float = 1
    gpus: float = 0
    memory: int | None = None

    @classmethod
    def from_mapping(cls, entries: Mapping[str, Any], where: str) -> Self:
        """As a file says it: ``{cpus: 4, gpus: 1, memory: 16GB}``. Raises UsageError."""
        known = [each.name for each in fields(cls)]
        found: dict[str, Any] = {}
        for name, value in entries.items():
            if name not in known:
                raise UsageError(f"{where}: unknown entry {name!r}. {did_you_mean(name, known)}")
            if value is not None:
                found[name] = _amount(name, plain(value), f"{where}: {name}")
        return cls(**found)

    def __str__(self) -> str:
        amounts = {"CPU": self.cpus, "GPU": self.gpus, "GB of memory": (self.memory or 0) / 1e9}
        return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items() if amount)


def _amount(name: str, value: Any, where: str) -> float | int:
    if name == "memory":
        return parse_quantity(str(value), where)
    least = "0 or more" if name == "gpus" else "above 0"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise UsageError(f"{where}: {value!r} does not fit; give a number, {least}.")
    if value == 0 and name == "cpus":
        raise UsageError(f"{where}: {value!r} does not fit; give a number, {least}.")
    if value > 1 and value != int(value):
        raise UsageError(f"{where}: {value!r} does not fit; above 1 give a whole number.")
    return value
