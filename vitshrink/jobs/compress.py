"""The algorithm, told once from top to bottom: ``compress`` and ``evaluate_checkpoint``."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from vitshrink._version import __version__
from vitshrink.compression.allocation import Plan
from vitshrink.compression.quantization import Quantization
from vitshrink.compression.search import Bound
from vitshrink.compression.shrinking import Choices, Shrinking
from vitshrink.config.fields import plain_values
from vitshrink.config.options import CompressConfig
from vitshrink.data import Preprocessor, SampleSet, overlap
from vitshrink.data.opening import CalibrationData, hold_out, open_data, read_calibration
from vitshrink.errors import DataError, GateError, NumericsError, UsageError
from vitshrink.evaluation.measurement import Measurement, labels_of, measure_each, require_embedding
from vitshrink.jobs.description import Description
from vitshrink.models.checkpoint import file_bytes, load, save, verify
from vitshrink.models.example import example_inputs
from vitshrink.models.families import task_of
from vitshrink.models.loading import LoadedModel, load_dense, require_attention
from vitshrink.models.publication import check_writable, publish_by_main
from vitshrink.models.resolution import set_resolution
from vitshrink.recovery import Material, Recovery, clear_state, held_out_count, open_material, recover
from vitshrink.recovery import check as check_recovery
from vitshrink.report import Report, write, write_comparison
from vitshrink.runtime import processes
from vitshrink.runtime.device import find_device
from vitshrink.runtime.observer import Job, Observer, Silent
from vitshrink.runtime.processes import copy_from_main
from vitshrink.runtime.state import FINETUNE, Progress, state_directory
from vitshrink.statistics.digests import data_digest, model_digest


@dataclass(frozen=True)
class CompressionResult:
    """One compressed model: where it lies (None after a dry run) and what there is to say of it."""

    directory: Path | None
    report: Report


@dataclass(frozen=True, eq=False)
class _Saved:
    """One size, written and verified but not yet measured."""

    model: PreTrainedModel
    """As it was loaded again."""
    plan: Plan
    layers: list[dict[str, Any]]
    job: Job
    part: str
    """Its directory below the output."""
    recovery: Recovery | None


def compress(config: CompressConfig, observer: Observer | None = None) -> list[CompressionResult]:
    """Compress a checkpoint to every requested size, from one calibration, and publish what was verified.

    All outputs appear whole at the end, in one rename, or none does; beside several of them lies a comparison. What a
    killed job had computed is used by the next one of the same kind. Several processes that have met share the work;
    the first alone publishes.

    Raises:
        UsageError, TargetError: before any work where that can be known.
        CheckpointError, DataError, NumericsError, OutputError: with the file, layer or sample it is about.
        GateError: no size keeps within ``max_changed`` or ``max_kl``.
        OtherProcessError: another process of this job has failed.
    """
    job = Job(observer or Silent())
    choices = Choices.of(config)
    check_writable(config.cache, "--cache")
    check_writable(config.finetune.checkpoints if config.finetune else None, "--checkpoints")
    trains = config.finetune is not None and config.finetune.data is None
    if trains and config.calibration is None:
        raise UsageError("--finetune needs samples to train on: pass --calibration, or --finetune-option data=FOLDER.")
    with job.stage("load", "Loading the model"):
        device = find_device(config.device)
        require_attention(config.attention, device)
        source = load_dense(config.model, offline=config.offline, attention=config.attention, warn=job.warn)
        dense = source.model.to(device)
        if config.resolution is not None:
            set_resolution(dense, config.resolution)
    source.companions.tell(job)
    dtype = getattr(torch, config.dtype) if config.dtype else source.source_dtype
    shrinking = Shrinking.of(choices, dense, dtype)
    output = Path(config.output)
    parts = [size.label for size in shrinking.sizes] if len(shrinking.sizes) > 1 else []

    width = 1 if config.counts_bytes else dtype.itemsize
    needed = 2 * sum(size.budget for size in shrinking.sizes) * width
    publishing = publish_by_main(output, needed, parts=parts, overwrite=config.overwrite, protect=source.directory)
    with nullcontext() if config.dry_run else publishing as staging:
        with processes.together():
            preprocessor, calibration, held_out, evaluation_samples = _data(
                config, source, job, calibrated=choices.calibrated or trains
            )
            material = _material(config, source, shrinking.base, calibration, evaluation_samples, job)
        progress = Progress(
            state_directory(output) if staging is not None else None,
            partial(_identity, config, dense, preprocessor, calibration, held_out, material),
            device,
            config.save_every,
            job.warn,
        )
        if progress.open():
            with job.stage("resume", "Going on with what an interrupted run has computed"):
                pass
        description = Description.of(shrinking, calibration, preprocessor)
        results = []
        saved: list[_Saved] = []
        with _unless_in_vain(progress):
            shrunken = shrinking.run(calibration, held_out, preprocessor, job, progress)
            for part, shrunk in zip(parts or [""], shrunken, strict=True):
                own = shrunk.job
                if staging is None or shrunk.model is None:
                    results.append(CompressionResult(None, description.planned(shrunk.factors, shrunk.plan, own)))
                    continue
                recovery = _recover(config, shrunk.model, dense, material, preprocessor, part, progress, own)
                with own.stage("save", "Saving and verifying"):
                    with processes.together():
                        if processes.is_main():
                            _store(config, shrunk.model, source, preprocessor, dtype, staging / part)
                    copy_from_main(staging / part)
                    again = load(staging / part, dtype=torch.float32, device=device, attention=config.attention)
                layers = description.layers(shrunk.factors, shrunk.plan)
                saved.append(_Saved(again, shrunk.plan, layers, own, part, recovery))
        measuring = Job(job.observer)
        reloaded = [each.model for each in saved]
        measurements = _measure(config, reloaded, source, evaluation_samples, preprocessor, measuring)
        for each, measurement in zip(saved, measurements, strict=True):
            assert staging is not None
            each.job.include(measuring)
            nbytes = (file_bytes(source.directory), file_bytes(staging / each.part))
            report = description.written(
                each.layers, each.plan, each.job, each.model, nbytes, measurement, each.recovery
            )
            report = replace(report, left_out=source.companions.left)
            write(report, staging / each.part)
            results.append(CompressionResult(output / each.part, report))
        if len(saved) > 1 and staging is not None:
            write_comparison([result.report for result in results], staging)
    progress.discard()
    if config.finetune is not None and config.finetune.checkpoints is not None and processes.is_main():
        for part in ("", *parts):
            clear_state(Path(config.finetune.checkpoints) / part)
    return results


def _store(
    config: CompressConfig,
    model: PreTrainedModel,
    source: LoadedModel,
    preprocessor: Preprocessor | None,
    dtype: torch.dtype,
    directory: Path,
) -> None:
    """Save a model and verify what was saved."""
    extra = {"recipe.yaml": config.to_yaml()}
    if config.resolution is not None and preprocessor is not None:
        extra["preprocessor_config.json"] = preprocessor.processor.to_json_string()
    if (quantization := Quantization.of(config, dtype)) is not None:
        model = quantization.applied(model)
    save(model, directory, source=source, dtype=dtype, extra_files=extra)
    verify(directory, model, example_inputs(source.model))


def _identity(
    config: CompressConfig,
    dense: PreTrainedModel,
    preprocessor: Preprocessor | None,
    calibration: CalibrationData | None,
    held_out: SampleSet | None,
    material: Material | None,
) -> dict[str, Any]:
    """All that the compressed models follow from."""
    return plain_values(config, lambda option: option.changes == "models") | {
        "version of vitshrink": __version__,
        "version of torch": torch.__version__,
        "device": str(next(dense.parameters()).device),
        "number of processes": processes.count(),
        "weights": model_digest(dense),
        "calibration data": None if calibration is None else data_digest(calibration.batches),
        "held-out data": None if held_out is None or Bound.of(config) is None else held_out.fingerprint(),
        "training data": None if material is None else material.identity(),
        "preprocessing": None if preprocessor is None else preprocessor.identity(),
    }


@contextmanager
def _unless_in_vain(progress: Progress) -> Iterator[None]:
    """Keep no state of a job that would fail in the same way again."""
    try:
        yield
    except (UsageError, DataError, NumericsError, GateError):
        progress.discard()
        raise


def _material(
    config: CompressConfig,
    source: LoadedModel,
    base: PreTrainedModel,
    calibration: CalibrationData | None,
    evaluation: SampleSet | None,
    job: Job,
) -> Material | None:
    """What to train on, where that is asked for."""
    if config.finetune is None or config.dry_run:
        return None
    material = open_material(
        config.finetune,
        config.finetune_data,
        source,
        calibration,
        job=job,
        class_map=Path(config.class_map) if config.class_map else None,
        seed=config.seed,
        offline=config.offline,
    )
    check_recovery(base, config.finetune, dense=True, labelled=material.label_of is not None)
    shared = overlap(material.samples, evaluation) if evaluation is not None and config.finetune.data else 0
    if shared:
        job.warn(
            f"{shared} of the {len(evaluation or ())} evaluation samples are also trained on: figures may flatter."
        )
    return material


def _recover(
    config: CompressConfig,
    model: PreTrainedModel,
    dense: PreTrainedModel,
    material: Material | None,
    preprocessor: Preprocessor | None,
    label: str,
    progress: Progress,
    job: Job,
) -> Recovery | None:
    """Train a compressed model, in place, where that is asked for; from where an interrupted run was."""
    if config.finetune is None or material is None or preprocessor is None:
        return None
    finetune = config.finetune
    if finetune.checkpoints is None and processes.count() == 1 and (state := progress.prepared()) is not None:
        finetune = replace(finetune, checkpoints=str(state / FINETUNE))
    recovery = recover(
        model,
        dense,
        material,
        preprocessor,
        finetune.of_size(label),
        job,
        seed=config.seed,
        attention=config.attention,
        max_bad_samples=config.max_bad_samples,
    )
    return replace(recovery, settings={**recovery.settings, "checkpoints": config.finetune.checkpoints})


def _data(
    config: CompressConfig, source: LoadedModel, job: Job, *, calibrated: bool
) -> tuple[Preprocessor | None, CalibrationData | None, SampleSet | None, SampleSet | None]:
    """What to calibrate on, where that is needed, what is held out of it, and what to evaluate on."""
    if config.calibration_data is None and config.eval_data is None:
        job.warn("the result is not evaluated: pass --eval or --calibration.")
        if config.resolution is None and config.finetune_data is None:
            return None, None, None, None
    preprocessor = Preprocessor.from_checkpoint(
        source.directory,
        source.family.modality,
        config=source.model.config,
        max_length=config.max_length,
        style=config.preprocess,
        offline=config.offline,
        resolution=config.resolution,
    )
    calibration, held_out, samples = None, None, None
    if config.calibration_data is not None:
        unlabelled = open_data(config.calibration_data, source, offline=config.offline, job=job)
        if calibrated:
            calibration = read_calibration(
                unlabelled,
                preprocessor,
                job,
                samples=config.samples,
                seed=config.seed,
                batch_size=config.batch_size,
                max_bad_samples=config.max_bad_samples,
                workers=config.workers,
                unread=partial(_kept_for_recovery, config),
            )
        if Bound.of(config) is not None or (config.eval_data is None and not config.dry_run):
            held_out = hold_out(
                unlabelled,
                job,
                samples=config.samples,
                calibrated=calibrated,
                holdout=config.holdout,
                seed=config.seed,
            )
    if config.eval_data is None:
        samples = held_out
    elif not config.dry_run:
        samples = open_data(config.eval_data, source, offline=config.offline, job=job, labelled=True)
        samples = samples.at_most(config.eval_limit, config.seed)
        # before any work: labels that cannot be aligned would otherwise be met at its end
        require_embedding(source.embedding, samples)
        labels_of(source.model, samples, task_of(source.model), Path(config.class_map) if config.class_map else None)
        shared = overlap(calibration.chosen, samples) if calibration is not None else 0
        if shared:
            job.warn(f"{shared} of the {len(samples)} evaluation samples were also calibrated on: figures may flatter.")
    return preprocessor, calibration, held_out, samples


def _kept_for_recovery(config: CompressConfig, samples: int) -> int:
    """How many of so many samples compression does not read, since they will judge the training that follows."""
    if config.finetune is None or config.finetune.data is not None:
        return 0
    return held_out_count(samples, config.finetune.validation, str(config.calibration))


def _measure(
    config: CompressConfig,
    models: Sequence[PreTrainedModel],
    source: LoadedModel,
    samples: SampleSet | None,
    preprocessor: Preprocessor | None,
    job: Job,
) -> Sequence[Measurement | None]:
    """One pass over the samples for all sizes, in which the dense model runs once."""
    if samples is None or preprocessor is None or not models:
        return [None] * len(models)
    dense = source.model
    return measure_each(
        models,
        samples,
        preprocessor,
        job,
        task=task_of(dense),
        baseline=dense,
        device=next(dense.parameters()).device,
        batch_size=config.batch_size,
        embedding=source.embedding,
        labelled=config.eval is not None,
        class_map=Path(config.class_map) if config.class_map else None,
        max_bad_samples=config.max_bad_samples,
        workers=config.workers,
    )
