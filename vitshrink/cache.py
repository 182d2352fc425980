"""Statistics and factors kept on disk, so that another size of the same model costs seconds."""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.calibration import CalibrationBatch
from vitshrink.errors import OutputError
from vitshrink.methods import Factorisation
from vitshrink.stats import LinearStats

Entry = TypeVar("Entry", LinearStats, Factorisation)

Key = Mapping[str, Any]
"""All that the entries follow from, as JSON; ``layers`` lists their names."""

DAY = 24 * 3600.0
"""Seconds; no file takes so long to write."""


@dataclass(frozen=True)
class Cache:
    """One safetensors file for every key, named by its digest; files of other keys are left alone.

    Files appear whole or not at all, so that any number of processes may share the directory; what a killed one
    had half written is removed after a day.

    Raises:
        OutputError: the directory cannot be made.
    """

    directory: Path
    device: torch.device
    warn: Callable[[str], None]

    def __post_init__(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"--cache {self.directory} cannot be used: {error}.") from error
        for half in self.directory.glob(f".*-{'[0-9a-f]' * 32}-*.tmp"):
            with suppress(OSError):  # its process ended just now, or another one removes it
                if time.time() - half.stat().st_mtime > DAY:
                    half.unlink()

    def read(self, kind: type[Entry], key: Key) -> dict[str, Entry] | None:
        """The entries of ``key``, or None; warns of a file that is damaged or of another key."""
        path = self._path(kind, key)
        if not path.exists():
            return None
        key = _complete(kind, key)
        values: dict[str, dict[str, Any]] = {}
        try:
            with safe_open(path, "pt", device=str(self.device)) as file:
                if json.loads((file.metadata() or {})["key"]) != key:
                    raise ValueError("it belongs to another job")
                for label in file.keys():  # noqa: SIM118 - not a mapping
                    name, _, field = label.rpartition("|")
                    tensor = file.get_tensor(label)
                    # cloned: what lies in the file is aligned otherwise, and products then round otherwise
                    values.setdefault(name, {})[field] = tensor.clone() if tensor.ndim else tensor.item()
            return {name: kind(**values[name]) for name in key["layers"]}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            self.warn(f"{path} cannot be used and is written again ({type(error).__name__}: {error}).")
            return None

    def write(self, key: Key, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Keep ``entries``, one or more; gives them laid out as they will be read. Warns where that fails."""
        entries = {name: _contiguous(entry) for name, entry in entries.items()}
        tensors: dict[str, Tensor] = {}
        storages: set[int] = set()
        for name, entry in entries.items():
            for field, value in _values(entry).items():
                tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=_NUMBERS[type(value)])
                storage = tensor.untyped_storage().data_ptr()
                tensors[f"{name}|{field}"] = tensor.clone() if storage in storages else tensor
                storages.add(storage)
        kind = type(next(iter(entries.values())))
        path, key = self._path(kind, key), _complete(kind, key)
        try:
            descriptor, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".tmp", dir=self.directory)
            os.close(descriptor)
            try:
                save_file(tensors, temporary, metadata={"key": json.dumps(key)})
                os.replace(temporary, path)
            finally:
                Path(temporary).unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            self.warn(f"{path} could not be written, and the next job will compute it again: {error}.")
        return entries

    def _path(self, kind: type[Any], key: Key) -> Path:
        digest = hashlib.sha256(json.dumps(_complete(kind, key), sort_keys=True).encode()).hexdigest()
        return self.directory / f"{kind.__name__.lower()}-{digest[:32]}.safetensors"


def _complete(kind: type[Any], key: Key) -> dict[str, Any]:
    """The key with what an entry holds: a file from before a field was added is another one."""
    return {**key, "fields": [field.name for field in fields(kind)]}


_NUMBERS = {int: torch.int64, float: torch.float64}


def _values(entry: Any) -> dict[str, Any]:
    found = {field.name: getattr(entry, field.name) for field in fields(entry)}
    return {name: value for name, value in found.items() if value is not None}


def _contiguous(entry: Entry) -> Entry:
    changes: dict[str, Any] = {n: v.contiguous() for n, v in _values(entry).items() if isinstance(v, Tensor)}
    return replace(entry, **changes)


def model_digest(model: PreTrainedModel) -> str:
    """SHA-256 of the weights in memory and of the configuration, but not of where they came from."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    return _digest(model.state_dict(), json.dumps(config, sort_keys=True, default=str))


def data_digest(batches: Iterable[CalibrationBatch]) -> str:
    """SHA-256 of what enters the model: samples, their order, preprocessing and batch size all show in it."""
    parts = [_digest(batch.inputs if batch.mask is None else {**batch.inputs, "mask": batch.mask}) for batch in batches]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in tensors.items():
        digest.update(f"\x00{name} {tensor.dtype} {list(tensor.shape)}\x00".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
