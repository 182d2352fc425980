"""Who attends to a job on another machine: starts its process there, and answers for it from afar.

It imports little, so that what starts it on every machine need not wait for torch.
"""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vitshrink._version import __version__
from vitshrink.errors import OutputError, VitshrinkError
from vitshrink.runtime.child import Child, environment
from vitshrink.runtime.locks import try_lock
from vitshrink.runtime.storage import Place

POLL = 0.1
"""Seconds between two looks at the process."""

SHOW_LOG = 30.0
"""Seconds between two copies of a log."""


@dataclass(frozen=True)
class Errand:
    """A job that is to be run on another machine."""

    folder: str
    """The working directory, from which relative paths start."""
    directory: str
    """That of the job: on a disk that all machines share, or a URL."""
    recipe: str
    """The names of the files in it."""
    log: str
    lock: str
    threads: int
    shared: bool
    """Whether the directory is on such a disk."""
    text: str
    """What the recipe holds."""
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
        if os.path.isdir(errand.folder):
            os.chdir(errand.folder)
        if errand.shared:
            with self._locked(Path(errand.directory) / errand.lock) as lock:
                return self._run(errand, Path(errand.directory), lock, None)
        with tempfile.TemporaryDirectory(prefix="vitshrink-job-") as folder:
            store = Place.of(errand.directory)
            (Path(folder) / errand.recipe).write_text(errand.text, encoding="utf-8")
            if errand.again:
                store.fetch(errand.log, Path(folder) / errand.log)
            return self._run(errand, Path(folder), None, store)

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

    def _run(self, errand: Errand, folder: Path, lock: int | None, store: Place | None) -> int:
        if self._stopped:
            return -signal.SIGTERM
        with (folder / errand.log).open("ab" if errand.again else "wb") as log:
            if errand.again:
                log.write(f"The machine was lost; it is run again on {self.place()}.\n".encode())
                log.flush()
            threads = {"OMP_NUM_THREADS": str(errand.threads)}
            child = self._child = Child(folder / errand.recipe, log, environment(None) | threads, lock=lock)
        shown = time.monotonic()
        with _dying_with_this(child.pid):
            while (code := child.poll()) is None:
                time.sleep(POLL)
                if store is not None and time.monotonic() - shown > SHOW_LOG:
                    shown = time.monotonic()
                    with suppress(OutputError):
                        store.put(folder / errand.log, errand.log)
        if store is not None:
            store.put(folder / errand.log, errand.log)
        return code

    def _require(self, errand: Errand) -> None:
        here = self.place()
        if errand.version != __version__:
            raise VitshrinkError(
                f"{here} has vitshrink {__version__}, but the sweep runs vitshrink {errand.version}: install the "
                "same version on all machines."
            )
        if errand.shared and not (Path(errand.directory) / errand.recipe).exists():
            raise OutputError(
                f"{here} cannot see {errand.directory}: use an output on a shared disk, or a URL such as "
                "s3://bucket/results."
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
