"""``vitshrink quantize``: a checkpoint, dense or compressed, with integer weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

from transformers import PreTrainedModel

from vitshrink._version import __version__
from vitshrink.compression.calibrated import rounded
from vitshrink.compression.quantization import quantized
from vitshrink.config.options import quantized_bits
from vitshrink.config.quantize import QuantizeJob
from vitshrink.data import Preprocessor, SampleSet
from vitshrink.data.opening import CalibrationData, hold_out, read_calibration
from vitshrink.errors import UsageError
from vitshrink.evaluation.quality import EvaluationRecord
from vitshrink.jobs.compress import compress
from vitshrink.jobs.description import calibrated_on, environment, latency_record, quantization_of
from vitshrink.jobs.result import CompressionResult, published, result_at, write_result
from vitshrink.jobs.session import Session, Settings
from vitshrink.models import cost
from vitshrink.models.example import example_inputs
from vitshrink.models.loading import LoadedModel, is_compressed, moved
from vitshrink.report import Report, before_after, write
from vitshrink.report.making import CalibrationRecord, QuantizationRecord
from vitshrink.runtime import processes
from vitshrink.runtime.observer import Job, Observer, Silent
from vitshrink.statistics.recomputing import batch_that_fits

LESS = (
    "the weights were rounded to nearest: with --calibration and a size, such as --bits 4, integers with the "
    "same number of bytes lose less."
)
"""What is said where calibration data were not given, nor declined."""


def quantize_checkpoint(config: QuantizeJob, observer: Observer | None = None) -> CompressionResult:
    """Write a model with integer weights, rounded with calibration data or to nearest, and verify it.

    Rounding to nearest also takes compressed models. It compares with ``baseline``, by default with the model itself.
    If a launcher started several processes, each measures its share of the samples. The weights are rounded on the
    CPU; ``device`` is used for the measurement.

    Raises:
        UsageError: a model that is already quantized, or options that are wrong.
        CheckpointError, DataError, OutputError: as ``compress``, whose other errors are possible, too.
    """
    if config.rounds == "curvature":
        (result,) = compress(config.compression(), observer)
        return result
    return _rounded(config, Job(observer or Silent()))


def _rounded(config: QuantizeJob, job: Job) -> CompressionResult:
    session = Session.open(config.model, Settings.of(config), job, baseline=config.baseline)
    session.source.companions.tell(job)
    if config.could_lose_less and not is_compressed(session.source.source):
        job.warn(LESS)
    if config.activations == "static" and session.source.task == "image-text":
        kind = type(session.source.model).__name__.removesuffix("Model")
        raise UsageError(
            f"--activations static is for one tower: save {kind}VisionModel or {kind}TextModel alone (from_pretrained, "
            "then save_pretrained), and quantize that."
        )
    dtype, data = session.dtype(config.dtype), _Data.open(config, session)
    read = None if data.calibration is None else data.calibration.batches
    session.require_same(config.common(), calibration=read, evaluation=data.evaluation)
    source = session.source
    needed = 2 * cost.parameters(source.model)
    with published(config.output, session, needed, overwrite=config.overwrite) as staging:
        made = None if data.calibration is None else _static(config, session, data.calibration)
        with job.stage("quantize", "Quantizing, saving and verifying"):
            # the source stays as it is: it may be the baseline
            written = write_result(
                made or source.model,
                staging,
                session,
                dtype=dtype,
                runs_in=session.runs_in(config.dtype),
                finish=None if made else _nearest(config, source),
                in_place=False,
            )
        dense = session.baseline or source
        moved(dense.model, session.device)
        evaluation = None
        if data.evaluation is not None and data.preprocessor is not None:
            (measurement,) = session.measure_each(
                [written.model], data.evaluation, data.preprocessor, against=dense, labeled=config.eval is not None
            )
            evaluation = measurement.record(data.preprocessor.description)
        report = _report(config, session, data, dense, written, evaluation)
        write(report, staging)
    return CompressionResult(result_at(config.output), report)


@dataclass(frozen=True, eq=False)
class _Data:
    """Samples to calibrate on, where that is done, and to measure on."""

    preprocessor: Preprocessor | None = None
    calibration: CalibrationData | None = None
    evaluation: SampleSet | None = None

    @classmethod
    def open(cls, config: QuantizeJob, session: Session) -> Self:
        """Before any work, so that what cannot be read stops it here."""
        if config.eval_data is None and config.calibration_data is None:
            return cls()
        with processes.together():
            preprocessor, evaluation, calibration = session.preprocessor(), None, None
            if config.eval_data is not None:
                evaluation = session.evaluation_samples(config.eval_data, config.eval_limit)
            if config.calibration_data is not None:
                samples = session.samples(config.calibration_data)
                calibration = read_calibration(
                    samples,
                    preprocessor,
                    session.job,
                    samples=config.samples,
                    seed=config.seed,
                    batch_size=config.batch_size or batch_that_fits(session.source.model),
                    max_bad_samples=config.max_bad_samples,
                    workers=config.workers,
                )
                if evaluation is None:
                    evaluation = hold_out(
                        samples,
                        session.job,
                        samples=config.samples,
                        calibrated=True,
                        holdout=config.holdout,
                        seed=config.seed,
                    )
                else:
                    session.warn_of_overlap(calibration.chosen, evaluation, "were also calibrated on")
        return cls(preprocessor, calibration, evaluation)

    def record(self, seed: int) -> CalibrationRecord | None:
        """Of what was learned from."""
        if self.calibration is None or self.preprocessor is None:
            return None
        return calibrated_on(self.calibration, seed, self.preprocessor.description)


def _nearest(config: QuantizeJob, source: LoadedModel) -> Callable[[PreTrainedModel], PreTrainedModel]:
    bits, activations = quantized_bits(config.weights or "int8", config.activations)
    return partial(quantized, bits=bits, activations=activations, dtype=source.source_dtype)


def _static(config: QuantizeJob, session: Session, data: CalibrationData) -> PreTrainedModel:
    """What the first process makes of the model, and others do not need."""
    return rounded(
        session.source.model,
        data,
        session.job,
        dtype=session.dtype(config.dtype),
        device=session.device,
        seed=config.seed,
        include=config.include,
        exclude=config.exclude,
    )


def _report(
    config: QuantizeJob,
    session: Session,
    data: _Data,
    dense: LoadedModel,
    written: LoadedModel,
    evaluation: EvaluationRecord | None,
) -> Report:
    job, inputs = session.job, example_inputs(session.source.model)
    models = {"dense": dense.model, "compressed": written.model}
    with job.stage("cost", "Measuring cost"):
        latency = processes.by_main(partial(cost.latency, models, inputs, repeats=10, warmup=2))
        macs = before_after(*(cost.macs(model, inputs) for model in models.values()))
    return Report(
        vitshrink=__version__,
        model=config.baseline or config.model,
        task=session.source.task,
        method="none",
        allocation="none",
        compensation="none",
        quantization=_recorded(config),
        parameters=before_after(*map(cost.parameters, models.values())),
        layers_parameters=None,
        layers=(),
        bytes=before_after(dense.source.nbytes, written.source.nbytes),
        macs=macs,
        latency=latency_record([latency]),
        evaluation=evaluation,
        calibration=data.record(config.seed),
        timings=dict(job.timings),
        environment=environment(session.device),
        warnings=tuple(job.warnings),
        left_out=session.source.companions.left,
    )


def _recorded(config: QuantizeJob) -> QuantizationRecord | None:
    if config.rounds == "static":
        return QuantizationRecord("int8", "static")
    return quantization_of(config.weights or "int8", config.activations)
