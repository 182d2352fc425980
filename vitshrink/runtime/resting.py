"""Files that lie in memory as far as they are read, and are let go of."""

import mmap
from typing import Any
from weakref import ref

from vitshrink.runtime.heap import give_back

maps: list[ref[Any]] = []
"""All arrays in files that something still refers to."""


def rest() -> None:
    """Let go of the memory in which what was read of tensors in files lies, and of what was freed.

    It is read again where it is used. Nothing happens where there is no such tensor.
    """
    if drop():
        give_back()


def drop() -> bool:
    """The same, but for what was freed. Whether there is any such tensor."""
    alive = [(each, array) for each in maps if (array := each()) is not None]
    maps[:] = [each for each, _ in alive]
    for _, array in alive:
        array._mmap.madvise(mmap.MADV_DONTNEED)
    return bool(alive)
