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
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from vitshrink.runtime.entries import Entry, laid_out, values_of
from vitshrink.runtime.resting import drop, maps, rest

__all__ = ["drop", "in_file", "page_weights", "paged", "rest"]

LEAST = 2**16
"""Bytes from which on a tensor is worth a file."""

_placed = WeakTensorKeyDictionary()
"""The tensors that lie in files."""


def paged(entries: Mapping[str, Entry] | Iterable[tuple[str, Entry]], directory: Path | None) -> dict[str, Entry]:
    """Entries with the same numbers, of which large tensors lie in files of a directory, which go with them.

    Tensors that several entries share are shared again. Without a directory, or room there, all stays in memory.
    """
    if directory is None:
        return laid_out(dict(entries))
    found: dict[str, Entry] = {}
    known = WeakTensorKeyDictionary()  # entries that come one by one are let go of one by one
    for name, entry in entries.items() if isinstance(entries, Mapping) else entries:
        (placed,) = laid_out({name: entry}).values()
        large = {field: value for field, value in values_of(placed).items() if _is_large(value)}
        for tensor in large.values():
            if tensor not in known:
                known[tensor] = _in_file(tensor, directory)
        changes: dict[str, Any] = {field: known[tensor] for field, tensor in large.items()}
        found[name] = replace(placed, **changes)
        rest()
    return found


def in_file(tensor: Tensor, directory: Path | None) -> Tensor:
    """The same numbers in a file of a directory, if they are many; the tensor itself where that cannot be."""
    if directory is None or not _is_large(tensor):
        return tensor
    return _in_file(tensor.contiguous(), directory)


def page_weights(model: nn.Module, directory: Path | None) -> None:
    """Lay the parameters of a model in files, in place: views of it have them there, too."""
    for parameter in model.parameters():
        parameter.data = in_file(parameter.data, directory)
    rest()


def _is_large(value: Any) -> bool:
    """Whether it is worth a file, and is in none."""
    if not isinstance(value, Tensor) or value in _placed:
        return False
    return value.device.type == "cpu" and value.nbytes >= LEAST


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
    maps.append(ref(array))
    found = torch.from_numpy(array).view(tensor.dtype).view(tensor.shape)
    _placed[found] = True
    return found
