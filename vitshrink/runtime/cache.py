"""Statistics and factors kept on disk, so that another size of the same model costs seconds."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from vitshrink.errors import OutputError
from vitshrink.runtime import processes
from vitshrink.runtime.entries import Entry, as_it_is, packed, read_metadata, read_tensors, unpacked, write_tensors
from vitshrink.runtime.storage import Place, is_url, scratch

Key = Mapping[str, Any]
"""All that the entries follow from, as JSON; ``layers`` lists their names."""

DAY = 24 * 3600.0
"""Seconds; no file takes so long to write."""


@dataclass(frozen=True)
class Cache:
    """One safetensors file for every key, named by its digest; files of other keys are left alone.

    Files appear whole or not at all, so that any number of processes may share the directory; what a killed one
    had half written is removed after a day. Of several processes of a job, the first alone uses it.

    Raises:
        OutputError: the directory cannot be made.
    """

    directory: Path
    device: torch.device
    warn: Callable[[str], None]
    store: Place | None = None
    """Where the files are kept for all machines; the directory then is this process's own."""

    @classmethod
    def at(cls, location: str, device: torch.device, warn: Callable[[str], None]) -> "Cache":
        """A cache in a directory, or at a URL. Raises OutputError, UsageError and DependencyError."""
        if is_url(location):
            return cls(scratch("cache"), device, warn, Place.of(location))
        return cls(Path(location), device, warn)

    def __post_init__(self) -> None:
        if not processes.is_main():
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"--cache {self.directory} cannot be used: {error}.") from error
        for half in self.directory.glob(f".*-{'[0-9a-f]' * 32}-*.tmp"):
            with suppress(OSError):  # its process ended just now, or another one removes it
                if time.time() - half.stat().st_mtime > DAY:
                    half.unlink()

    def read(
        self, kind: type[Entry], key: Key, place: Callable[[Tensor], Tensor] = as_it_is
    ) -> dict[str, Entry] | None:
        """The entries of ``key``, or None; warns of a file that is damaged or of another key.

        Each tensor is laid in its ``place`` before the next one is read.
        """
        path = self._path(kind, key)
        if not self._is_there(path):
            return None
        try:
            if json.loads(read_metadata(path)["key"]) != _complete(kind, key):
                raise ValueError("it belongs to another job")
            found = unpacked(kind, read_tensors(path, self.device, place))
            return {name: found[name] for name in key["layers"]}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            self.warn(f"{path} cannot be used and is computed again ({type(error).__name__}: {error}).")
            return None

    def write(self, key: Key, entries: Mapping[str, Entry]) -> None:
        """Keep ``entries``, one or more. Warns where that fails."""
        kind = type(next(iter(entries.values())))
        path = self._path(kind, key)
        try:
            write_tensors(path, packed(entries), {"key": json.dumps(_complete(kind, key))})
            if self.store is not None:
                self.store.put(path, path.name)
        except (OSError, SafetensorError, OutputError) as error:
            self.warn(f"{path} could not be written, so the next job computes it again: {error}.")

    def _is_there(self, path: Path) -> bool:
        try:
            return path.exists() or (self.store is not None and self.store.fetch(path.name, path))
        except OutputError as error:
            self.warn(f"the content of --cache is computed again: {error}")
            return False

    def _path(self, kind: type[Any], key: Key) -> Path:
        digest = hashlib.sha256(json.dumps(_complete(kind, key), sort_keys=True).encode()).hexdigest()
        return self.directory / f"{kind.__name__.lower()}-{digest[:32]}.safetensors"


def _complete(kind: type[Any], key: Key) -> dict[str, Any]:
    """The key with what an entry holds: a file from before a field was added is another one."""
    return {**key, "fields": [field.name for field in fields(kind)]}
