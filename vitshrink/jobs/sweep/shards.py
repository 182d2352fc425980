"""A part of a sweep for one of several machines, and what all parts wrote, gathered."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

from vitshrink.errors import UsageError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """One of ``count`` parts, from 1."""

    number: int
    count: int

    @classmethod
    def read(cls, text: str) -> Self:
        """``3/8``. Raises UsageError."""
        match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"--shard {text}: write the part and the number of parts, from 1/8 to 8/8.")
        return cls(int(match[1]), int(match[2]))

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Neighbors, which mostly share statistics. All parts together are all items, and differ by one at most."""
        start, stop = (each * len(items) // self.count for each in (self.number - 1, self.number))
        return items[start:stop]

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"
