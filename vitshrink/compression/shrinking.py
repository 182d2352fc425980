"""A job on a model in memory, to which loading, saving and measuring are added elsewhere: one smaller model a size."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Self

import torch
from transformers import PreTrainedModel

from vitshrink.compression.calibrated import rounded
from vitshrink.compression.candidates import Offer, Plan
from vitshrink.compression.choices import Choices
from vitshrink.compression.compressor import Compressor
from vitshrink.compression.course import Course
from vitshrink.compression.estimation import DENSE
from vitshrink.compression.findings import Findings
from vitshrink.compression.fitting import fitted, told
from vitshrink.compression.merging import Trials, kept_within, measured_curves, require_reachable
from vitshrink.compression.pace import Pace, Paced, mergeable
from vitshrink.compression.quantization import Quantization
from vitshrink.compression.repairs.bias import RESCALING
from vitshrink.compression.repairs.merging import shift_merged
from vitshrink.compression.scales import on_one_scale
from vitshrink.compression.search import Bound, Search
from vitshrink.compression.selection import choose_plan
from vitshrink.compression.sizes import Size, requested_sizes
from vitshrink.data import Preprocessor, SampleSet
from vitshrink.data.opening import CalibrationData
from vitshrink.models import cost
from vitshrink.models.families import family_of, passes_of, require_grid
from vitshrink.models.maps import approximate_maps, landmarks_of
from vitshrink.models.merged import Kept, merge_tokens, require_mergeable
from vitshrink.models.resolution import mix_tokens
from vitshrink.models.structures.landmarks import Landmarks
from vitshrink.models.structures.tokens import MixedTokens
from vitshrink.models.targets import Target, find_targets
from vitshrink.models.views import own, view_of
from vitshrink.runtime.observer import Job
from vitshrink.runtime.state import Progress
from vitshrink.statistics.reference import DenseOutputs


@dataclass(frozen=True, eq=False)
class Shrunk:
    """The outcome for one size."""

    findings: Findings
    plan: Plan
    model: PreTrainedModel | None
    """None after a dry run."""
    job: Job
    paced: Paced | None = None
    """What it takes, where a time was asked for."""


@dataclass(frozen=True, eq=False)
class Shrinking:
    """A dense model, and all that is to be done with it."""

    choices: Choices
    dense: PreTrainedModel
    base: PreTrainedModel
    """The dense model, with the tokens that the smaller ones will read."""
    targets: Sequence[Target]
    offers: Sequence[Offer]
    """What there is to choose, of which only the costs are told; nothing, where only the tokens change."""
    dtype: torch.dtype
    """Of the weights that will be stored."""
    bound: Bound | None
    sizes: Sequence[Size]
    landmarks: Landmarks | None

    @classmethod
    def of(cls, choices: Choices, dense: PreTrainedModel, dtype: torch.dtype) -> Self:
        """Raises UsageError and TargetError for what this model cannot become, before any work."""
        config = choices.config
        base = dense
        if config.tokens == "mixed" and config.token_budget is not None:
            base = view_of(dense)
            mix_tokens(base, MixedTokens(config.token_budget, config.token_levels, config.token_scorer))
        if config.token_operations is not None:
            require_reachable(dense, config.token_operations)
        landmarks = None
        if config.landmarks is not None:
            landmarks = landmarks_of(dense, config.landmarks, config.landmark_form)
        targets = find_targets(
            base, layers=config.layers, include=config.include, exclude=config.exclude, outside=config.stores == "bits"
        )
        bound = Bound.of(config)
        if bound is not None:
            bound.require(dense)
        offers: Sequence[Offer] = ()
        sizes = [Size("", cost.parameters(dense))]
        if config.target_latency is not None:
            if family_of(dense).modality == "image":
                require_grid(dense, "--target-latency")
            if config.tokens == "merge":
                require_mergeable(dense)
            else:
                offers = choices.compressor(base, targets, dtype).offers()
        elif config.sized:
            compressor = choices.compressor(base, targets, dtype)
            offers = compressor.sites
            if config.rank is not None:
                choose_plan(config, offers, 0, compressor.allocation)  # raises where nothing gets smaller
            sizes = requested_sizes(compressor, dtype)
        return cls(choices, dense, base, targets, offers, dtype, bound, sizes, landmarks)

    @property
    def merges(self) -> bool:
        """Whether tokens may be merged."""
        config = self.choices.config
        return config.merges and (config.target_latency is None or mergeable(self.dense, required=False))

    @property
    def allocated_by(self) -> str:
        """What the ranks go by, as a report says it."""
        config = self.choices.config
        if not config.sized:
            return "none"
        if config.explained_variance is not None:
            return "explained variance"
        return self.choices.allocation if config.rank is None else "fixed rank"

    def run(
        self,
        calibration: CalibrationData | None,
        held_out: SampleSet | None,
        preprocessor: Preprocessor | None,
        job: Job,
        progress: Progress | None = None,
    ) -> Iterator[Shrunk]:
        """One smaller model after the other, all from one calibration; the dense model is not changed.

        What an interrupted run has left in ``progress`` is not computed again.

        Raises:
            NumericsError: no layer can be factorized.
            DataError: nothing is held out, and the size depends on it.
            GateError: no size keeps within the bound.
        """
        config = self.choices.config
        if config.target_latency is not None:
            yield self._in_time(calibration, job.branch(), progress)
            return
        finished = partial(self._finished, cache(partial(self._kept, calibration, job)), calibration)
        if not config.sized:
            nothing = Findings({}, {}, {})
            model = None if config.dry_run else finished(own(view_of(self.base)), job)
            yield Shrunk(nothing, {}, model, job.branch())
            return
        compressor = self.choices.compressor(self.base, self.targets, self.dtype, calibration, progress)
        search = None
        if self.bound is not None:
            quantization = Quantization.of(config, self.dtype)
            search = Search.on(held_out, preprocessor, compressor, self.bound, self.dtype, job, quantization)
        first = cache(partial(compressor.learn, job))
        refine = self.choices.rounds
        if refine and config.dry_run:
            job.warn("a dry run does not refine: the ranks of the real job may differ a little.")
            refine = 0
        if search is not None or not _overtaken(compressor, self.sizes[-1], refine):
            first()
        for size in self.sizes:
            branch = job.branch()
            if search is not None:
                found = search.smallest(first(), refine, branch)
                assert found.model is not None
                plan = told(found.plan, found.model, self.dtype)
                yield Shrunk(found.findings, plan, found.model, branch)
                continue
            small = smaller(compressor, first, size, refine, branch, last=size is self.sizes[-1])
            yield small if small.model is None else replace(small, model=finished(small.model, branch))

    def _in_time(self, calibration: CalibrationData | None, job: Job, progress: Progress | None) -> Shrunk:
        """The model of a budget of time, with what the clock says of it."""
        choices, dense = self.choices, self.dense
        pace = Pace.of(choices.config, dense, self.targets, choices.storage, job)
        compressors = partial(choices.compressor, self.base, self.targets, self.dtype, calibration, progress)
        course = Course(pace, self.base, self.offers, compressors, pivots=choices.storage == "gauge")
        course.require_reachable()
        nothing = Findings({}, {}, {})
        first = cache(partial(compressors().learn, job) if self.offers else lambda: nothing)
        trials = None if calibration is None else Trials.on(dense, calibration.batches)
        learned = cache(lambda: (first(), course.mixture(first(), trials, job)))
        if choices.config.dry_run:
            planned = course.plan(learned, pace.budget)
            return Shrunk(nothing if planned.spare else first(), planned.plan, None, job)
        best = course.best(learned, job)
        planned = best.planned
        findings = nothing if planned.spare else first()
        shrunk = Shrunk(findings, planned.plan, own(view_of(self.base)), job)
        if best.ranked:
            aim = Size("", planned.aim)
            shrunk = smaller(planned.compressor, first, aim, choices.rounds, job, last=True, timed=True)
        assert shrunk.model is not None
        model = self._merged(planned.kept, calibration, shrunk.model, job)
        if pace.integers:
            assert calibration is not None
            device, seed = next(dense.parameters()).device, choices.config.seed
            model = rounded(model, calibration, job, dtype=self.dtype, device=device, seed=seed)
        return replace(shrunk, model=model, paced=course.finished(best, model, shrunk.plan, job))

    def _finished(
        self, kept: Callable[[], Kept | None], calibration: CalibrationData | None, model: PreTrainedModel, job: Job
    ) -> PreTrainedModel:
        """With landmarks or merged tokens, where they are asked for.

        The last step: weights are fitted to the exact maps of all tokens.
        """
        if self.landmarks is not None:
            approximate_maps(model, self.landmarks)
        return self._merged(kept(), calibration, model, job)

    def _merged(
        self, kept: Kept | None, calibration: CalibrationData | None, model: PreTrainedModel, job: Job
    ) -> PreTrainedModel:
        """The model itself, whose blocks keep so many tokens, and whose biases make up for that."""
        if kept is not None:
            merge_tokens(model, kept)
            if self.choices.compensation in RESCALING and calibration is not None:
                seed = self.choices.config.seed + 6
                shift_merged(model, self._dense_outputs, calibration.batches, job, seed=seed)
        return model

    @cached_property
    def _dense_outputs(self) -> DenseOutputs:
        """What models of all sizes that merge tokens are fitted to."""
        return DenseOutputs(self.dense, passes_of(self.dense, self.choices.config.precision))

    def _kept(self, calibration: CalibrationData | None, job: Job) -> Kept | None:
        """How many tokens each block keeps, where they are merged: measured on the dense model, for all sizes."""
        fraction = self.choices.config.token_operations
        if fraction is None or calibration is None:
            return None
        return kept_within(self.dense, measured_curves(Trials.on(self.dense, calibration.batches), job), fraction)


def smaller(
    compressor: Compressor,
    first: Callable[[], Findings],
    size: Size,
    rounds: int,
    job: Job,
    *,
    last: bool = False,
    timed: bool = False,
) -> Shrunk:
    """The model of one size, from the findings of the dense model, ``first``, refined for it ``rounds`` times.

    A plan that was ``timed`` is not compared with plans of other kinds of forms, which would take another time.
    """
    config = compressor.config
    scaled = first if timed else cache(lambda: on_one_scale(compressor, first(), size.budget, job))
    findings = _refined(compressor, scaled, size, rounds, job, last=last)
    if config.stores == "bits" and not config.dry_run:
        return Shrunk(findings, *fitted(compressor, findings, size.budget, job), job)
    plan = compressor.plan(findings, size.budget)
    return Shrunk(findings, plan, None if config.dry_run else compressor.build(findings, plan, job), job)


def _refined(
    compressor: Compressor, first: Callable[[], Findings], size: Size, rounds: int, job: Job, *, last: bool
) -> Findings:
    """The findings after some rounds of refinement, from the last of them that an interrupted run has kept.

    Those of the dense model, ``first``, are forgotten once the ``last`` size was refined.
    """
    refiner = compressor.refiner
    if not rounds or refiner is None:
        return first()
    step = _step(size, rounds)
    kept = refiner.resume(step, job)
    if kept is not None:
        return kept
    before = _refined(compressor, first, size, rounds - 1, job, last=last)
    if before.light:
        return before
    findings = compressor.refine(before, compressor.plan(before, size.budget), job, step)
    if not findings.light and (rounds > 1 or last):
        refiner.forget(_step(size, rounds - 1) if rounds > 1 else DENSE)
    return findings


def _overtaken(compressor: Compressor, last: Size, rounds: int) -> bool:
    """Whether an interrupted run has come so far that what follows from the dense model is of no more use."""
    refiner = compressor.refiner
    return refiner is not None and any(refiner.kept(_step(last, number)) for number in range(1, rounds + 1))


def _step(size: Size, rounds: int) -> str:
    return f"{size.label or 'size'}-{rounds}"
