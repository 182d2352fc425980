"""What a running job has computed, kept beside its output, so that the same command goes on after it was killed."""

import json
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from vitshrink.errors import OutputError
from vitshrink.runtime import processes
from vitshrink.runtime.entries import (
    Entry,
    as_it_is,
    from_main,
    packed,
    read_metadata,
    read_tensors,
    unpacked,
    write_tensors,
)
from vitshrink.runtime.storage import Mirror, Place, is_url, scratch

JOB = "job.json"
PARTS = 16
"""Files of running sums. They are replaced one by one, so that no second copy of all takes room beside the first."""
FINETUNE = "finetune"
MOST_TIME = 0.05
"""Part of its time that a job may spend on saving."""


def state_directory(output: Path) -> Path:
    """Where the job that writes ``output`` keeps its state."""
    output = output.expanduser()
    return output.parent / f".{output.name}.vitshrink-state"


def state_of(output: str) -> tuple[Path, Mirror | None]:
    """The same for an output that may be a URL: a local directory, and where it is kept beside the output."""
    if not is_url(output):
        return state_directory(Path(output)), None
    here = scratch("state") / "state"
    return here, Mirror(here, Place.of(output).sibling("vitshrink-state"))


def record_identity(file: Path, identity: Mapping[str, Any]) -> None:
    """Write down all that the result of a job follows from. Raises OSError."""
    file.write_text(json.dumps(identity, sort_keys=True, default=str), encoding="utf-8")


def differing(file: Path, identity: Mapping[str, Any]) -> list[str]:
    """The entries by which the job that ``file`` records is another one than that of ``identity``.

    Raises OSError and ValueError where the file cannot be read.
    """
    other = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(other, dict):
        raise ValueError(f"{file} records no job")
    mine = json.loads(json.dumps(identity, default=str))
    return sorted(name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name))


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
    mirror: Mirror | None = None
    """Where the directory is kept for other machines."""
    _unsaved: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _spent: list[str] = field(default_factory=list)
    """To be removed before anything is saved."""
    _overtaken: list[str] = field(default_factory=list)
    """To be removed after everything is saved."""
    _saved_at: float = field(default_factory=time.monotonic)
    _cost: float = 0.0

    def __post_init__(self) -> None:
        if not processes.is_main():
            self.directory = self.mirror = None

    def open(self) -> bool:
        """Whether there is a state to go on from; of another job's it says what differs, and removes it."""
        if self.mirror is not None:
            self.mirror.pull()
        if self.directory is None or not self.directory.is_dir():
            return False
        different = self._differences(self.directory)
        if different is None:
            return True
        self.warn(
            f"{self.directory} is the state of an interrupted job {different}: it is not used, and it is removed."
        )
        self.discard()
        return False

    def prepared(self) -> Path | None:
        """The directory, made where it was not there; None where nothing is kept, or can be."""
        if self.directory is not None and not self.directory.is_dir():
            try:
                self.directory.mkdir(parents=True)
                record_identity(self.directory / JOB, self._identity)
            except OSError as error:
                self._give_up(error)
        return self.directory

    def entries(self, step: str, kind: type[Entry], place: Callable[[Tensor], Tensor] = as_it_is) -> dict[str, Entry]:
        """What was kept of a step, in every process, each tensor in its ``place``; nothing where it was not reached."""
        path = self._path(step)
        found = {} if path is None or not path.exists() else unpacked(kind, self._read(path, place)[1])
        return from_main(found, self.device)

    def has(self, step: str) -> bool:
        """Whether a step was kept; the same in every process."""
        path = self._path(step)
        return bool(processes.from_main(path is not None and path.exists()))

    def sums(self, step: str) -> dict[int, dict[str, Tensor]]:
        """Sums over the first batches, by the number of these; nothing in several processes.

        A kill while sums were saved leaves some of them further than others, and each name under one number.
        """
        paths = self._parts(f"{step}-sums")
        if processes.count() > 1 or not paths or not all(path.exists() for path in paths):
            return {}
        found: dict[int, dict[str, Tensor]] = {}
        for path in paths:
            done, tensors = self._read(path)
            if not done:
                return {}
            found.setdefault(done, {}).update(tensors)
        return found

    def keep(self, step: str, entries: Mapping[str, Entry], *, hold: bool = True) -> None:
        """Remember a step that is complete; it is saved with the next that is.

        Unless it may not be held in memory so long: then it is saved now, or where it is not time not at all. Sums that
        were saved on the way to it are still there.
        """
        if self.directory is None or not entries or not (hold or self._due):
            return
        self._unsaved[step] = entries
        if self._due:
            self._save()

    def keep_sums(self, step: str, done: int, sums: Callable[[], dict[str, Tensor]]) -> None:
        """Save the sums over the first ``done`` batches, where it is time."""
        if self._due and processes.count() == 1:
            parts: list[dict[str, Tensor]] = [{} for _ in range(PARTS)]
            for label, tensor in sums().items():
                parts[zlib.crc32(label.encode()) % PARTS][label] = tensor
            self._save(dict(zip(self._parts(f"{step}-sums"), parts, strict=True)), done)

    def finish_sums(self, step: str) -> None:
        """All batches were run: the sums make room for what is kept next, the statistics that are made of them.

        A kill while these are written costs the pass over the batches.
        """
        self._spent.append(f"{step}-sums")

    def forget(self, *steps: str) -> None:
        """Remove steps that others have overtaken, as soon as these are saved."""
        for step in steps:
            self._unsaved.pop(step, None)
        self._overtaken += steps
        if not self._unsaved:
            self._remove(self._overtaken)

    def discard(self) -> None:
        """Remove all: the job is done, or is another one."""
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
        if self.mirror is not None:
            with suppress(OutputError):  # what stays there is seen to be of another job
                self.mirror.remove()

    @property
    def _due(self) -> bool:
        if self.directory is None or not self.every:
            return self.directory is not None
        return time.monotonic() - self._saved_at >= max(self.every, self._cost / MOST_TIME)

    @cached_property
    def _identity(self) -> Mapping[str, Any]:
        return self.identity()

    def _path(self, step: str) -> Path | None:
        return None if self.directory is None else self.directory / f"{step}.safetensors"

    def _parts(self, step: str) -> list[Path]:
        directory = self.directory
        return [] if directory is None else [directory / f"{step}-{n:02d}.safetensors" for n in range(PARTS)]

    def _read(self, path: Path, place: Callable[[Tensor], Tensor] = as_it_is) -> tuple[int, dict[str, Tensor]]:
        try:
            return int(read_metadata(path)["done"]), read_tensors(path, self.device, place)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            self.warn(f"{path} cannot be used and is computed again ({type(error).__name__}: {error}).")
            return 0, {}

    def _save(self, parts: Mapping[Path, Mapping[str, Tensor]] | None = None, done: int = 0) -> None:
        """Save what is unsaved, and ``parts`` of sums over ``done`` batches."""
        started = time.monotonic()
        if self.prepared() is None:
            return
        try:
            if self._unsaved:
                self._remove(self._spent)
            for step in list(self._unsaved):
                path = self._path(step)
                assert path is not None
                write_tensors(path, packed(self._unsaved.pop(step)), {"done": "0"})
            for part, tensors in (parts or {}).items():
                write_tensors(part, tensors, {"done": str(done)})
            self._remove(self._overtaken)
            if self.mirror is not None and self.directory is not None:
                self.mirror.push()
        except (OSError, SafetensorError, OutputError) as error:
            self._give_up(error)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - started

    def _remove(self, steps: list[str]) -> None:
        while steps:
            step = steps.pop()
            for path in (self._path(step), *self._parts(step)):
                if path is not None:
                    path.unlink(missing_ok=True)

    def _give_up(self, error: Exception) -> None:
        """Go on without: the job itself can, and needs the room."""
        self.warn(f"the job state cannot be saved in {self.directory}, so a kill would lose it: {error}.")
        self.discard()
        self.directory = self.mirror = None
        self._unsaved.clear()

    def _differences(self, directory: Path) -> str | None:
        """In what the job of the state differs from this one; None where it is the same."""
        try:
            different = differing(directory / JOB, self._identity)
        except (OSError, ValueError):
            return "and damaged"
        return f"with other {', '.join(different)}" if different else None
