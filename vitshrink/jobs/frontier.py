"""``vitshrink frontier``: what sizes of a model lose, from one calibration."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from transformers import PreTrainedModel

from vitshrink._version import __version__
from vitshrink.compression.choices import Choices
from vitshrink.compression.compressor import Compressor
from vitshrink.compression.findings import Findings
from vitshrink.compression.fitting import file_bytes
from vitshrink.compression.shrinking import smaller
from vitshrink.compression.sizes import Size
from vitshrink.compression.survey import Prospect, prospects
from vitshrink.config.frontier import FrontierJob
from vitshrink.data import Preprocessor, SampleSet
from vitshrink.data.opening import CalibrationData
from vitshrink.errors import TargetError
from vitshrink.evaluation.quality import Fidelity
from vitshrink.jobs.inputs import calibration_of, held_out_of
from vitshrink.jobs.session import Session, Settings
from vitshrink.models import cost
from vitshrink.models.loading import moved
from vitshrink.models.publication import check_writable
from vitshrink.models.targets import find_targets
from vitshrink.models.tasks import head_of
from vitshrink.models.views import rounded
from vitshrink.report.frontier import RULE, Frontier, Point, knee_of
from vitshrink.report.frontier_page import write_frontier
from vitshrink.runtime import processes
from vitshrink.runtime.observer import Job, Observer, Silent

ANY_SIZE = "1MB"
"""Of the job that all sizes share, of which nothing reads the size itself: plans are made for budgets."""


@dataclass(frozen=True, eq=False)
class Survey:
    """What was found, and the page that it was written to, where that was asked for."""

    frontier: Frontier
    page: Path | None


def survey(config: FrontierJob, observer: Observer | None = None) -> Survey:
    """Predict the loss of many sizes, and measure some of them and the knee. Models are built in memory only.

    If a launcher started several processes, they share the work, and the first one writes.

    Raises:
        UsageError: options that are wrong.
        OutputError: an output directory that cannot be written; before any work.
        CheckpointError, DataError, NumericsError: as ``compress``.
        TargetError: nothing in the model can be made smaller.
    """
    check_writable(config.output, "--output")
    work = _Work.open(config, Job(observer or Silent()))
    frontier = work.frontier()
    page = None
    if config.output is not None and processes.is_main():
        with work.job.stage("write", "Writing the page"):
            page = write_frontier(frontier, Path(config.output))
    return Survey(frontier, page)


@dataclass(frozen=True, eq=False)
class _Built:
    """One size, in memory."""

    model: PreTrainedModel
    nbytes: int
    """Of its file of weights, at most."""


@dataclass(frozen=True, eq=False)
class _Work:
    """All that a survey needs, opened and read."""

    config: FrontierJob
    job: Job
    session: Session
    choices: Choices
    compressor: Compressor
    dtype: torch.dtype
    """Of what is stored as floating point."""
    preprocessor: Preprocessor
    calibration: CalibrationData
    held_out: SampleSet | None

    @classmethod
    def open(cls, config: FrontierJob, job: Job) -> Self:
        task = config.at(ANY_SIZE)
        choices = Choices.of(task)
        session = Session.open(task.model, Settings.of(task), job, allow_compressed=False)
        dense, dtype = moved(session.source.model, session.device), session.dtype(task.stored_dtype)
        targets = find_targets(dense, layers=task.layers, include=task.include, exclude=task.exclude)
        with processes.together():
            assert task.calibration_data is not None  # which the config has checked
            samples, preprocessor = session.samples(task.calibration_data), session.preprocessor()
            calibration = calibration_of(task, samples, preprocessor, session)
            held_out = held_out_of(task, samples, job, calibrated=True) if config.measured else None
        session.require_same(config.common(), calibration=calibration.batches, evaluation=held_out)
        compressor = choices.compressor(dense, targets, dtype, calibration)
        return cls(config, job, session, choices, compressor, dtype, preprocessor, calibration, held_out)

    def frontier(self) -> Frontier:
        findings = self.compressor.learn(self.job)
        with self.job.stage("plan", "Predicting the loss of each size"):
            found = list(prospects(self.compressor, findings, self.config.points, self.dtype))
        knee = knee_of([each.room for each in found], [each.loss for each in found])
        built: dict[int, _Built | None] = {}
        if self.held_out is not None:
            chosen = _spread(len(found), self.config.measured) | (set() if knee is None else {knee})
            built = {number: self._built(findings, found[number]) for number in sorted(chosen)}
        fidelities = self._fidelities([each.model for each in built.values() if each is not None])
        measured = dict(zip((number for number, each in built.items() if each is not None), fidelities, strict=True))
        points = [
            self._point(each, knee=number == knee, built=built.get(number), fidelity=measured.get(number))
            for number, each in enumerate(found)
            if number in measured or number not in built  # what cannot be built is not offered
        ]
        return self._record(points)

    def _built(self, findings: Findings, size: Prospect) -> _Built | None:
        """As ``compress`` builds it; None, with a warning, where its integers take more than was predicted."""
        named = Size(size.target_size, size.budget)
        try:
            found = smaller(self.compressor, lambda: findings, named, self.choices.rounds, self.job)
        except TargetError as error:
            self.job.warn(f"{size.target_size} is skipped: {error}")
            return None
        assert found.model is not None
        return _Built(rounded(found.model, self.dtype), file_bytes(found.model, self.compressor))

    def _fidelities(self, models: Sequence[PreTrainedModel]) -> list[Fidelity]:
        """Of each, on what is held out."""
        if not models or self.held_out is None:
            return []
        measured = self.session.measure_each(
            models, self.held_out, self.preprocessor, against=self.session.source, labeled=False
        )
        found = [each.evaluation.fidelity for each in measured]
        return [each for each in found if each is not None]

    def _point(self, size: Prospect, *, knee: bool, built: _Built | None, fidelity: Fidelity | None) -> Point:
        return Point(
            size.target_size,
            size.room,
            8 * size.room / cost.parameters(self.compressor.dense),
            size.loss,
            self.config.at(size.target_size).command(),
            knee,
            None if built is None else built.nbytes,
            fidelity,
        )

    def _record(self, points: Collection[Point]) -> Frontier:
        config, source = self.config, self.session.source
        return Frontier(
            vitshrink=__version__,
            model=config.model,
            calibration=str(config.calibration),
            samples=len(self.calibration.samples),
            holdout=0 if self.held_out is None else len(self.held_out),
            seed=config.seed,
            forms=self.compressor.config.stores,
            measure=head_of(self.compressor.dense).measure,
            parameters=cost.parameters(self.compressor.dense),
            source_bytes=source.source.nbytes,
            points=tuple(points),
            rule=RULE,
            timings=dict(self.job.timings),
            warnings=tuple(self.job.warnings),
        )


def _spread(count: int, wanted: int) -> set[int]:
    """``wanted`` numbers below ``count``, from the first to the last; the middle one, where one is wanted."""
    if wanted == 1:
        return {count // 2}
    return {round(number * (count - 1) / (wanted - 1)) for number in range(wanted)}
