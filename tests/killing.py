"""Processes that kill themselves at a chosen moment, as the kernel would."""

import importlib
import multiprocessing
import os
import resource
import signal
import sys
from typing import Any

import tiny
import torch

from vitshrink.compression import effort
from vitshrink.config.options import CompressConfig
from vitshrink.errors import VitshrinkError
from vitshrink.jobs.compress import compress
from vitshrink.report import figures
from vitshrink.runtime.observer import Silent

# a server that has imported everything forks one process after the other
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["killing"])


def compress_until(entries: dict[str, Any], module: str, name: str, calls: int) -> None:
    """Run the job in a process of its own, which gets SIGKILL when ``module.name`` has been called ``calls`` times and
    is called once more."""
    process = CONTEXT.Process(target=_compress, args=(entries, module, name, calls))
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == -signal.SIGKILL, f"it ended with {process.exitcode}: {module}.{name} was not reached"


def attribute(module: str, path: str) -> tuple[Any, str]:
    """The owner and the last part of a dotted name in a module."""
    owner = importlib.import_module(module)
    *parts, name = path.split(".")
    for part in parts:
        owner = getattr(owner, part)
    return owner, name


def _compress(entries: dict[str, Any], module: str, path: str, left: int) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the process ends
    torch.set_num_threads(1)
    figures.available = lambda: False
    effort.DEFAULT = tiny.REFINES_ALWAYS
    owner, name = attribute(module, path)
    original = getattr(owner, name)

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    setattr(owner, name, counted)
    compress(CompressConfig.from_mapping(entries))


def compress_with_little_room(entries: dict[str, Any], nbytes: int) -> tuple[str, list[str]]:
    """What the job ends with where no file may grow beyond ``nbytes``, as on a disk that is full, and its warnings."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_compress_small, args=(entries, nbytes, sender))
    process.start()
    sender.close()
    said: tuple[str, list[str]] = receiver.recv()
    process.join()
    return said


def _compress_small(entries: dict[str, Any], nbytes: int, sender: Any) -> None:
    torch.set_num_threads(1)
    figures.available = lambda: False
    warnings: list[str] = []

    class Listening(Silent):
        def warn(self, message: str) -> None:
            warnings.append(message)

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
    try:
        compress(CompressConfig.from_mapping(entries), Listening())
        sender.send(("done", warnings))
    except VitshrinkError as error:
        sender.send((f"{type(error).__name__}: {error}", warnings))
