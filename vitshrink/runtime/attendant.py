"""Who attends to a job on another machine: starts its process there, and answers for it from afar.

It imports little, so that what starts it on every machine need not wait for torch.
"""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vitshrink._version import __version__
from vitshrink.errors import OutputError, VitshrinkError
from vitshrink.runtime.child import Child, environment
from vitshrink.runtime.locks import try_lock

POLL = 0.1
"""Seconds between two looks at the process."""


@dataclass(frozen=True)
class Errand:
    """A job that is to be run on another machine; the paths are absolute, on a disk that all machines share."""

    folder: str
    """The working directory, from which relative paths start."""
    recipe: str
    log: str
    lock: str
    threads: int
    version: str = __version__
    """Of the vitshrink that sends it."""
    again: bool = False
    """Whether another machine was lost with it."""


class Attendant:
    """Runs one job; other threads may ask it to end that."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._stopped = False

    def place(self) -> str:
        """The name of the machine, once there is one."""
        return socket.gethostname()

    def run(self, errand: Errand) -> int:
        """The exit code of the job, when it has ended. Raises OutputError and VitshrinkError where it cannot be run."""
        self._require(errand)
        os.chdir(errand.folder)
        with self._locked(Path(errand.lock)) as lock, Path(errand.log).open("ab" if errand.again else "wb") as log:
            if self._stopped:
                return -15
            if errand.again:
                log.write(f"The machine was lost; it is run again on {self.place()}.\n".encode())
                log.flush()
            threads = {"OMP_NUM_THREADS": str(errand.threads)}
            child = self._child = Child(Path(errand.recipe), log, environment(None) | threads, lock=lock)
            with _dying_with_this(child.pid):
                while (code := child.poll()) is None:
                    time.sleep(POLL)
            return code

    def terminate(self) -> None:
        """Ask the job to end."""
        self._stopped = True
        if self._child is not None:
            self._child.terminate()

    def kill(self) -> None:
        """Return when the job has ended, which it does now."""
        self._stopped = True
        if self._child is not None:
            self._child.kill()

    def _require(self, errand: Errand) -> None:
        here = self.place()
        if errand.version != __version__:
            raise VitshrinkError(
                f"{here} has vitshrink {__version__}, and the sweep runs vitshrink {errand.version}: install the same "
                "on all machines."
            )
        for path in (errand.folder, errand.recipe):
            if not os.path.exists(path):
                raise OutputError(
                    f"{here} does not see {path}: start the sweep in, and give an output on, a disk that all machines "
                    "share."
                )

    @contextmanager
    def _locked(self, path: Path) -> Iterator[int]:
        """The lock of the job; what another machine, taken for lost, still runs is waited for."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            while try_lock(descriptor) is False and not self._stopped:
                time.sleep(POLL)
            yield descriptor
        finally:
            os.close(descriptor)


@contextmanager
def _dying_with_this(group: int) -> Iterator[None]:
    """Have a group of processes killed when this process ends, however it does."""
    script = 'cat > /dev/null; kill -s KILL -- "-$1"'
    watch = subprocess.Popen(["sh", "-c", script, "sh", str(group)], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        watch.kill()
        watch.wait()
        with suppress(OSError):
            assert watch.stdin is not None
            watch.stdin.close()
