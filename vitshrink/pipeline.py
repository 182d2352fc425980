"""The algorithm, told once from top to bottom: ``compress`` and ``evaluate_checkpoint``."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from vitshrink.allocation import Plan
from vitshrink.checkpoint import file_bytes, load, save, verify
from vitshrink.config import CompressConfig
from vitshrink.data import Preprocessor, SampleSet, overlap
from vitshrink.description import example_inputs
from vitshrink.errors import UsageError
from vitshrink.measurement import (
    CalibrationData,
    Measurement,
    hold_out,
    labels_of,
    measure_each,
    open_data,
    read_calibration,
)
from vitshrink.models import LoadedModel, load_dense, require_attention, task_of
from vitshrink.observer import Job, Observer, Silent
from vitshrink.publication import check_space, publish
from vitshrink.quantization import Quantization
from vitshrink.recovery import Material, Recovery, open_material, recover
from vitshrink.recovery import check as check_recovery
from vitshrink.report import Report, write, write_comparison
from vitshrink.resolution import set_resolution
from vitshrink.search import Bound
from vitshrink.shrinking import Choices, Shrinking, Size


@dataclass(frozen=True)
class CompressionResult:
    """One compressed model: where it lies (None after a dry run) and what there is to say of it."""

    directory: Path | None
    report: Report


@dataclass(frozen=True)
class _Saved:
    """One size, written and verified but not yet measured."""

    model: PreTrainedModel
    """As it was loaded again."""
    plan: Plan
    layers: list[dict[str, Any]]
    job: Job
    staging: Path
    recovery: Recovery | None


def compress(config: CompressConfig, observer: Observer | None = None) -> list[CompressionResult]:
    """Compress a checkpoint to every requested size, from one calibration, and publish what was verified.

    All outputs appear whole at the end, or none does; beside several of them lies a comparison.

    Raises:
        UsageError, TargetError: before any work where that can be known.
        CheckpointError, DataError, NumericsError, OutputError: with the file, layer or sample it is about.
        GateError: no size keeps within ``max_drop`` or ``max_kl``.
    """
    job = Job(observer or Silent())
    choices = Choices.of(config)
    trains = config.finetune is not None and config.finetune.data is None
    if trains and config.calibration is None:
        raise UsageError("--finetune needs samples to train on: pass --calibration, or --finetune-option data=FOLDER.")
    with job.stage("load", "Loading the model"):
        device = find_device(config.device)
        require_attention(config.attention, device)
        source = load_dense(config.model, offline=config.offline, attention=config.attention)
        dense = source.model.to(device)
        if config.resolution is not None:
            set_resolution(dense, config.resolution)
    dtype = getattr(torch, config.dtype) if config.dtype else source.source_dtype
    shrinking = Shrinking.of(choices, dense, dtype)
    directories = _directories(config, shrinking.sizes)

    with ExitStack() as outputs:
        staging: list[Path] = []
        if not config.dry_run:
            width = 1 if config.counts_bytes else dtype.itemsize
            check_space(Path(config.output), 2 * sum(size.budget for size in shrinking.sizes) * width)
            staging = [
                outputs.enter_context(publish(path, overwrite=config.overwrite, protect=source.directory))
                for path in directories
            ]
        preprocessor, calibration, held_out, evaluation_samples = _data(
            config, source, job, calibrated=choices.calibrated or trains
        )
        material = _material(config, source, shrinking.base, calibration, evaluation_samples, job)
        description = shrinking.description(calibration, preprocessor)
        results = []
        saved: list[_Saved] = []
        for index, shrunk in enumerate(shrinking.run(calibration, held_out, preprocessor, job)):
            own = shrunk.job
            if config.dry_run or shrunk.model is None:
                results.append(CompressionResult(None, description.planned(shrunk.factors, shrunk.plan, own)))
                continue
            label = shrinking.sizes[index].label
            recovery = _recover(config, shrunk.model, dense, material, preprocessor, label, own)
            with own.stage("save", "Saving and verifying"):
                model, extra = shrunk.model, {"recipe.yaml": config.to_yaml()}
                if config.resolution is not None and preprocessor is not None:
                    extra["preprocessor_config.json"] = preprocessor.processor.to_json_string()
                if (quantization := Quantization.of(config, dtype)) is not None:
                    model = quantization.applied(model)
                save(model, staging[index], source=source, dtype=dtype, extra_files=extra)
                verify(staging[index], model, example_inputs(dense))
                again = load(staging[index], dtype=torch.float32, device=device, attention=config.attention)
            layers = description.layers(shrunk.factors, shrunk.plan)
            saved.append(_Saved(again, shrunk.plan, layers, own, staging[index], recovery))
        measuring = Job(job.observer)
        reloaded = [each.model for each in saved]
        measurements = _measure(config, reloaded, dense, evaluation_samples, preprocessor, measuring)
        for each, measurement, directory in zip(saved, measurements, directories, strict=False):
            each.job.include(measuring)
            nbytes = (file_bytes(source.directory), file_bytes(each.staging))
            report = description.written(
                each.layers, each.plan, each.job, each.model, nbytes, measurement, each.recovery
            )
            write(report, each.staging)
            results.append(CompressionResult(directory, report))
    if len(saved) > 1:
        try:
            write_comparison([result.report for result in results], Path(config.output))
        except OSError as error:  # what matters is in place
            job.warn(f"the comparison of the sizes could not be written: {error}.")
    return results


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
    job: Job,
) -> Recovery | None:
    """Train a compressed model, in place, where that is asked for."""
    if config.finetune is None or material is None or preprocessor is None:
        return None
    return recover(
        model,
        dense,
        material,
        preprocessor,
        config.finetune.of_size(label),
        job,
        seed=config.seed,
        attention=config.attention,
        max_bad_samples=config.max_bad_samples,
    )


def find_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one. Raises UsageError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # the device "meta" exists, but holds nothing
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"--device {name} cannot be used: choose auto, cpu, cuda or cuda:1 ({reason}).") from error
    return probe.device


def _directories(config: CompressConfig, sizes: Sequence[Size]) -> list[Path]:
    output = Path(config.output)
    return [output] if len(sizes) == 1 else [output / size.label for size in sizes]


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
        max_length=config.max_length,
        style=config.preprocess,
        offline=config.offline,
        resolution=config.resolution,
    )
    calibration, held_out, samples = None, None, None
    if config.calibration_data is not None:
        unlabelled = open_data(config.calibration_data, source, offline=config.offline)
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
            )
        if Bound.of(config) is not None or (config.eval_data is None and not config.dry_run):
            # the same samples for every method, so that methods can be compared; where there are enough
            used = config.samples if calibrated or config.samples < len(unlabelled) else 0
            held_out = hold_out(unlabelled, job, used=used, holdout=config.holdout, seed=config.seed)
    if config.eval_data is None:
        samples = held_out
    elif not config.dry_run:
        samples = open_data(config.eval_data, source, offline=config.offline).at_most(config.eval_limit, config.seed)
        # before any work: labels that cannot be aligned would otherwise be met at its end
        labels_of(source.model, samples, task_of(source.model), Path(config.class_map) if config.class_map else None)
        shared = overlap(calibration.samples, samples) if calibration is not None else 0
        if shared:
            job.warn(f"{shared} of the {len(samples)} evaluation samples were also calibrated on: figures may flatter.")
    return preprocessor, calibration, held_out, samples


def _measure(
    config: CompressConfig,
    models: Sequence[PreTrainedModel],
    dense: PreTrainedModel,
    samples: SampleSet | None,
    preprocessor: Preprocessor | None,
    job: Job,
) -> Sequence[Measurement | None]:
    """One pass over the samples for all sizes, in which the dense model runs once."""
    if samples is None or preprocessor is None or not models:
        return [None] * len(models)
    return measure_each(
        models,
        samples,
        preprocessor,
        job,
        task=task_of(dense),
        baseline=dense,
        device=next(dense.parameters()).device,
        batch_size=config.batch_size,
        labelled=config.eval is not None,
        class_map=Path(config.class_map) if config.class_map else None,
        max_bad_samples=config.max_bad_samples,
        workers=config.workers,
    )
