"""Tensors that lie in files instead of in memory: the system reads what is used, and may take the room back."""

import mmap
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from vitshrink.runtime.entries import Entry, laid_out, values_of
from vitshrink.runtime.heap import give_back

LEAST = 2**16
"""Bytes from which on a tensor is worth a file."""

_maps: list[ref[Any]] = []
"""All arrays in files that something still refers to."""


def paged(entries: Mapping[str, Entry] | Iterable[tuple[str, Entry]], directory: Path | None) -> dict[str, Entry]:
    """Entries with the same numbers, of which large tensors lie in files of a directory, which go with them.

    Tensors that several entries share are shared again. Without a directory, or room there, all stays in memory.
    """
    if directory is None:
        return laid_out(dict(entries))
    found: dict[str, Entry] = {}
    known: dict[int, tuple[Tensor, Tensor]] = {}
    for name, entry in entries.items() if isinstance(entries, Mapping) else entries:
        (placed,) = laid_out({name: entry}).values()
        large = {field: value for field, value in values_of(placed).items() if _is_large(value)}
        for tensor in large.values():
            if id(tensor) not in known:  # the tensor stands beside, so that no other one gets its identity
                known[id(tensor)] = tensor, _in_file(tensor, directory)
        changes: dict[str, Any] = {field: known[id(tensor)][1] for field, tensor in large.items()}
        found[name] = replace(placed, **changes)
        rest()
    return found


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.nbytes >= LEAST


def rest() -> None:
    """Let go of the memory in which what was read of such tensors lies, and of what was freed.

    It is read again where it is used. Nothing happens where there is no such tensor.
    """
    alive = [(each, array) for each in _maps if (array := each()) is not None]
    _maps[:] = [each for each, _ in alive]
    for _, array in alive:
        array._mmap.madvise(mmap.MADV_DONTNEED)
    if alive:
        give_back()


def _in_file(tensor: Tensor, directory: Path) -> Tensor:
    """The same numbers in a file without a name; the tensor itself where that cannot be."""
    if not hasattr(mmap, "MADV_DONTNEED"):  # Windows, where a file that is in use keeps its name
        return tensor
    try:
        descriptor, name = tempfile.mkstemp(prefix=".pages-", dir=directory)
    except OSError:
        return tensor
    with os.fdopen(descriptor, "r+b") as file:
        try:
            os.unlink(name)
            tensor.detach().numpy().tofile(file)
            file.flush()
            array = np.memmap(file, np.uint8, "r+", shape=(tensor.nbytes,))
        except OSError:  # no room, or a file system that maps nothing
            return tensor
    _maps.append(ref(array))
    return torch.from_numpy(array).view(tensor.dtype).view(tensor.shape)
