"""``finetune_checkpoint``: a compressed directory, trained and written anew with an updated report."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vitshrink._version import __version__
from vitshrink.config.options import FinetuneJob
from vitshrink.data import Preprocessor, SampleSet, overlap
from vitshrink.data.opening import open_data
from vitshrink.errors import CheckpointError, DataError
from vitshrink.evaluation.measurement import Measurement, labels_of, measure, require_embedding
from vitshrink.jobs.compress import CompressionResult
from vitshrink.jobs.description import environment
from vitshrink.jobs.evaluate import check_comparable
from vitshrink.models import cost
from vitshrink.models.checkpoint import compressed_layers, file_bytes, load, save, verify
from vitshrink.models.example import example_inputs
from vitshrink.models.families import task_of
from vitshrink.models.geometry import sides
from vitshrink.models.loading import LoadedModel, load_dense, require_attention
from vitshrink.models.publication import check_writable, publish_by_main
from vitshrink.models.resolution import set_resolution
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.recovery import Recovery, check, clear_state, open_material, recover
from vitshrink.report import Report, before_after, write
from vitshrink.runtime import processes
from vitshrink.runtime.device import find_device
from vitshrink.runtime.observer import Job, Observer, Silent
from vitshrink.runtime.processes import copy_from_main


def finetune_checkpoint(config: FinetuneJob, observer: Observer | None = None) -> CompressionResult:
    """Train a compressed checkpoint, verify and publish it; ranks, sizes and the source stay as they are.

    Where a launcher has started several processes, and they have met, they train together.

    Raises:
        UsageError: before any work where that can be known.
        CheckpointError, DataError, NumericsError, OutputError: with the file, layer or sample it is about.
    """
    check_writable(config.finetune.checkpoints, "--checkpoints")
    job = Job(observer or Silent())
    device = find_device(config.device)
    require_attention(config.attention, device)
    with job.stage("load", "Loading the models"):
        options: dict[str, Any] = {"offline": config.offline, "attention": config.attention, "allow_compressed": True}
        options["warn"] = job.warn
        source = load_dense(config.model, **options)
        teacher = load_dense(config.teacher, **options) if config.teacher else None
    if not compressed_layers(source.model):
        raise CheckpointError(f"{source.directory} is not compressed: there is nothing to recover.")
    if any(not parameter.is_floating_point() for parameter in source.model.parameters()):
        raise CheckpointError(f"{source.directory} is quantised: train what it was made from, and quantise the result.")
    if teacher is not None:
        if source.family.modality == "image" and not compressed_layers(teacher.model):
            _look_as_closely(teacher, sides(source.model.config.image_size), job)
        check_comparable(source, teacher)
    source.companions.tell(job)
    before = replace(_compressed_report(config, source, teacher), left_out=source.companions.left)
    check(source.model, config.finetune, dense=teacher is not None, labelled=True)
    class_map = Path(config.class_map) if config.class_map else None
    needed = 2 * file_bytes(source.directory)
    publishing = publish_by_main(Path(config.output), needed, overwrite=config.overwrite, protect=source.directory)
    with publishing as staging:
        with processes.together():
            preprocessor = Preprocessor.from_checkpoint(
                source.directory,
                source.family.modality,
                config=source.model.config,
                max_length=config.max_length,
                offline=config.offline,
            )
            material = open_material(
                config.finetune,
                config.data,
                source,
                job=job,
                seen=frozenset(before.fitted_to.split()),
                class_map=class_map,
                seed=config.seed,
                offline=config.offline,
            )
            evaluation_samples = _evaluation_samples(config, source, job, class_map)
        shared = overlap(material.samples, evaluation_samples) if evaluation_samples is not None else 0
        if shared:
            job.warn(f"{shared} of the evaluation samples are also trained on: figures may flatter.")
        model = source.model.to(device)
        dense = None if teacher is None else teacher.model.to(device)
        recovery = recover(
            model,
            dense,
            material,
            preprocessor,
            config.finetune,
            job,
            seed=config.seed,
            attention=config.attention,
            max_bad_samples=config.max_bad_samples,
        )
        with job.stage("save", "Saving and verifying"):
            with processes.together():
                if processes.is_main():
                    dtype = getattr(torch, config.dtype) if config.dtype else source.source_dtype
                    save(model, staging, source=source, dtype=dtype, extra_files={"recipe.yaml": config.to_yaml()})
                    verify(staging, model, example_inputs(model))
            copy_from_main(staging)
            reloaded = load(staging, dtype=torch.float32, device=device, attention=config.attention)
        measurement = None
        if evaluation_samples is not None:
            measurement = measure(
                reloaded,
                evaluation_samples,
                preprocessor,
                job,
                task=task_of(model),
                baseline=dense,
                embedding=source.embedding,
                baseline_embedding=None if teacher is None else teacher.embedding,
                device=device,
                batch_size=config.finetune.batch_size,
                class_map=class_map,
                max_bad_samples=config.max_bad_samples,
            )
        else:
            job.warn("the result is not evaluated: pass --eval.")
        report = _report(config, before, recovery, measurement, preprocessor, staging, job, device)
        if processes.is_main():
            write(report, staging)
    if config.finetune.checkpoints is not None and processes.is_main():
        clear_state(Path(config.finetune.checkpoints))
    return CompressionResult(Path(config.output), report)


def _look_as_closely(teacher: LoadedModel, size: tuple[int, int], job: Job) -> None:
    """Give the dense model the resolution that the compressed one was given, which is square."""
    if size[0] == size[1] and teacher.family.modality == "image" and sides(teacher.model.config.image_size) != size:
        job.warn(f"{teacher.directory} takes images of {size[0]} pixels here, as the compressed model does.")
        set_resolution(teacher.model, size[0])


def _evaluation_samples(config: FinetuneJob, source: LoadedModel, job: Job, class_map: Path | None) -> SampleSet | None:
    if config.eval_data is None:
        return None
    samples = open_data(config.eval_data, source, offline=config.offline, job=job, labelled=True)
    samples = samples.at_most(config.eval_limit, config.seed)
    # before any work: labels that cannot be aligned would otherwise be met at its end
    require_embedding(source.embedding, samples)
    labels_of(source.model, samples, task_of(source.model), class_map)
    return samples


def _report(
    config: FinetuneJob,
    before: Report,
    recovery: Recovery,
    measurement: Measurement | None,
    preprocessor: Preprocessor,
    staging: Path,
    job: Job,
    device: torch.device,
) -> Report:
    """The report of the compression, where there is one, with what training changed."""
    return replace(
        before,
        vitshrink=__version__,
        bytes={**before.bytes, "compressed": file_bytes(staging)},
        evaluation=None if measurement is None else measurement.to_dict(preprocessor.description),
        recovery=recovery.to_dict(),
        fitted_to=" ".join(sorted(recovery.fitted_to)),
        timings=dict(job.timings),
        environment=environment(device),
        recipe=config.to_dict(),
        command=config.command(),
        warnings=[*before.warnings, *job.warnings],
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
    layers: list[Mapping[str, Any]] = []
    for name, layer in compressed_layers(source.model).items():
        if isinstance(layer, LowRankLinear):
            stored = cost.layers_parameters(source.model, [name])
            shape = [layer.out_features, layer.in_features]
            layers.append({"name": name, "shape": shape, "rank": layer.rank, "parameters": stored})
    names = [str(layer["name"]) for layer in layers]
    stored = cost.layers_parameters(source.model, names)
    whole = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
    return Report(
        vitshrink=__version__,
        model=config.teacher or config.model,
        task=task_of(source.model),
        method="unknown",
        allocation="unknown",
        compensation="unknown",
        parameters=before_after(cost.parameters(reference.model), cost.parameters(source.model)),
        layers_parameters=before_after(whole, stored),
        layers=layers,
        bytes=before_after(file_bytes(reference.directory), file_bytes(source.directory)),
    )
