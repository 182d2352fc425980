"""``vitshrink quantize``: a checkpoint, dense or compressed, with integer weights."""

from functools import partial
from pathlib import Path

from vitshrink._version import __version__
from vitshrink.compression.quantization import quantized
from vitshrink.config.options import DataConfig, Preprocessing, quantized_bits
from vitshrink.evaluation.quality import EvaluationRecord
from vitshrink.jobs.description import environment, latency_record, quantization_of
from vitshrink.jobs.result import CompressionResult, published, write_result
from vitshrink.jobs.session import Session, Settings
from vitshrink.models import cost
from vitshrink.models.example import example_inputs
from vitshrink.models.loading import LoadedModel, moved
from vitshrink.report import Report, before_after, write
from vitshrink.report.making import QuantizationRecord
from vitshrink.runtime import processes
from vitshrink.runtime.observer import Job, Observer, Silent


def quantize_checkpoint(
    model: str,
    output: str,
    *,
    weights: str = "int8",
    activations: str | None = None,
    data: DataConfig | None = None,
    baseline: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    preprocess: Preprocessing = "checkpoint",
    class_map: Path | None = None,
    max_bad_samples: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    seed: int = 0,
    offline: bool = False,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> CompressionResult:
    """Write ``model`` with integer weights into the directory ``output``, verified, whole or not at all.

    With ``data`` it is measured beside ``baseline``, which is the model itself if none is given; where several
    processes work on the job each measures its share of the samples. Weights are rounded on the CPU, whatever the
    ``device`` on which models are measured.

    Raises:
        UsageError: weights or activations that there are not, or a model that is quantised already.
        CheckpointError, DataError, OutputError: as the parts that read and write.
    """
    bits, treated = quantized_bits(weights, activations)
    job = Job(observer or Silent())
    settings = Settings(
        device=device,
        offline=offline,
        max_length=max_length,
        preprocess=preprocess,
        class_map=class_map,
        batch_size=batch_size,
        seed=seed,
        max_bad_samples=max_bad_samples,
        workers=workers,
    )
    session = Session.open(model, settings, job, baseline=baseline)
    session.source.companions.tell(job)
    samples, preprocessor = None, None
    with processes.together():
        if data is not None:  # before any work, so that what cannot be read stops it here
            samples, preprocessor = session.evaluation_samples(data, limit), session.preprocessor()
    source = session.source
    needed = 2 * cost.parameters(source.model)
    with published(Path(output), session, needed, overwrite=overwrite) as staging:
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
        quantization = quantization_of(weights, activations)
        report = _report(session, baseline or model, dense, written, quantization, evaluation)
        write(report, staging)
    return CompressionResult(Path(output), report)


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
