"""How much work goes into which part of a job: the one place that says what fast and thorough mean."""

from dataclasses import dataclass

from vitshrink.compression.repairs.rescaling import STEPS
from vitshrink.config.options import CompressConfig
from vitshrink.statistics.effects import MEASURED_SAMPLES


@dataclass(frozen=True)
class Repairs:
    """What a compressed model's repairs are fitted with."""

    samples: int | None = None
    """The first so many; all if it is None."""
    rescaled: int | None = None
    """Of them, for gains and biases; all if it is None."""
    steps: int = STEPS
    """Gauss-Newton steps on gains and biases."""


@dataclass(frozen=True)
class Effort:
    """Rounds and samples.

    Attributes:
        rounds: how often the curvature is estimated again on the compressed model; as the job says if it is None.
        light: what a compressed model may lose before its repairs, as a share of what a constant answer would, for the
            curvature not to be estimated again on it.
        weighed: samples that tell whether it loses so little.
        measured: samples on which the effects of components are measured: how much each counts, not what it is.
        repairs: of cuts that are not light.
        light_repairs: of those that are, with the samples on which components were measured, where tokens have weights.
        allocation: how ranks are distributed instead of by measured effects; as the method says if it is None.
        compensation: instead of repairs that end with gains and biases; as the method says if it is None.
    """

    rounds: int | None = None
    light: float = 0.1
    weighed: int = 64
    measured: int = MEASURED_SAMPLES
    repairs: Repairs = Repairs()
    light_repairs: Repairs = Repairs(samples=MEASURED_SAMPLES, rescaled=64, steps=1)
    allocation: str | None = None
    compensation: str | None = None


FAST = Effort(rounds=0, allocation="loss", compensation="bias")
DEFAULT = Effort()
THOROUGH = Effort(rounds=4, light=0.0, measured=256, repairs=Repairs(steps=3))


def effort_of(config: CompressConfig) -> Effort:
    """What a job asks for."""
    if config.fast:
        return FAST
    return THOROUGH if config.thorough else DEFAULT
