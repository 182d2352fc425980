"""Where what was learned is kept: in a cache for other jobs, or beside the output for the same one."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from vitshrink.compression.findings import Measured
from vitshrink.runtime import processes
from vitshrink.runtime.cache import Cache, Key
from vitshrink.runtime.entries import Entry, from_main
from vitshrink.runtime.paging import in_file
from vitshrink.runtime.state import Progress
from vitshrink.statistics.sensitivity import Sensitivity
from vitshrink.statistics.stats import LinearStats

NAMES: Mapping[type[Any], str] = {LinearStats: "statistics", Sensitivity: "sensitivities", Measured: "losses"}
"""What a step keeps: factors follow from the statistics, and would take several times the room of the model."""


class Memory(Protocol):
    """The statistics of a model and what follows from them; all processes read the same."""

    def read(self, kind: type[Entry], pages: Path | None = None) -> dict[str, Entry]:
        """Nothing where it, or its kind, is not kept. Large tensors are in files of ``pages``, if that is given."""

    def write(self, entries: Mapping[str, Entry]) -> None:
        """The first process writes."""


@dataclass(frozen=True)
class Cached:
    """In a cache, under a key for each kind of entries."""

    cache: Cache
    keys: Mapping[Any, Key]

    def read(self, kind: type[Entry], pages: Path | None = None) -> dict[str, Entry]:
        if kind not in self.keys:
            return {}
        place = partial(in_file, directory=pages)
        found = self.cache.read(kind, self.keys[kind], place) if processes.is_main() else None
        return from_main(found or {}, self.cache.device)

    def write(self, entries: Mapping[str, Entry]) -> None:
        kind = _kind(entries)
        if kind in self.keys and processes.is_main():
            self.cache.write(self.keys[kind], entries)


@dataclass(frozen=True)
class Step:
    """In the state of a job, as one of its steps."""

    progress: Progress
    name: str

    def read(self, kind: type[Entry], pages: Path | None = None) -> dict[str, Entry]:
        if kind not in NAMES:
            return {}
        return self.progress.entries(f"{self.name}-{NAMES[kind]}", kind, partial(in_file, directory=pages))

    def write(self, entries: Mapping[str, Entry], *, hold: bool = True) -> None:
        """To be saved by and by, or now or never where the entries are not to be held in memory."""
        if (kind := _kind(entries)) in NAMES:
            self.progress.keep(f"{self.name}-{NAMES[kind]}", entries, hold=hold)

    def has(self, kind: type[Any]) -> bool:
        return self.progress.has(f"{self.name}-{NAMES[kind]}")

    def forget(self) -> None:
        self.progress.forget(*(f"{self.name}-{part}" for part in (*NAMES.values(), "sums")))


def _kind(entries: Mapping[str, Any]) -> type[Any]:
    """Of the entries; that of nothing, where there are none."""
    return type(next(iter(entries.values()), None))
