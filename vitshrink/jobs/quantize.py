"""``vitshrink quantize``: a checkpoint, dense or compressed, with integer weights."""

from functools import partial
from pathlib import Path

from vitshrink._version import __version__
from vitshrink.compression.quantization import quantized
from vitshrink.config.options import quantized_bits
from vitshrink.config.quantize import QuantizeJob
from vitshrink.evaluation.quality import EvaluationRecord
from vitshrink.jobs.compress import compress
from vitshrink.jobs.description import environment, latency_record, quantization_of
from vitshrink.jobs.result import CompressionResult, published, write_result
from vitshrink.jobs.session import Session, Settings
from vitshrink.models import cost
from vitshrink.models.example import example_inputs
from vitshrink.models.loading import LoadedModel, is_compressed, moved
from vitshrink.report import Report, before_after, write
from vitshrink.report.making import QuantizationRecord
from vitshrink.runtime import processes
from vitshrink.runtime.observer import Job, Observer, Silent

LESS = "rounded to the nearest: with --calibration and a size, such as --bits 4, integers of as many bytes lose less."
"""What is said where calibration data were not given, nor declined."""


def quantize_checkpoint(config: QuantizeJob, observer: Observer | None = None) -> CompressionResult:
    """Write a model with integer weights, verified, whole or not at all: by calibration data, or to the nearest.

    To the nearest, models that are compressed are rounded as well, and measured beside ``baseline``, which is the model
    itself if none is given; where several processes work on the job each measures its share of the samples. Weights are
    then rounded on the CPU, whatever the ``device`` on which models are measured.

    Raises:
        UsageError: a model that is quantised already.
        CheckpointError, DataError, OutputError: as the parts that read and write, and all that ``compress`` raises.
    """
    if config.rounds == "curvature":
        (result,) = compress(config.compression(), observer)
        return result
    return _nearest(config, Job(observer or Silent()))


def _nearest(config: QuantizeJob, job: Job) -> CompressionResult:
    weights = config.weights or "int8"
    bits, treated = quantized_bits(weights, config.activations)
    session = Session.open(config.model, Settings.of(config), job, baseline=config.baseline)
    session.source.companions.tell(job)
    if config.could_lose_less and not is_compressed(session.source.source):
        job.warn(LESS)
    samples, preprocessor = None, None
    with processes.together():
        if config.eval_data is not None:  # before any work, so that what cannot be read stops it here
            samples = session.evaluation_samples(config.eval_data, config.eval_limit)
            preprocessor = session.preprocessor()
    source = session.source
    needed = 2 * cost.parameters(source.model)
    with published(Path(config.output), session, needed, overwrite=config.overwrite) as staging:
        with job.stage("quantize", "Quantising, saving and verifying"):
            rounded = partial(quantized, bits=bits, activations=treated, dtype=source.source_dtype)
            # the source stays as it is: it may be the baseline
            written = write_result(source.model, staging, session, finish=rounded, in_place=False)
        dense = session.baseline or source
        moved(dense.model, session.device)
        evaluation = None
        if samples is not None and preprocessor is not None:
            measurement = session.measure(written.model, samples, preprocessor, against=dense)
            evaluation = measurement.record(preprocessor.description)
        quantization = quantization_of(weights, config.activations)
        report = _report(session, config.baseline or config.model, dense, written, quantization, evaluation)
        write(report, staging)
    return CompressionResult(Path(config.output), report)


def _report(
    session: Session,
    name: str,
    dense: LoadedModel,
    written: LoadedModel,
    quantization: QuantizationRecord | None,
    evaluation: EvaluationRecord | None,
) -> Report:
    job, inputs = session.job, example_inputs(session.source.model)
    models = {"dense": dense.model, "compressed": written.model}
    with job.stage("cost", "Measuring cost"):
        latency = processes.by_main(partial(cost.latency, models, inputs, repeats=10, warmup=2))
        macs = before_after(*(cost.macs(model, inputs) for model in models.values()))
    return Report(
        vitshrink=__version__,
        model=name,
        task=session.source.task,
        method="none",
        allocation="none",
        compensation="none",
        quantization=quantization,
        parameters=before_after(*map(cost.parameters, models.values())),
        layers_parameters=None,
        layers=(),
        bytes=before_after(dense.source.nbytes, written.source.nbytes),
        macs=macs,
        latency=latency_record([latency]),
        evaluation=evaluation,
        timings=dict(job.timings),
        environment=environment(session.device),
        warnings=tuple(job.warnings),
        left_out=session.source.companions.left,
    )
