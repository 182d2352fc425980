"""How a job is followed from outside: stages, progress, warnings, and the seconds that each stage took."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from vitshrink.runtime.forecast import Ahead, Forecast
from vitshrink.runtime.heap import give_back


class Observer(Protocol):
    """How the command line follows a job; the library itself is silent."""

    def stage(self, title: str, total: int | None = None) -> AbstractContextManager[Callable[[int], None]]:
        """Enter a stage of ``total`` steps; the callable it gives is told how many more are done."""

    def warn(self, message: str) -> None:
        """Something the user should know, but that stops nothing."""


@runtime_checkable
class Foreseeing(Protocol):
    """An observer that shows when the job will end."""

    def foresee(self, left: Callable[[], float | None]) -> None:
        """``left`` gives the seconds that are left of the job; None where nobody can tell."""


class Silent:
    """Observes nothing."""

    @contextmanager
    def stage(self, _title: str, _total: int | None = None) -> Iterator[Callable[[int], None]]:
        yield lambda _steps: None

    def warn(self, _message: str) -> None:
        pass


@dataclass
class Job:
    """What a running job keeps beside its result: warnings and the seconds spent in every stage."""

    observer: Observer
    timings: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    forecast: Forecast = field(default_factory=Forecast)

    def expect(self, stages: Sequence[Ahead]) -> None:
        """The stages that come, in their order, from which the time follows that is left."""
        self.forecast.expect(stages)
        if isinstance(self.observer, Foreseeing):
            self.observer.foresee(self.forecast.left)

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        self.observer.warn(message)

    def branch(self) -> "Job":
        """A job that knows what this one does so far, and keeps what follows to itself."""
        return Job(self.observer, dict(self.timings), list(self.warnings), self.forecast)

    def include(self, other: "Job") -> None:
        """Add what another job did for this one as well."""
        self.warnings += other.warnings
        for key, seconds in other.timings.items():
            self.timings[key] = self.timings.get(key, 0.0) + seconds

    @contextmanager
    def stage(self, key: str, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        started = time.perf_counter()
        self.forecast.begin(key, total)
        with self.observer.stage(title, total) as advance:

            def advance_both(steps: int) -> None:
                self.forecast.advance(steps)
                advance(steps)

            yield advance_both
        give_back()
        self.forecast.end()
        self.timings[key] = self.timings.get(key, 0.0) + time.perf_counter() - started
