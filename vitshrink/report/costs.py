"""The parts of a report that say what the models cost: numbers, bytes, operations and time."""

from dataclasses import dataclass
from typing import final

from vitshrink.models.cost import Latency
from vitshrink.runtime.records import IfSet


@final
@dataclass(frozen=True)
class BeforeAfter:
    """One cost of the dense and of the compressed model: numbers, bytes or operations."""

    dense: int
    """Cost of the dense model."""
    compressed: int
    """Cost of the compressed model."""
    kept: float
    """Cost of the compressed model as a fraction of the dense model's."""


def before_after(dense: int, compressed: int) -> BeforeAfter:
    """Both, and the fraction that is kept."""
    return BeforeAfter(dense, compressed, compressed / dense if dense else 1.0)


@dataclass(frozen=True)
class Timings:
    """Both models, timed in turn with batches of one size. A model that was not timed is left out."""

    dense: IfSet[Latency] = None
    """The dense model."""
    compressed: IfSet[Latency] = None
    """The compressed model."""

    @property
    def batch_size(self) -> int | None:
        """Samples a batch; None where neither model was timed."""
        timed = self.compressed or self.dense
        return None if timed is None else timed.batch_size

    @property
    def ratio(self) -> float | None:
        """Median time of the compressed model, as a fraction of the dense model's; None without both."""
        if self.dense is None or self.compressed is None or not self.dense.median or not self.compressed.median:
            return None
        return self.compressed.median / self.dense.median


@final
@dataclass(frozen=True, kw_only=True)
class LatencyTarget:
    """A time that was asked for, and the shortest passes of both models in turn, in seconds a batch."""

    asked: float
    """Requested time."""
    dense: float
    """Time of the dense model."""
    compressed: float
    """Time of the compressed model."""
    runtime: str
    """Runtime, its version and its type."""
    batch_size: int
    """Samples per batch."""
    threads: int
    """Threads on the CPU."""
    levers: tuple[str, ...]
    """By what the model got faster: ``integers``, ``merged tokens``, ``ranks``, ``narrower layers``."""


@final
@dataclass(frozen=True)
class LatencyRecord(Timings):
    """The times at the first batch size, and at others."""

    others: IfSet[tuple[Timings, ...]] = None
    """The times at the other batch sizes."""

    @property
    def by_batch_size(self) -> tuple[Timings, ...]:
        """One entry for each batch size."""
        return self, *(self.others or ())
