"""What a running job has computed, kept beside its output, so that the same command goes on after it was killed."""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from vitshrink.runtime import processes
from vitshrink.runtime.entries import Entry, moved, packed, read_metadata, read_tensors, unpacked, write_tensors

JOB = "job.json"
FINETUNE = "finetune"
MOST_TIME = 0.05
"""Part of its time that a job may spend on saving."""


def state_directory(output: Path) -> Path:
    """Where the job that writes ``output`` keeps its state."""
    output = output.expanduser()
    return output.parent / f".{output.name}.vitshrink-state"


@dataclass
class Progress:
    """The steps of one job as far as they are done, in a directory that is made when there is something to lose.

    A step has a name, and is saved at most every ``every`` seconds (0: whenever it can be), with all that is done by
    then. Nothing is used of a job whose ``identity`` is another one. The output has to be locked while this is
    in use. In several processes the first alone reads and writes, and a step that is not complete is not kept.
    """

    directory: Path | None = None
    """None: nothing is kept."""
    identity: Callable[[], Mapping[str, Any]] = dict
    """All that the result follows from, as JSON; asked for when it is first needed, since it may read every weight."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    every: float = 30.0
    warn: Callable[[str], None] = lambda _message: None
    _unsaved: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _saved_at: float = field(default_factory=time.monotonic)
    _cost: float = 0.0

    def __post_init__(self) -> None:
        if not processes.is_main():
            self.directory = None

    def open(self) -> bool:
        """Whether there is a state to go on from; of another job's it says what differs, and removes it."""
        if self.directory is None or not self.directory.is_dir():
            return False
        different = self._differences(self.directory)
        if different is None:
            return True
        self.warn(f"{self.directory} is the state of an interrupted job {different}: it is not used, and removed.")
        self.discard()
        return False

    def prepared(self) -> Path | None:
        """The directory, made where it was not there; None where nothing is kept, or can be."""
        if self.directory is not None and not self.directory.is_dir():
            try:
                self.directory.mkdir(parents=True)
                (self.directory / JOB).write_text(json.dumps(self._identity), encoding="utf-8")
            except OSError as error:
                self._give_up(error)
        return self.directory

    def entries(self, step: str, kind: type[Entry]) -> dict[str, Entry]:
        """What was kept of a step, in every process; nothing where it was not reached."""
        found = unpacked(kind, self._read(step)[1])
        if not processes.started():
            return found
        names = processes.from_main(list(found))
        sent = {name: moved(found[name], "cpu") if name in found else None for name in names}
        return {name: moved(processes.from_main(sent[name]), self.device) for name in names}

    def sums(self, step: str) -> tuple[int, dict[str, Tensor]]:
        """The number of batches that were run, and the sums over them."""
        return self._read(f"{step}-sums") if processes.count() == 1 else (0, {})

    def keep(self, step: str, entries: Mapping[str, Entry]) -> None:
        """Remember a step that is complete; it is saved with the next that is."""
        if self.directory is not None and entries:
            self._unsaved[step] = entries
            if self._due:
                self._save({})

    def keep_part(self, step: str, entries: Mapping[str, Entry]) -> None:
        """Save a step that is not complete, where it is time."""
        if self._due and processes.count() == 1 and entries:
            self._save({step: (0, packed(entries))})

    def keep_sums(self, step: str, done: int, sums: Callable[[], dict[str, Tensor]]) -> None:
        """Save the sums over the first ``done`` batches, where it is time."""
        if self._due and processes.count() == 1:
            self._save({f"{step}-sums": (done, sums())})

    def forget(self, *steps: str) -> None:
        """Remove steps that others have overtaken."""
        for step in steps:
            self._unsaved.pop(step, None)
            if self.directory is not None:
                self._path(step).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove all: the job is done, or is another one."""
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def _due(self) -> bool:
        if self.directory is None or not self.every:
            return self.directory is not None
        return time.monotonic() - self._saved_at >= max(self.every, self._cost / MOST_TIME)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return json.loads(json.dumps(self.identity()))  # type: ignore[no-any-return]

    def _path(self, step: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{step}.safetensors"

    def _read(self, step: str) -> tuple[int, dict[str, Tensor]]:
        if self.directory is None or not self._path(step).exists():
            return 0, {}
        try:
            return int(read_metadata(self._path(step))["done"]), read_tensors(self._path(step), self.device)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            self.warn(f"{self._path(step)} cannot be used and is computed again ({type(error).__name__}: {error}).")
            return 0, {}

    def _save(self, parts: Mapping[str, tuple[int, Mapping[str, Tensor]]]) -> None:
        started = time.monotonic()
        if self.prepared() is None:
            return
        try:
            for step in list(self._unsaved):
                write_tensors(self._path(step), packed(self._unsaved.pop(step)), {"done": "0"})
            for step, (done, tensors) in parts.items():
                write_tensors(self._path(step), tensors, {"done": str(done)})
        except (OSError, SafetensorError) as error:
            self._give_up(error)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - started

    def _give_up(self, error: Exception) -> None:
        """Go on without: the job itself can, and needs the room."""
        self.warn(f"what is computed cannot be saved in {self.directory}, and would be lost with a kill: {error}.")
        self.discard()
        self.directory = None
        self._unsaved.clear()

    def _differences(self, directory: Path) -> str | None:
        """In what the job of the state differs from this one; None where it is the same."""
        other = None
        with suppress(OSError, ValueError):
            other = json.loads((directory / JOB).read_text(encoding="utf-8"))
        if not isinstance(other, dict):
            return "and damaged"
        mine = self._identity
        different = sorted(name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name))
        return f"with other {', '.join(different)}" if different else None
