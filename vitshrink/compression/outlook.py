"""The stages of a job that makes models of given sizes, and how long they take beside each other, before any has run.

Work is counted in floating-point operations of a pass in the arithmetic of the job. Other work is slower, and counts
more: by factors that were measured on ViT shapes, of which the job replaces what it can by the pace of its own stages.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Self

from transformers import PreTrainedModel

from vitshrink.compression.choices import Choices
from vitshrink.compression.effort import Effort, effort_of
from vitshrink.compression.estimation import SHARES_MEASURED_AGAIN
from vitshrink.compression.fitting import ATTEMPTS
from vitshrink.compression.repairs.bias import RESCALING
from vitshrink.compression.repairs.rescaling import forward_passes
from vitshrink.compression.repairs.stream import WRITERS
from vitshrink.data.opening import CalibrationData
from vitshrink.methods import LayerMethod
from vitshrink.models import cost
from vitshrink.models.duals import towers_of
from vitshrink.models.example import example_inputs
from vitshrink.models.readings import reading_of
from vitshrink.models.targets import Target
from vitshrink.runtime.forecast import Ahead

PASSES, ALGEBRA, FILES = "passes", "algebra", "files"

CALIBRATING, MEASURING, WALKING, FORWARD, EXACT = 2.6, 3.0, 2.9, 0.6, 1.7
"""What as many samples take: with gradients and sums, with effects of components, in a walk through the blocks of both
models, and in a forward pass alone; and how many times as much it is in float32."""

DECOMPOSING, INVERTING, SOLVING, PIVOTING = 70.0, 2.5, 14.0, 20.0
"""Operations of a pass in the time of one that decomposes, inverts, solves, or chooses pivots."""

ROUNDING, ENCODING, SAVING = 20_000.0, 14_000.0, 2_300.0
"""Operations of a pass for a number that is rounded once, one that is saved as an integer, and one that is as it is."""

USUALLY_LIGHT = 0.6
"""Share of the parameters down to which the cuts of most models are light; what a model loses is measured later."""

SHOWN = 34.0
"""Forward passes of one sample that measure the cost of a model."""


@dataclass(frozen=True, eq=False)
class Outlook:
    """What a job will do.

    Attributes:
        weights: numbers of the whole model.
        samples: to calibrate on.
        sizes: how many models it makes.
        evaluated: samples on which they are measured in the end.
        forward: operations of a forward pass of one sample.
        walks: how often the samples are read for what the first stage learns of them.
    """

    choices: Choices
    targets: Sequence[Target]
    weights: int
    samples: int
    sizes: int
    evaluated: int
    forward: float
    walks: int = 1

    @classmethod
    def of(
        cls,
        choices: Choices,
        dense: PreTrainedModel,
        targets: Sequence[Target],
        calibration: CalibrationData,
        sizes: int,
        evaluated: int,
    ) -> Self:
        """From the model and its samples, of which texts are as long as they are."""
        inputs, samples = example_inputs(dense), len(calibration.samples)
        forward = 2.0 * cost.macs(dense, inputs)
        if towers_of(dense.base_model):  # of which one reads a sample
            forward /= 2
        elif "input_ids" in inputs:
            read = sum(batch.inputs["input_ids"].numel() for batch in calibration.batches)
            forward *= read / samples / inputs["input_ids"].numel()
        walks = reading_of(dense).probes if choices.config.stores == "bits" else 1
        return cls(choices, targets, cost.parameters(dense), samples, sizes, evaluated, forward, walks)

    def stages(self) -> list[Ahead]:
        """In their order; none, where the job does what nobody can foresee."""
        config = self.choices.config
        if not config.sized or config.finetune is not None or config.merges or config.stores not in ("bits", "rank"):
            return []
        if not isinstance(self.choices.method, LayerMethod) or config.dry_run:
            return []
        found = [self._passes("calibrate", CALIBRATING, self.walks * self.samples), *self._factorized()]
        for number in range(self.sizes):
            found += self._rounded() if config.stores == "bits" else self._ranked(light=self._is_light(number))
            found.append(Ahead("save", FILES, (ENCODING if config.stores == "bits" else SAVING) * self.weights))
        if self.evaluated:
            found.append(self._passes("evaluate", EXACT * FORWARD * (1 + self.sizes), self.evaluated))
        return [*found, *[Ahead("cost", PASSES, EXACT * SHOWN * self.forward)] * self.sizes]

    def _passes(self, key: str, passes: float, samples: int, steps: int | None = None) -> Ahead:
        """Forward passes over so many samples."""
        return Ahead(key, PASSES, passes * samples * self.forward, samples if steps is None else steps)

    def _factorized(self) -> Iterator[Ahead]:
        if self.choices.config.stores == "bits":
            yield Ahead("factorize", ALGEBRA, INVERTING * sum(each.shape[1] ** 3 for each in self.targets))
            return
        work = DECOMPOSING * sum(min(each.shape) ** 3 for each in self.targets)
        yield Ahead("factorize", ALGEBRA, work, len(self.targets))
        if self.choices.allocation == "measured":
            yield self._passes("measure", MEASURING, min(self.samples, self._effort.measured))

    def _rounded(self) -> Iterator[Ahead]:
        yield Ahead("round", ALGEBRA, ATTEMPTS / 2 * ROUNDING * sum(prod(each.shape) for each in self.targets))

    def _is_light(self, number: int) -> bool:
        """Whether a size is probably not refined."""
        keep = self.choices.config.keep or ()
        return self._effort.light > 0 and (number >= len(keep) or keep[number] >= USUALLY_LIGHT)

    def _ranked(self, *, light: bool) -> Iterator[Ahead]:
        """What follows for each size."""
        choices, effort = self.choices, self._effort
        measured = min(self.samples, effort.measured)
        rounds = 0 if light else choices.rounds
        repairs = effort.light_repairs if light and choices.rounds else effort.repairs
        repaired = min(self.samples, repairs.samples or self.samples)
        if light and choices.rounds:
            yield self._passes("weigh", FORWARD, 2 * min(self.samples, effort.weighed), 0)
        for _ in range(rounds):
            yield self._passes("calibrate", CALIBRATING, self.samples)
            factorize, *measure = self._factorized()
            yield from (*measure, factorize)
            tried = len(SHARES_MEASURED_AGAIN)
            yield self._passes("choose", FORWARD * (1 + tried), measured, tried)
        if choices.compensation == "stream":
            yield self._stream(repaired, weighs=not (light and choices.rounds))
        if choices.compensation in RESCALING:
            passes = forward_passes(min(repaired, repairs.rescaled or repaired), repairs.steps)
            yield Ahead("compensate", PASSES, FORWARD * passes * self.forward, passes)
        if choices.storage == "gauge":
            work = PIVOTING * sum(min(each.shape) ** 2 * max(each.shape) for each in self.targets)
            yield Ahead("gauge", ALGEBRA, work)

    def _stream(self, samples: int, *, weighs: bool) -> Ahead:
        """Tokens get their weights, and hidden states walk through both models; then ridges are tried."""
        layers = [each for each in self.targets if each.role in WRITERS]
        walked = (WALKING + (MEASURING if weighs else 0)) * samples * self.forward
        solved = (4 * SOLVING + DECOMPOSING) * sum(min(each.shape) ** 3 for each in layers)
        return Ahead("stream", PASSES, walked + solved, len(layers))

    @property
    def _effort(self) -> Effort:
        return effort_of(self.choices.config)
