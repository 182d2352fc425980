"""How much work goes into which part of a job: the one place that says what fast and thorough mean."""

from dataclasses import dataclass

from vitshrink.compression.repairs.rescaling import STEPS
from vitshrink.config.options import CompressConfig
from vitshrink.statistics.effects import MEASURED_SAMPLES


@dataclass(frozen=True)
class Part:
    """Of the samples of a job, those that a step looks at: a share of them, but so many at least."""

    share: float
    least: int = 0

    def of(self, samples: int) -> int:
        """Out of so many."""
        return min(samples, max(self.least, round(self.share * samples)))


ALL = Part(1.0)


@dataclass(frozen=True)
class Effort:
    """Rounds and samples.

    Attributes:
        rounds: how often the curvature is estimated again on the compressed model; as the job says if it is None.
        measured: samples on which the effects of components are measured: how much each counts, not what it is.
        again: those of compressed models; H of the dense model, of all samples, has half of the weight in theirs.
        repaired: those that repairs are fitted to.
        steps: Gauss-Newton steps on gains and biases.
        allocation: how ranks are distributed instead of by measured effects; as the method says if it is None.
        compensation: instead of repairs that end with gains and biases; as the method says if it is None.
    """

    rounds: int | None = None
    measured: int = MEASURED_SAMPLES
    again: Part = ALL
    repaired: Part = ALL
    steps: int = STEPS
    allocation: str | None = None
    compensation: str | None = None


FAST = Effort(rounds=0, allocation="loss", compensation="bias")
DEFAULT = Effort()
THOROUGH = Effort(rounds=4, measured=256, steps=3)


def effort_of(config: CompressConfig) -> Effort:
    """What a job asks for."""
    if config.fast:
        return FAST
    return THOROUGH if config.thorough else DEFAULT
