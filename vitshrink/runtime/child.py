"""A job in a process of its own on this machine: started, signalled with all that it has started, and waited for."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

GRACE = 10.0
"""Seconds that a process gets to clean up before it is killed."""


def command(recipe: Path) -> list[str]:
    """The process that runs a job: the command line of this installation."""
    return [sys.executable, "-m", "vitshrink", "compress", "--config", str(recipe)]


def environment(threads: int | None) -> dict[str, str]:
    """That of this process, without what is for its terminal; with so many threads, unless the user says how many."""
    found = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "COLUMNS")}
    if threads is not None:
        found.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    return found


class Child:
    """A job that runs on this machine."""

    def __init__(self, recipe: Path, log: IO[bytes], environment: Mapping[str, str], *, lock: int | None) -> None:
        """Start it; it holds the descriptor ``lock`` as long as it lives. Raises OSError."""
        self._process = subprocess.Popen(
            command(recipe),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=() if lock is None else (lock,),
            start_new_session=True,  # so that a signal reaches all that the job has started
        )
        self.pid = self._process.pid

    began = True

    def poll(self) -> int | None:
        """Its exit code, that of a signal below 0; None while it runs."""
        return self._process.poll()

    def terminate(self) -> None:
        """Ask it to end."""
        self._signal(signal.SIGTERM)

    def wait(self, seconds: float) -> None:
        """Return when it has ended, or after so many seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, seconds))

    def kill(self) -> None:
        """Return when it has ended, which it does now."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)
