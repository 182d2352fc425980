"""``finetune_checkpoint``: a compressed directory, trained and written anew with an updated report."""

from dataclasses import replace
from pathlib import Path

from vitshrink._version import __version__
from vitshrink.compression.rounding import at_steps
from vitshrink.config.options import FinetuneJob
from vitshrink.data import Preprocessor
from vitshrink.errors import CheckpointError, DataError
from vitshrink.evaluation.measurement import Measurement
from vitshrink.jobs.description import environment, recovery_record
from vitshrink.jobs.result import CompressionResult, published, result_at, write_result
from vitshrink.jobs.session import Session, Settings
from vitshrink.models import cost
from vitshrink.models.checkpoint import compressed_layers
from vitshrink.models.geometry import image_shape
from vitshrink.models.loading import LoadedModel, moved
from vitshrink.models.publication import check_writable
from vitshrink.models.resolution import set_resolution
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.recovery import Material, Recovery, check, clear_state, open_material, recover
from vitshrink.report import Report, before_after, write
from vitshrink.report.making import LayerEntry
from vitshrink.runtime import processes
from vitshrink.runtime.observer import Job, Observer, Silent


def finetune_checkpoint(config: FinetuneJob, observer: Observer | None = None) -> CompressionResult:
    """Train a compressed checkpoint, verify it and publish it. Ranks, sizes and the source do not change.

    If a launcher started several processes, they train together.

    Raises:
        UsageError: options that are wrong; before any work if possible.
        CheckpointError: a checkpoint that cannot be read or trained.
        DataError: samples or labels that cannot be used.
        NumericsError: outputs that are NaN or infinite.
        OutputError: an output that cannot be written or verified.
    """
    check_writable(config.finetune.checkpoints, "--checkpoints")
    job = Job(observer or Silent())
    session = _opened(config, job)
    source, teacher = session.source, session.baseline
    source.companions.tell(job)
    before = replace(_compressed_report(config, source, teacher), left_out=source.companions.left)
    check(source.model, config.finetune, dense=teacher is not None, labeled=True)
    dtype = session.dtype(config.dtype)
    with published(config.output, session, 2 * source.source.nbytes, overwrite=config.overwrite) as staging:
        with processes.together():
            preprocessor = session.preprocessor()
            material = _material(config, session, before)
            samples = None
            if config.eval_data is not None:
                samples = session.evaluation_samples(config.eval_data, config.eval_limit)
        session.require_same(config.common(), training=material.samples, evaluation=samples)
        session.warn_of_overlap(material.samples, samples, "are also trained on")
        model = moved(source.model, session.device)
        recovery = recover(
            model,
            None if teacher is None else moved(teacher.model, session.device),
            material,
            preprocessor,
            config.finetune,
            job,
            rounder=at_steps,
            seed=config.seed,
            attention=config.attention,
            max_bad_samples=config.max_bad_samples,
        )
        with job.stage("save", "Saving and verifying"):
            extra = {"recipe.yaml": config.to_yaml()}
            written = write_result(
                model, staging, session, dtype=dtype, runs_in=session.runs_in(config.dtype), extra_files=extra
            )
        measurement = None
        if samples is not None:
            measurement = session.measure(written.model, samples, preprocessor, against=teacher)
        else:
            job.warn("the result is not evaluated: pass --eval.")
        report = _report(config, before, recovery, measurement, preprocessor, written, session)
        if processes.is_main():
            write(report, staging)
    if config.finetune.checkpoints is not None and processes.is_main():
        clear_state(Path(config.finetune.checkpoints))
    return CompressionResult(result_at(config.output), report)


def _opened(config: FinetuneJob, job: Job) -> Session:
    """The compressed model and its teacher. Raises CheckpointError and UsageError for what cannot be trained."""
    settings = Settings(
        device=config.device,
        attention=config.attention,
        offline=config.offline,
        max_length=config.max_length,
        preprocess=config.preprocess,
        class_map=Path(config.class_map) if config.class_map else None,
        batch_size=config.finetune.batch_size,
        seed=config.seed,
        max_bad_samples=config.max_bad_samples,
        workers=config.workers,
    )
    session = Session.open(config.model, settings, job)
    source = session.source
    if not compressed_layers(source.model):
        raise CheckpointError(f"{source.directory} is not compressed: there is nothing to recover.")
    if any(not parameter.is_floating_point() for parameter in source.model.parameters()):
        raise CheckpointError(
            f"{source.directory} is quantized, and quantized models cannot be trained: train the model it was "
            "made from, then quantize the result."
        )
    if config.teacher is None:
        return session
    teacher = session.load(config.teacher, "Loading the teacher")
    if source.family.modality == "image" and not compressed_layers(teacher.model):
        _look_as_closely(teacher, image_shape(source.model.config)[1:], job)
    return session.beside(teacher)


def _material(config: FinetuneJob, session: Session, before: Report) -> Material:
    """What to train on."""
    return open_material(
        config.finetune,
        config.data,
        session.source,
        job=session.job,
        seen=frozenset(before.fitted_to.split()),
        class_map=session.settings.class_map,
        seed=config.seed,
        offline=config.offline,
    )


def _look_as_closely(teacher: LoadedModel, size: tuple[int, int], job: Job) -> None:
    """Give the dense model the resolution that the compressed one was given, which is square."""
    if size[0] == size[1] and teacher.family.modality == "image" and image_shape(teacher.model.config)[1:] != size:
        job.warn(f"{teacher.directory} takes images of {size[0]} pixels here, like the compressed model.")
        set_resolution(teacher.model, size[0])


def _report(
    config: FinetuneJob,
    before: Report,
    recovery: Recovery,
    measurement: Measurement | None,
    preprocessor: Preprocessor,
    written: LoadedModel,
    session: Session,
) -> Report:
    """The report of the compression, where there is one, with what training changed."""
    dense = session.source.source.nbytes if before.bytes is None else before.bytes.dense
    return replace(
        before,
        vitshrink=__version__,
        bytes=before_after(dense, written.source.nbytes),
        evaluation=None if measurement is None else measurement.record(preprocessor.description),
        recovery=recovery_record(recovery),
        fitted_to=" ".join(sorted(recovery.fitted_to)),
        timings=dict(session.job.timings),
        environment=environment(session.device),
        recipe=config.to_dict(),
        command=config.command(),
        warnings=(*before.warnings, *session.job.warnings),
    )


def _compressed_report(config: FinetuneJob, source: LoadedModel, teacher: LoadedModel | None) -> Report:
    """That of the compression, or without one what the model says of itself."""
    try:
        return Report.read(source.directory)
    except DataError:
        return _from_model(config, source, teacher)


def _from_model(config: FinetuneJob, source: LoadedModel, teacher: LoadedModel | None) -> Report:
    """What a compressed directory without a report says of itself."""
    reference = source if teacher is None else teacher
    layers = tuple(
        LayerEntry(
            name=name,
            shape=(layer.out_features, layer.in_features),
            rank=layer.rank,
            parameters=cost.layers_parameters(source.model, [name]),
        )
        for name, layer in compressed_layers(source.model).items()
        if isinstance(layer, LowRankLinear)
    )
    whole = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    stored = cost.layers_parameters(source.model, [layer.name for layer in layers])
    return Report(
        vitshrink=__version__,
        model=config.teacher or config.model,
        task=source.task,
        method="unknown",
        allocation="unknown",
        compensation="unknown",
        parameters=before_after(cost.parameters(reference.model), cost.parameters(source.model)),
        layers_parameters=before_after(whole, stored),
        layers=layers,
        bytes=before_after(reference.source.nbytes, source.source.nbytes),
    )
