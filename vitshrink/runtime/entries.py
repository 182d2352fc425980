"""Dataclasses of tensors and numbers, one for every layer, in safetensors files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


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


def _tensors(entry: Entry, change: Any) -> Entry:
    changes: dict[str, Any] = {n: change(v) for n, v in values_of(entry).items() if isinstance(v, Tensor)}
    return replace(entry, **changes)


def packed(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """``name|field`` -> tensor; none shares memory with another."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, entry in entries.items():
        for field, value in values_of(entry).items():
            tensor = (
                value.contiguous() if isinstance(value, Tensor) else torch.tensor(value, dtype=_NUMBERS[type(value)])
            )
            storage = tensor.untyped_storage().data_ptr()
            tensors[f"{name}|{field}"] = tensor.clone() if storage in storages else tensor
            storages.add(storage)
    return tensors


def unpacked(kind: type[Entry], tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """What ``packed`` was given. Raises TypeError and ValueError for tensors that are something else."""
    values: dict[str, dict[str, Any]] = {}
    for label, tensor in tensors.items():
        name, _, field = label.rpartition("|")
        values.setdefault(name, {})[field] = tensor if tensor.ndim else tensor.item()
    return {name: kind(**found) for name, found in values.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raises OSError and SafetensorError."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    try:
        save_file(dict(tensors), temporary, metadata=dict(metadata))
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_metadata(path: Path) -> dict[str, str]:
    """Raises OSError and SafetensorError."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def read_tensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    """Raises OSError and SafetensorError."""
    with safe_open(path, "pt", device=str(device)) as file:
        # cloned: what lies in the file is aligned otherwise, and products then round otherwise
        return {label: file.get_tensor(label).clone() for label in file.keys()}  # noqa: SIM118 - not a mapping
