"""What sizes of a model lose: predictions, measurements and the knee, as a record and as rows of a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from vitshrink.evaluation.quality import Fidelity, Interval
from vitshrink.report.wording import UNKNOWN, percent, size
from vitshrink.runtime.records import IfSet, plain

RULE = (
    "the predicted point with the largest distance below the straight line from the first to the last point, "
    "with bytes and log loss scaled to one"
)
"""Which size is called the knee."""


@final
@dataclass(frozen=True)
class Point:
    """One size."""

    target_size: str
    """As ``--target-size`` takes it."""
    target_bytes: int
    """The same in bytes: what the file of weights may take."""
    bits: float
    """Of the file, for each of the model's numbers."""
    predicted: float
    """What the choices of the plan lose together: nats or, of scores and features, their squared error."""
    command: str
    """The command line that builds the model."""
    knee: bool = False
    """Whether it is the size beyond which bytes buy less."""
    bytes: IfSet[int] = None
    """What the file of weights takes, at most; only where the model was built."""
    fidelity: IfSet[Fidelity] = None
    """How alike the built and the dense model are on held-out samples."""


@final
@dataclass(frozen=True)
class Frontier:
    """Loss against bytes."""

    vitshrink: str
    """Version."""
    model: str
    """As the user named it."""
    calibration: str
    """Likewise."""
    samples: int
    """Calibrated on."""
    holdout: int
    """Measured on."""
    seed: int
    """Of the choice of both."""
    forms: str
    """What layers became: ``bits``, ``rank``, ``narrow`` or ``rank+narrow``."""
    measure: str
    """The entry of ``fidelity`` that is the loss: ``kl``, in nats, or ``relative_error``."""
    parameters: int
    """Numbers of the dense model."""
    source_bytes: int
    """Of its weight files."""
    points: tuple[Point, ...]
    """From small to large."""
    rule: str
    """Which of them is the knee."""
    timings: dict[str, float]
    """Seconds."""
    warnings: tuple[str, ...]
    """What a reader should know."""

    @property
    def built(self) -> Sequence[Point]:
        """The points with a model; all, where none was built."""
        return [point for point in self.points if point.bytes is not None] or self.points

    @property
    def loss_name(self) -> str:
        """Heading of what was measured."""
        return "KL" if self.measure == "kl" else "relative error"

    @property
    def predicted_name(self) -> str:
        """Heading of what was predicted, which for scores and features is no share of their spread."""
        return f"predicted {'KL' if self.measure == 'kl' else 'squared error'}"

    @property
    def remarks(self) -> str:
        """What the figures rest on, and which size is the knee."""
        knee = next((point.target_size for point in self.points if point.knee), None)
        found = f"knee: {knee}, {self.rule}" if knee else f"no knee ({self.rule})"
        held_out = f"measured on {self.holdout} held-out samples" if self.holdout else "not measured"
        return f"{held_out}; {found}"

    def loss(self, point: Point) -> float | None:
        """What was measured at a point."""
        loss: float | None = getattr(point.fidelity, self.measure, None)
        return loss

    def interval(self, point: Point) -> Interval | None:
        """Of that, at 95 %."""
        found: Interval | None = getattr(point.fidelity, f"{self.measure}_interval", None)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        entries: dict[str, Any] = plain(self)
        return entries


def knee_of(sizes: Sequence[float], losses: Sequence[float]) -> int | None:
    """Number of the point that ``RULE`` names; None where no point is below the line."""
    if len(sizes) < 3 or min(losses) <= 0:
        return None
    logs = [math.log(loss) for loss in losses]
    width, height = sizes[-1] - sizes[0], logs[0] - logs[-1]
    if width <= 0 or height <= 0:
        return None
    # the line falls from 1 to 0, so that the distance from it goes with what is missing to 1
    below = [1 - (x - sizes[0]) / width - (y - logs[-1]) / height for x, y in zip(sizes, logs, strict=True)]
    best = max(range(len(below)), key=below.__getitem__)
    return best if below[best] > 1e-9 else None


def headings(frontier: Frontier) -> list[str]:
    """Of the columns of ``rows``."""
    columns = ["size", "of the source", "bits a weight", frontier.predicted_name, frontier.loss_name, "95 %"]
    agreed = any(point.fidelity is not None and point.fidelity.agreement is not None for point in frontier.points)
    return [*columns, *(["same prediction"] if agreed else []), ""]


def rows(frontier: Frontier) -> list[list[str]]:
    """The points that were built, as text."""
    agreed = "same prediction" in headings(frontier)
    found = []
    for point in frontier.built:
        bounds = frontier.interval(point)
        row = [
            size(point.target_bytes),
            percent(point.target_bytes / frontier.source_bytes),
            f"{point.bits:.2f}",
            _loss(point.predicted),
            _loss(frontier.loss(point)),
            UNKNOWN if bounds is None else f"{_loss(bounds.low)} to {_loss(bounds.high)}",
        ]
        if agreed:
            row.append(percent(None if point.fidelity is None else point.fidelity.agreement))
        found.append([*row, "knee" if point.knee else ""])
    return found


def _loss(value: float | None) -> str:
    """Two digits, whatever the power of ten."""
    if value is None:
        return UNKNOWN
    return f"{value:.2g}" if value == 0 or abs(value) >= 1e-5 else f"{value:.0e}"
