"""The time that is left of a job: what its stages ahead take at the pace of those behind them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Clock = Callable[[], float]
"""Seconds since whenever."""


@dataclass(frozen=True)
class Ahead:
    """A stage that is to come."""

    key: str
    """Stages of one key do the same work, and go at one pace."""
    kind: str
    """What it mostly does. Of stages of one kind, those of another key tell the pace until it has its own."""
    work: float
    """How much it does, in any unit that is about as long in all stages of a job."""
    steps: int = 0
    """In how many steps; where it turns out to have fewer, it does less. 0: nobody knows."""


@dataclass(eq=False)
class Forecast:
    """Follows a job through its stages. Nothing is said before the first steps are done."""

    clock: Clock = time.perf_counter
    ahead: list[Ahead] = field(default_factory=list)
    _behind: list[tuple[Ahead, float]] = field(default_factory=list)
    """Stages that are done, and their seconds."""
    _now: "_Running | None" = None

    def expect(self, stages: Sequence[Ahead]) -> None:
        """The stages that come, in their order."""
        self.ahead = list(stages)

    def begin(self, key: str, total: int | None = None) -> None:
        """A stage of ``total`` steps; those that were to come before it are not needed."""
        number = next((n for n, stage in enumerate(self.ahead) if stage.key == key), None)
        stage = None
        if number is not None:
            stage = self.ahead[number]
            del self.ahead[: number + 1]
            if total and stage.steps:
                stage = Ahead(key, stage.kind, stage.work * total / stage.steps, total)
        self._now = _Running(stage, total or 0, self.clock())

    def advance(self, steps: int) -> None:
        """So many more steps of the stage are done."""
        if self._now is not None:
            self._now.advance(steps, self.clock())

    def end(self) -> None:
        """The stage is done."""
        if self._now is not None and self._now.stage is not None:
            self._behind.append((self._now.stage, self.clock() - self._now.began))
        self._now = None

    def left(self) -> float | None:
        """Seconds until the job ends; None where nobody can tell."""
        if not self.ahead and self._now is None:
            return None
        known = list(self._behind)
        running = self._now
        pace = None if running is None else running.pace(known)
        if running is not None and running.stage is not None and pace is not None:
            share = running.done / running.total
            stage = running.stage
            known.append((Ahead(stage.key, stage.kind, stage.work * share), pace * running.done))
        if not known:
            return None
        found = sum(_pace(stage, known) * stage.work for stage in self.ahead)
        if running is None:
            return found
        whole = None if running.stage is None else _pace(running.stage, known) * running.stage.work
        return found + running.left(pace, whole, self.clock())


@dataclass(eq=False)
class _Running:
    """A stage on its way."""

    stage: Ahead | None
    """None: it was not expected."""
    total: int
    began: float
    done: int = 0
    first: tuple[int, float] | None = None
    """Steps that were done when it first said so, and when: those of an interrupted job took no time in this one."""
    last: float = 0.0

    def advance(self, steps: int, now: float) -> None:
        self.done += steps
        self.last = now
        if self.first is None:
            self.first = self.done, now

    def pace(self, known: Sequence[tuple[Ahead, float]]) -> float | None:
        """Seconds a step; None where its steps do not tell.

        The first steps may come with work of their own, and tell only where nothing else is ``known``.
        """
        if self.first is None or not self.total or not self.done:
            return None
        done, then = self.first
        if self.done > done:
            return (self.last - then) / (self.done - done)
        return None if known and self.stage is not None else (then - self.began) / done

    def left(self, pace: float | None, whole: float | None, now: float) -> float:
        """Seconds, at so many a step; where its steps do not tell, the stage is expected to take ``whole``."""
        if pace is not None:
            return max(pace * (self.total - self.done) - (now - self.last), 0.0)
        return 0.0 if whole is None else max(whole - (now - self.began), 0.0)


def _pace(stage: Ahead, known: Sequence[tuple[Ahead, float]]) -> float:
    """Seconds for a unit of its work: of stages of its key, or of its kind, or of all."""
    for alike in (lambda each: each.key == stage.key, lambda each: each.kind == stage.kind, lambda _each: True):
        found = [(each.work, seconds) for each, seconds in known if alike(each) and each.work > 0]
        if found:
            return sum(seconds for _, seconds in found) / sum(work for work, _ in found)
    return 0.0
