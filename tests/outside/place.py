"""Where a command runs: its paths, environment, limits and streams."""

import os
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Stream = Literal["file", "pipe", "terminal", "closed", "full", "gone"]
"""What stdout or stderr is; closed is nothing at all, full a disk, and gone a pipe without a reader."""


@dataclass
class Place:
    """``root`` is new, and of this case alone."""

    root: Path
    model: bytes = b"model"
    """Name of the directory of the checkpoint."""
    data: bytes = b"data"
    output: bytes = b"out"
    written: str = ""
    """Folder below which outputs are written, if not the working directory."""
    relative: bool = True
    """Whether paths are given relative to the working directory."""
    environment: dict[str, str | None] = field(default_factory=dict)
    """None removes one."""
    startup: dict[str, str] = field(default_factory=dict)
    """What an interpreter reads when it starts: a case with such needs one of its own."""
    limits: dict[int, int] = field(default_factory=dict)
    stdin: Literal["file", "closed"] = "file"
    stdout: Stream = "file"
    stderr: Stream = "file"
    columns: int = 80
    umask: int = 0o022
    drawing: bool = False
    """Whether matplotlib is installed: pictures take most of the time of a tiny job."""
    unprivileged: bool = False
    """Whether the command is run by somebody who may not write everywhere."""
    ended: tuple[int, float] | None = None
    """A signal that the process gets, and after how many seconds."""
    before: list[Callable[["Place"], None]] = field(default_factory=list)
    """What is done when model and data are there, before the command."""
    after: list[Callable[["Place"], None]] = field(default_factory=list)
    """Likewise when all is over, to take it back."""

    @property
    def printed(self) -> bool:
        """Whether somebody reads what is written to stdout."""
        return self.stdout in ("file", "pipe", "terminal")

    @property
    def complained(self) -> bool:
        """Likewise of stderr."""
        return self.stderr in ("file", "pipe", "terminal")

    @property
    def scarce(self) -> bool:
        """Whether there may be too little room for what is written."""
        return resource.RLIMIT_FSIZE in self.limits or self.written == "disk"

    @property
    def work(self) -> Path:
        """The working directory: nothing but outputs may appear in it."""
        return self.root / "work"

    @property
    def inputs(self) -> Path:
        """Nothing in it may change."""
        return self.root / "in"

    def inside(self, name: bytes) -> Path:
        return Path(os.fsdecode(os.fsencode(self.inputs) + b"/" + name))

    def given(self, path: Path) -> str:
        """A path as it is written on the command line."""
        return os.path.relpath(path, self.work) if self.relative else str(path)

    def output_path(self, number: int = 0) -> Path:
        """Where the output of a number goes: another run of the same job has another one."""
        name = self.output + (f"-{number}".encode() if number else b"")
        return Path(os.fsdecode(os.fsencode(self.work / self.written) + b"/" + name))
