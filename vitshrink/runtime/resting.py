"""Files that lie in memory as far as they are read, and are let go of."""

import mmap
from typing import Any
from weakref import ref

import psutil

from vitshrink.runtime.heap import give_back_growth

MANY = 2**25
"""Bytes of files that are worth the time of letting go of them."""

maps: list[ref[Any]] = []
"""All arrays in files that something still refers to."""

_left = 0
"""Bytes of files that stayed in memory when the last ones were let go of: code, mostly."""


def rest() -> None:
    """Let go of the memory in which what was read of tensors in files lies, and of what was freed, where that grows."""
    drop()
    give_back_growth()


def drop() -> None:
    """Let go of what was read of tensors in files, if it is much: it is read again where it is used."""
    global _left  # noqa: PLW0603 - of the process, as its memory is
    if not maps or ((now := _of_files()) is not None and now < _left + MANY):
        return
    alive = [(each, array) for each in maps if (array := each()) is not None]
    maps[:] = [each for each, _ in alive]
    for _, array in alive:
        array._mmap.madvise(mmap.MADV_DONTNEED)
    _left = _of_files() or 0


def _of_files() -> int | None:
    """Bytes of files in memory; None where the system does not tell."""
    found: int | None = getattr(psutil.Process().memory_info(), "shared", None)
    return found
