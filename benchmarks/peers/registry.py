"""What a peer is: a decorated function that gives rows, each of which can build a model and say what it weighs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from vitshrink.data.opening import CalibrationData
from vitshrink.jobs.export import export
from vitshrink.jobs.export_forms import ONNX_FILE
from vitshrink.models.loading import LoadedModel


@dataclass
class Material:
    """The model and the calibration that every row begins with."""

    source: LoadedModel
    model: str
    """Directory or Hub id, as it was given."""
    calibration: str
    samples: int
    calibrations: Mapping[int, CalibrationData]
    """By seed: ``samples`` of the calibration, read and preprocessed."""
    sizes: Sequence[str]
    """Such as ``3.5MB``, for rows that can aim at a size."""
    folder: Path
    """For what rows share."""

    @cached_property
    def onnx(self) -> Path:
        """The dense model as ``vitshrink export --to onnx`` writes it, with batches of any size."""
        export(self.model, str(self.folder / "onnx"), "onnx", offline=True)
        return self.folder / "onnx" / ONNX_FILE


@dataclass(frozen=True)
class Built:
    """A model that takes and gives what the transformers model does, and the bytes of the files it was stored in."""

    model: nn.Module
    nbytes: int
    seconds: float | None = None
    """Of the work, where the clock around ``build`` does not tell."""


@dataclass(frozen=True)
class Row:
    """One row of the table. What stands before the colon in its name names its curve in the picture."""

    name: str
    stored: str
    build: Callable[[Material, int, Path], Built]
    """From the material, a seed and an empty folder."""
    calibrated: bool = True
    """Whether the seed makes a difference."""


@dataclass(frozen=True)
class Peer:
    """Rows that belong together, and the packages without which they are skipped."""

    name: str
    rows: Callable[[Sequence[str]], Iterable[Row]]
    """From the sizes that were asked for."""
    packages: tuple[str, ...]


PEERS: dict[str, Peer] = {}


def peer(
    name: str, *packages: str
) -> Callable[[Callable[[Sequence[str]], Iterable[Row]]], Callable[[Sequence[str]], Iterable[Row]]]:
    """Enter a function as a peer. What goes wrong within its ``packages`` is a reason to skip a row, no bug here."""

    def enter(rows: Callable[[Sequence[str]], Iterable[Row]]) -> Callable[[Sequence[str]], Iterable[Row]]:
        PEERS[name] = Peer(name, rows, packages)
        return rows

    return enter
