"""The command line in a process of its own, forked from one that has imported what takes long.

What it meets is what a new process would: its own streams, directory, environment, limits and user. Only the command
line is imported anew in each, since it looks at the terminal when it is imported.
"""

import atexit
import ctypes
import fcntl
import io
import os
import pty
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .place import Place, Stream

TIME_LIMIT = 600.0
INTERNAL = 250
"""Status of a process that failed in this file."""


@dataclass(frozen=True)
class Ended:
    """What a command said, and how it ended: ``status`` is negative for a signal, None for the time limit."""

    line: list[str]
    status: int | None
    stdout: str
    stderr: str
    seconds: float


def run(line: list[str], place: Place) -> Ended:
    """Run ``vitshrink`` with the arguments ``line``."""
    began = time.monotonic()
    with _Streams(place) as streams:
        process = os.fork()
        if process == 0:
            _become(line, place, streams)
        status = streams.wait(process, began + TIME_LIMIT, place.ended)
        return Ended(line, status, streams.said(1), streams.said(2), time.monotonic() - began)


def alone(work: Callable[[], str]) -> str:
    """What ``work`` says in a process of its own, or how that ended."""
    with tempfile.TemporaryFile() as answer:
        process = os.fork()
        if process == 0:
            try:
                for descriptor in (1, 2):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
                answer.write(work().encode(errors="backslashreplace"))
                answer.flush()
            except BaseException as error:
                answer.write(f"{type(error).__name__}: {error}".encode(errors="backslashreplace"))
                answer.flush()
            os._exit(0)
        _, status = os.waitpid(process, 0)
        answer.seek(0)
        said = answer.read().decode()
        return said if status == 0 else f"{said} (ended with {os.waitstatus_to_exitcode(status)})"


class _Streams:
    """What the descriptors of a process are, and what was written to them."""

    def __init__(self, place: Place) -> None:
        self.kinds: dict[int, Stream] = {2: place.stderr, 1: place.stdout}
        self.readers: dict[int, int] = {}
        self.writers: dict[int, int] = {}
        self.seen = {1: b"", 2: b""}
        for number, kind in self.kinds.items():
            if kind == "file":
                self.writers[number], name = tempfile.mkstemp(prefix="outside-stream-")
                self.readers[number] = os.open(name, os.O_RDONLY)
                os.unlink(name)  # it lives as long as it is open
            elif kind == "full":
                self.writers[number] = os.open("/dev/full", os.O_WRONLY)
            elif kind == "terminal" and number == 1 and self.kinds[2] == "terminal":
                self.writers[number] = os.dup(self.writers[2])
            elif kind == "terminal":
                self.readers[number], self.writers[number] = pty.openpty()
                size = struct.pack("HHHH", 24, place.columns, 0, 0)
                fcntl.ioctl(self.writers[number], termios.TIOCSWINSZ, size)
            elif kind in ("pipe", "gone"):
                self.readers[number], self.writers[number] = os.pipe()
                if kind == "gone":
                    os.close(self.readers.pop(number))

    def __enter__(self) -> "_Streams":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in (*self.readers.values(), *self.writers.values()):
            os.close(descriptor)

    def install(self, place: Place) -> None:
        """In the new process."""
        if place.stdin == "closed":
            os.close(0)
        else:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number in self.kinds:
            if number in self.writers:
                os.dup2(self.writers[number], number)
            else:
                os.close(number)
        os.closerange(3, 4096)

    def wait(self, process: int, deadline: float, ended_by: tuple[int, float] | None) -> int | None:
        number, after = ended_by or (0, TIME_LIMIT)
        moment, pause = time.monotonic() + after, 0.002
        for descriptor in self.writers.values():
            os.close(descriptor)
        self.writers.clear()
        while True:
            ended, status = os.waitpid(process, os.WNOHANG)
            self._read()
            if ended:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > moment:
                os.kill(process, number)
                moment = deadline
            if time.monotonic() > deadline:
                os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
                return None
            time.sleep(pause)
            pause = min(2 * pause, 0.02)

    def _read(self) -> None:
        """All that is there by now."""
        for number, reader in self.readers.items():
            with suppress(OSError):  # the other side of a terminal is closed
                while select.select([reader], [], [], 0)[0] and (content := os.read(reader, 65536)):
                    self.seen[number] += content

    def said(self, number: int) -> str:
        return self.seen[number].decode("utf-8", "backslashreplace")


def _become(line: list[str], place: Place, streams: _Streams) -> None:
    """Turn this process into one that was started to run the command; never returns."""
    status = INTERNAL
    try:
        os.setsid()
        streams.install(place)
        _reopen()
        os.chdir(place.work)
        os.umask(place.umask)
        for name, value in place.environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        for limit, most in place.limits.items():
            resource.setrlimit(limit, (most, most))
        if place.unprivileged:
            _drop_capabilities()
        if not place.drawing:
            sys.modules["matplotlib"] = None  # type: ignore[assignment] - as where it is not installed
        tempfile.tempdir = None  # it is looked for once in a process
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as the interpreter has them
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for number in (signal.SIGCHLD, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        status = _main(line)
    finally:
        os._exit(status)


def _drop_capabilities() -> None:
    """Be an ordinary user: root itself may write to what is read-only."""
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    if ctypes.CDLL(None, use_errno=True).capset(header, none) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _reopen() -> None:
    """Python's own streams on the new descriptors, made as the interpreter makes them; none on a closed one."""
    for number, (name, mode) in enumerate((("stdin", "rb"), ("stdout", "wb"), ("stderr", "wb"))):
        old = getattr(sys, f"__{name}__")
        try:
            os.fstat(number)
        except OSError:
            stream = None
        else:
            raw = open(number, mode, closefd=False)  # noqa: SIM115
            buffered = name == "stderr" or os.isatty(number)
            stream = io.TextIOWrapper(raw, encoding=old.encoding, errors=old.errors, line_buffering=buffered)
        setattr(sys, name, stream)


def _main(line: list[str]) -> int:
    """Run the command as ``python -m vitshrink`` would, and end as the interpreter does."""
    sys.argv = ["vitshrink", *line]
    status = 0
    try:
        from vitshrink.cli import main

        main()
    except SystemExit as ended:
        if ended.code is not None and not isinstance(ended.code, int):
            print(ended.code, file=sys.stderr)
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except Exception as error:
            status = 120
            with suppress(Exception):
                sys.stderr.write(f"Exception ignored in: {stream!r}\n{type(error).__name__}: {error}\n")
                sys.stderr.flush()
    return status


@contextmanager
def new_directory(parent: Path | None = None) -> Iterator[Path]:
    """A directory that is gone afterwards, whatever was made in it."""
    root = Path(tempfile.mkdtemp(prefix="outside-", dir=parent))
    try:
        yield root
    finally:
        shutil.rmtree(os.fsencode(root), ignore_errors=True)


def preload() -> Any:
    """Import what takes long, before any case is forked off; and load a model, since that builds tables for all.

    The number of threads is that of the environment: ``torch.set_num_threads`` would make a pool, which threads of a
    forked process then make anew without waiting for each other.
    """
    import accelerate
    import datasets
    import jinja2
    import PIL.Image
    import pydantic.type_adapter
    import tiny
    import transformers
    import typer.rich_utils

    import vitshrink.jobs.compress
    import vitshrink.jobs.evaluate
    import vitshrink.jobs.export
    import vitshrink.jobs.finetune
    import vitshrink.jobs.inspection.job
    import vitshrink.jobs.quantize
    import vitshrink.jobs.sweep
    import vitshrink.jobs.verify

    PIL.Image.init()
    with new_directory() as root:
        for name in tiny.PLAIN:
            getattr(transformers, name).from_pretrained(tiny.write(name, root / name))
    return accelerate, datasets, jinja2, pydantic, typer, vitshrink
