"""Dataclasses of tensors and numbers, one for every layer, in safetensors files that appear whole or not at all."""

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitshrink.runtime import processes
from vitshrink.runtime.resting import drop


class IsDataclass(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Entry = TypeVar("Entry", bound=IsDataclass)
"""A frozen dataclass of tensors and numbers."""

_NUMBERS = {int: torch.int64, float: torch.float64}


def values_of(entry: Any) -> dict[str, Any]:
    """The fields of a dataclass that are there."""
    found = {field.name: getattr(entry, field.name) for field in fields(entry)}
    return {name: value for name, value in found.items() if value is not None}


def laid_out(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """As they would be read from a file: products of tensors that are laid out otherwise round otherwise."""
    return {name: _tensors(entry, Tensor.contiguous) for name, entry in entries.items()}


def moved(entry: Entry, device: torch.device | str) -> Entry:
    """An entry with its tensors on ``device``."""
    return _tensors(entry, lambda tensor: tensor.to(device))


def from_process(source: int, entry: Entry | None, device: torch.device) -> Entry:
    """The entry that process ``source`` passes, in every process, which may be on other machines; on ``device``.

    Raises OtherProcessError where one of them has ended.
    """
    mine = {} if entry is None else values_of(entry)
    told = {name: _Like.of(value) if isinstance(value, Tensor) else value for name, value in mine.items()}
    kind, values = processes.from_process(source, (type(entry), told))
    for name, value in values.items():
        if isinstance(value, _Like):
            tensor = mine[name].cpu().contiguous() if mine else torch.empty(value.shape, dtype=value.dtype)
            processes.send(source, tensor)  # as it is: to pickle it would copy it several times
            values[name] = tensor.to(device)
    made: Entry = kind(**values)
    return made


def from_main(entries: Mapping[str, Entry], device: torch.device) -> dict[str, Entry]:
    """The entries that the first process passes, in every process; see ``from_process``."""
    if not processes.started():
        return dict(entries)
    return {name: from_process(0, entries.get(name), device) for name in processes.from_main(list(entries))}


@dataclass(frozen=True)
class _Like:
    """What a tensor is like."""

    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "_Like":
        return cls(tensor.shape, tensor.dtype)


def _tensors(entry: Entry, change: Any) -> Entry:
    changes: dict[str, Any] = {n: change(v) for n, v in values_of(entry).items() if isinstance(v, Tensor)}
    return replace(entry, **changes)


def packed(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """``name|field`` -> tensor."""
    return {
        f"{name}|{field}": value if isinstance(value, Tensor) else torch.tensor(value, dtype=_NUMBERS[type(value)])
        for name, entry in entries.items()
        for field, value in values_of(entry).items()
    }


def unpacked(kind: type[Entry], tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """What ``packed`` was given. Raises TypeError and ValueError for tensors that are something else."""
    values: dict[str, dict[str, Any]] = {}
    for label, tensor in tensors.items():
        name, _, field = label.rpartition("|")
        values.setdefault(name, {})[field] = tensor if tensor.ndim else tensor.item()
    return {name: kind(**found) for name, found in values.items()}


_SAME = " = "
"""Between the labels of one tensor."""
_TRIANGLE = " (triangle)"
"""After the labels of a symmetric matrix, of which the rows from the diagonal on are stored, (n(n + 1)/2,)."""


def compacted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same in less room, and none sharing memory with another: equal tensors once, symmetric matrices by half.

    Both are found by comparing bits, so that ``expanded`` gives back exactly what there was.
    """
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for label, tensor in _different(tensors).items():
        if tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1] > 1 and same_bits(tensor, tensor.T):
            rows, columns = torch.triu_indices(*tensor.shape, device=tensor.device)
            stored[label + _TRIANGLE] = tensor[rows, columns]
        else:
            whole = tensor.contiguous()
            storage = whole.untyped_storage().data_ptr()
            stored[label] = whole.clone() if storage in storages else whole
            storages.add(storage)
        drop()
    return stored


def _different(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor once, under all its labels."""
    labels: dict[str, list[str]] = {}
    alike: dict[tuple[torch.Size, torch.dtype], list[str]] = {}
    for label, tensor in tensors.items():
        known = alike.setdefault((tensor.shape, tensor.dtype), [])
        first = next((each for each in known if same_bits(tensor, tensors[each])), None)
        if first is None:
            known.append(label)
        labels.setdefault(first or label, []).append(label)
        drop()
    return {_SAME.join(each): tensors[first] for first, each in labels.items()}


Place = Callable[[Tensor], Tensor]
"""The same numbers in another place."""


def as_it_is(tensor: Tensor) -> Tensor:
    """Where it is."""
    return tensor


def expanded(stored: Mapping[str, Tensor], place: Place = as_it_is) -> dict[str, Tensor]:
    """The tensors that ``compacted`` was given, contiguous, each in its ``place``; equal ones are one tensor."""
    tensors: dict[str, Tensor] = {}
    for label, tensor in stored.items():
        whole = place(_from_triangle(tensor) if label.endswith(_TRIANGLE) else tensor)
        tensors |= dict.fromkeys(label.removesuffix(_TRIANGLE).split(_SAME), whole)
    return tensors


def _from_triangle(numbers: Tensor) -> Tensor:
    """(n, n), of the numbers from its diagonal on, (n(n + 1)/2,)."""
    size = (math.isqrt(8 * len(numbers) + 1) - 1) // 2
    rows, columns = torch.triu_indices(size, size, device=numbers.device)
    matrix = numbers.new_empty(size, size)
    matrix[rows, columns] = numbers
    matrix[columns, rows] = numbers
    return matrix


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and type are the same, the sign of a zero included."""
    left, right = (each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(left, right)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``tensors``, compacted. Raises OSError and SafetensorError."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    try:
        save_file(compacted(tensors), temporary, metadata=dict(metadata))
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_metadata(path: Path) -> dict[str, str]:
    """Raises OSError and SafetensorError."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def read_tensors(path: Path, device: torch.device, place: Place = as_it_is) -> dict[str, Tensor]:
    """The tensors that were written, each in its ``place``. Raises OSError and SafetensorError."""
    with safe_open(path, "pt") as file:
        labels = list(file.keys())
    found: dict[str, Tensor] = {}
    for label in labels:
        with safe_open(
            path, "pt", device=str(device)
        ) as file:  # anew: what was read stays in memory until it is closed
            # cloned: what lies in the file is aligned otherwise, and products then round otherwise
            tensor = file.get_tensor(label).clone()
        found |= expanded({label: tensor}, place)
    return found
