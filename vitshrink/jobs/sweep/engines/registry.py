"""What an engine is: it starts the processes of jobs somewhere, and is asked how they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vitshrink.config.fields import did_you_mean
from vitshrink.errors import UsageError
from vitshrink.jobs.sweep.resources import Resources
from vitshrink.runtime.storage import Place


@dataclass(frozen=True)
class Work:
    """A job that is to be started."""

    name: str
    directory: Path
    """It holds the recipe; the log of the process belongs there."""
    lock: int
    """The descriptor of the lock of the directory, which the process has to hold as long as it lives."""
    resources: Resources
    say: Callable[[str], None]
    """Told what is worth knowing of the way of the job."""
    store: Place | None = None
    """Where the directory is kept for all machines, where the output is a URL."""


class Task(Protocol):
    """A job that was started."""

    @property
    def began(self) -> bool:
        """Whether it has got a place and runs, and its time counts."""

    def poll(self) -> int | None:
        """The exit code, that of a signal below 0; None while it runs. Raises what keeps it from running."""

    def terminate(self) -> None:
        """Ask it to end."""

    def wait(self, seconds: float) -> None:
        """Return when it has ended, or after so many seconds."""

    def kill(self) -> None:
        """Return when it has ended, which it does now."""


class Engine(Protocol):
    """Where the jobs of a sweep run."""

    @property
    def most(self) -> int:
        """How many jobs are started at once."""

    def start(self, work: Work) -> Task:
        """Start a job. Raises OSError and VitshrinkError."""

    def close(self) -> None:
        """Let go of what the engine holds; no job runs any more."""


@dataclass(frozen=True)
class Wanted:
    """What a user asks of an engine."""

    jobs: int | None = None
    """How many jobs at once; None: as many as the engine holds right."""
    address: str | None = None
    """Of what runs already, for engines on several machines."""
    resources: Sequence[Resources] = ()
    """What each job of the sweep needs."""


Maker = Callable[[Wanted], Engine]

ENGINES: dict[str, Maker] = {}


def engine(name: str) -> Callable[[Maker], Maker]:
    """Enter an engine under its name."""

    def enter(maker: Maker) -> Maker:
        ENGINES[name] = maker
        return maker

    return enter


def open_engine(name: str, wanted: Wanted) -> Engine:
    """Start an engine. Raises UsageError for a name that there is none of, or for what it has no use for."""
    if name not in ENGINES:
        raise UsageError(f"--engine {name}: {did_you_mean(name, sorted(ENGINES))}")
    return ENGINES[name](wanted)
