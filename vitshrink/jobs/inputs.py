"""The samples of a job that compresses: to calibrate on, held out, to train on, to evaluate on."""

from dataclasses import dataclass
from functools import partial
from typing import Self

from vitshrink.compression.search import Bound
from vitshrink.compression.shrinking import Shrinking
from vitshrink.config.options import CompressConfig
from vitshrink.data import Preprocessor, SampleSet
from vitshrink.data.opening import CalibrationData, hold_out, read_calibration
from vitshrink.jobs.session import Session
from vitshrink.models.tasks import task_of
from vitshrink.recovery import Material, check, check_tokens, held_out_count, open_material
from vitshrink.runtime.observer import Job
from vitshrink.statistics.recomputing import batch_that_fits


@dataclass(frozen=True, eq=False)
class Inputs:
    """All samples of a job, and how they are read."""

    preprocessor: Preprocessor | None = None
    calibration: CalibrationData | None = None
    held_out: SampleSet | None = None
    evaluation: SampleSet | None = None
    material: Material | None = None
    """To train on."""

    @classmethod
    def open(cls, config: CompressConfig, session: Session, shrinking: Shrinking) -> Self:
        """What is asked for, or needed."""
        if config.calibration_data is None and config.eval_data is None:
            session.job.warn("the result is not evaluated: pass --eval or --calibration.")
            if config.resolution is None and config.finetune_data is None:
                return cls()
        preprocessor = session.preprocessor()
        calibrated = shrinking.choices.calibrated or trains_on_calibration(config)
        calibration, held_out = None, None
        if config.calibration_data is not None:
            unlabeled = session.samples(config.calibration_data)
            calibration = calibration_of(config, unlabeled, preprocessor, session) if calibrated else None
            if Bound.of(config) is not None or (config.eval_data is None and not config.dry_run):
                held_out = held_out_of(config, unlabeled, session.job, calibrated=calibrated)
        evaluation = held_out
        if config.eval_data is not None:
            evaluation = None if config.dry_run else session.evaluation_samples(config.eval_data, config.eval_limit)
            if calibration is not None:
                session.warn_of_overlap(calibration.chosen, evaluation, "were also calibrated on")
        material = _material(config, session, shrinking, calibration, evaluation)
        return cls(preprocessor, calibration, held_out, evaluation, material)


def trains_on_calibration(config: CompressConfig) -> bool:
    """Whether what is calibrated on is trained on as well."""
    return config.finetune is not None and config.finetune.data is None


def calibration_of(
    config: CompressConfig, samples: SampleSet, preprocessor: Preprocessor, session: Session
) -> CalibrationData:
    """Those of the samples that are calibrated on, read. Raises DataError."""
    return read_calibration(
        samples,
        preprocessor,
        session.job,
        samples=config.samples,
        seed=config.seed,
        batch_size=config.batch_size or batch_that_fits(session.source.model),
        max_bad_samples=config.max_bad_samples,
        workers=config.workers,
        unread=partial(_kept_for_recovery, config),
    )


def held_out_of(config: CompressConfig, samples: SampleSet, job: Job, *, calibrated: bool) -> SampleSet | None:
    """Those that are held out of them; None, with a warning, where none is left."""
    return hold_out(
        samples,
        job,
        samples=config.samples,
        calibrated=calibrated,
        holdout=config.holdout,
        seed=config.seed,
    )


def _kept_for_recovery(config: CompressConfig, samples: int) -> int:
    """How many of so many samples compression does not read, since they will judge the training that follows."""
    if config.finetune is None or not trains_on_calibration(config):
        return 0
    return held_out_count(samples, config.finetune.validation, str(config.calibration))


def _material(
    config: CompressConfig,
    session: Session,
    shrinking: Shrinking,
    calibration: CalibrationData | None,
    evaluation: SampleSet | None,
) -> Material | None:
    """What to train on, where that is asked for."""
    if config.finetune is None or config.dry_run:
        return None
    material = open_material(
        config.finetune,
        config.finetune_data,
        session.source,
        calibration,
        job=session.job,
        class_map=session.settings.class_map,
        seed=config.seed,
        offline=config.offline,
    )
    check(shrinking.base, config.finetune, dense=True, labeled=material.label_of is not None)
    check_tokens(config.finetune, task_of(shrinking.base), "merged" if shrinking.merges else None)
    if config.finetune.data:
        session.warn_of_overlap(material.samples, evaluation, "are also trained on")
    return material
