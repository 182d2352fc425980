"""What became of one job, as it is kept beside the model and counted in the end."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from vitshrink.errors import GateError, VitshrinkError

FILE_NAME = "job.json"


class Status(StrEnum):
    """How far a job has come, or how it ended."""

    WAITING = "waiting"
    RUNNING = "running"
    PASSED = "passed"
    GATE = "gate"
    """Finished, but a bound is not kept."""
    FAILED = "failed"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self not in (Status.WAITING, Status.RUNNING)

    @property
    def bad(self) -> bool:
        """Whether the exit code tells of it."""
        return self.broken or self is Status.GATE

    @property
    def broken(self) -> bool:
        """Whether there is no result that could be judged."""
        return self in (Status.FAILED, Status.TIMEOUT, Status.CANCELLED)


@dataclass(frozen=True)
class Outcome:
    """One job of a sweep, at one moment."""

    status: Status
    fingerprint: str
    seconds: float = 0.0
    """Time of the process; of the one that did the work, where a finished job was found."""
    message: str = ""
    """Why it failed, or how far each bound is kept or missed."""
    reused: bool = False
    """Whether a finished job was found, so that nothing was run."""
    recipe: str = ""
    """Of the fingerprint what is known without reading model and data."""

    def write(self, directory: Path) -> None:
        """Keep it in the directory of the job, whole or not at all. Raises OSError."""
        temporary = directory / f".{FILE_NAME}.tmp"
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        temporary.replace(directory / FILE_NAME)

    @classmethod
    def read(cls, directory: Path) -> "Outcome | None":
        """The outcome kept there; None where there is none that can be read."""
        try:
            entries: Mapping[str, Any] = json.loads((directory / FILE_NAME).read_text(encoding="utf-8"))
            return replace(cls(**entries), status=Status(entries["status"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 when all passed, 1 when a job broke, 3 when all finished and a bound is missed."""
    if any(not outcome.status.ended or outcome.status.broken for outcome in outcomes):
        return VitshrinkError.exit_code
    if any(outcome.status is Status.GATE for outcome in outcomes):
        return GateError.exit_code
    return 0
