"""Processes that have imported torch and transformers, and fork one case after the other."""

import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

from .case import Case
from .judgment import Verdict, judge
from .process import preload

Startup = tuple[tuple[str, str], ...]


class Zygotes:
    """One of them for every environment that an interpreter is started with, started when it is first needed."""

    def __init__(self) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="outside-zygotes-")
        self._running: dict[Startup, tuple[subprocess.Popen[bytes], str]] = {}
        self._lock = Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for process, _ in self._running.values():
            process.kill()
            process.wait()
        self._scratch.cleanup()

    def judge(self, case: Case) -> Verdict:
        """Raises RuntimeError where the harness itself failed."""
        with Client(self._address(case.startup), "AF_UNIX") as connection:
            connection.send(str(case))
            answer = connection.recv()
        if isinstance(answer, Verdict):
            return answer
        raise RuntimeError(f"{case}\n{answer}")

    def _address(self, startup: Startup) -> str:
        with self._lock:
            if startup not in self._running:
                self._running[startup] = self._start(startup)
            return self._running[startup][1]

    def _start(self, startup: Startup) -> tuple[subprocess.Popen[bytes], str]:
        address = str(Path(self._scratch.name) / str(len(self._running)))
        tests = Path(__file__).resolve().parents[1]
        foreign = ("LC_", "PYTHON", "VITSHRINK", "COVERAGE")  # a process that is measured writes beside its output
        environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        environment |= {
            "PYTHONPATH": os.pathsep.join((str(tests.parent), str(tests))),
            "HF_HOME": str(Path(self._scratch.name) / "hub"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", f"{__package__}.zygote", address]
        said = Path(f"{address}.log")
        with said.open("wb") as log:
            process = subprocess.Popen(command, env=environment | dict(startup), stdout=log, stderr=log)
        while not Path(address).exists():
            if process.poll() is not None:
                raise RuntimeError(f"{command} ended with {process.returncode}: {said.read_text()}")
            time.sleep(0.05)
        return process, address


def serve(address: str) -> None:
    """Fork a process for each case that is asked for, until this one is ended."""
    preload()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    _end_with(os.getppid())
    with Listener(f"{address}.new", "AF_UNIX", backlog=64) as listener:
        os.rename(f"{address}.new", address)
        while True:
            with listener.accept() as connection:
                if os.fork() == 0:
                    _answer(connection)


def _end_with(parent: int) -> None:
    """End this process soon after another one has, however that ended; what is forked off is not concerned."""

    def look(*_: object) -> None:
        if os.getppid() != parent:
            os._exit(0)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 5, 5)


def _answer(connection: Connection) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        answer: Verdict | str = judge(Case.parse(connection.recv()))
    except BaseException:
        answer = traceback.format_exc()
    connection.send(answer)
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
