"""Where statistics and factors are kept: in a cache for other jobs, or beside the output for the same one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from vitshrink.methods import Factorisation
from vitshrink.runtime import processes
from vitshrink.runtime.cache import Cache, Key
from vitshrink.runtime.entries import Entry
from vitshrink.runtime.state import Progress
from vitshrink.statistics.stats import LinearStats

NAMES = {LinearStats: "statistics", Factorisation: "layers"}


class Memory(Protocol):
    """The statistics of a model and the factors that follow from them; all processes read the same."""

    def read(self, kind: type[Entry]) -> dict[str, Entry]:
        """Nothing where it is not kept."""

    def write(self, entries: Mapping[str, Entry]) -> None:
        """The first process writes."""


@dataclass(frozen=True)
class Cached:
    """In a cache, under a key for each kind of entries."""

    cache: Cache
    keys: Mapping[Any, Key]

    def read(self, kind: type[Entry]) -> dict[str, Entry]:
        found = self.cache.read(kind, self.keys[kind])
        # all or none: else one process would wait for work that the others do not do
        there = all(processes.gather(bool(found)))
        return found if found and there else {}

    def write(self, entries: Mapping[str, Entry]) -> None:
        if entries and processes.is_main():
            self.cache.write(self.keys[type(next(iter(entries.values())))], entries)


@dataclass(frozen=True)
class Step:
    """In the state of a job, as one of its steps."""

    progress: Progress
    name: str

    def read(self, kind: type[Entry]) -> dict[str, Entry]:
        return self.progress.entries(f"{self.name}-{NAMES[kind]}", kind)

    def write(self, entries: Mapping[str, Entry]) -> None:
        if entries:
            self.progress.keep(f"{self.name}-{NAMES[type(next(iter(entries.values())))]}", entries)

    def forget(self) -> None:
        self.progress.forget(*(f"{self.name}-{part}" for part in (*NAMES.values(), "sums", "factors")))
