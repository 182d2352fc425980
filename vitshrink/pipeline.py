"""The algorithm, told once from top to bottom: ``compress`` and ``evaluate_checkpoint``."""

import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from vitshrink import cost
from vitshrink.allocation import ALLOCATIONS, Curve, Plan, least_cost
from vitshrink.checkpoint import load, save, verify
from vitshrink.compensation import COMPENSATIONS
from vitshrink.compression import Compression, fixed_parameters
from vitshrink.config import CompressConfig, parse_quantity
from vitshrink.data import Preprocessor, SampleSet, overlap
from vitshrink.description import Description, example_inputs
from vitshrink.errors import TargetError, UsageError
from vitshrink.measurement import (
    CalibrationData,
    Measurement,
    hold_out,
    labels_of,
    measure_each,
    open_data,
    read_calibration,
)
from vitshrink.methods import Method, Needs, choose, get_method
from vitshrink.models import LoadedModel, Target, find_targets, load_dense, task_of
from vitshrink.observer import Job, Observer, Silent
from vitshrink.publication import check_space, publish
from vitshrink.ranks import Storage
from vitshrink.report import Report, write
from vitshrink.search import Bound, Search

HEADER_BYTES_A_TENSOR = 200
"""Room for one entry of a safetensors header; real ones take about 120 bytes."""


@dataclass(frozen=True)
class CompressionResult:
    """One compressed model: where it lies (None after a dry run) and what there is to say of it."""

    directory: Path | None
    report: Report


@dataclass(frozen=True)
class Size:
    """One requested size."""

    label: str
    """Name of the output below the given one, where there are several."""
    budget: int
    """Parameters of the whole model that may be stored."""


@dataclass(frozen=True)
class _Saved:
    """One size, written and verified but not yet measured."""

    model: PreTrainedModel
    """As it was loaded again."""
    plan: Plan
    layers: list[dict[str, Any]]
    job: Job
    staging: Path


def compress(config: CompressConfig, observer: Observer | None = None) -> list[CompressionResult]:
    """Compress a checkpoint to every requested size, from one calibration, and publish what was verified.

    All outputs appear whole at the end, or none does.

    Raises:
        UsageError, TargetError: before any work where that can be known.
        CheckpointError, DataError, NumericsError, OutputError: with the file, layer or sample it is about.
        GateError: no size keeps within ``max_drop`` or ``max_kl``.
    """
    job = Job(observer or Silent())
    method = get_method(config.method)
    allocation_name = config.allocation or method.allocation
    allocation = choose(allocation_name, ALLOCATIONS, "allocation")
    compensation = choose(config.compensation or method.compensation, {c: c for c in COMPENSATIONS}, "compensation")
    storage: Storage = method.storage if config.storage == "auto" else config.storage
    _require_calibration(config, method, compensation)
    check_options(method, config.options)

    with job.stage("load", "Loading the model"):
        source = load_dense(config.model, offline=config.offline)
        device = find_device(config.device)
        dense = source.model.to(device)
    targets = find_targets(dense, layers=config.layers, include=config.include, exclude=config.exclude)
    dtype = getattr(torch, config.dtype) if config.dtype else source.source_dtype
    bound = Bound.of(config)
    if bound is not None:
        bound.require(dense)
    sizes = _sizes(config, dense, targets, dtype, storage)
    directories = _directories(config, sizes)

    with ExitStack() as outputs:
        staging: list[Path] = []
        if not config.dry_run:
            check_space(Path(config.output), 2 * sum(size.budget for size in sizes) * dtype.itemsize)
            staging = [
                outputs.enter_context(publish(path, overwrite=config.overwrite, protect=source.directory))
                for path in directories
            ]
        calibrated = method.needs is not Needs.WEIGHTS or compensation != "none"
        preprocessor, calibration, held_out, evaluation_samples = _data(config, source, job, calibrated=calibrated)
        compression = Compression(config, dense, targets, method, allocation, compensation, storage, calibration)
        description = Description(
            config,
            source,
            targets,
            _allocated_by(config, allocation_name),
            compensation,
            storage,
            calibration,
            preprocessor.description if preprocessor else None,
        )
        search = Search.on(held_out, preprocessor, compression, bound, dtype, job) if bound is not None else None
        first = compression.factorise_dense(job)
        results = []
        saved: list[_Saved] = []
        for index, size in enumerate(sizes):
            own = job.branch()
            refine = config.refine if method.needs is Needs.CURVATURE and not config.dry_run else 0
            model: PreTrainedModel | None = None
            if search is not None:
                found = search.smallest(first, refine, own)
                factors, plan, model = found.factors, found.plan, found.model
            else:
                factors, plan = first, compression.plan(first, size.budget)
                for _ in range(refine):
                    factors = compression.refine(factors, plan, own)
                    plan = compression.plan(factors, size.budget)
            if config.dry_run:
                results.append(CompressionResult(None, description.planned(factors, plan, own)))
                continue
            if model is None:
                model = compression.build(factors, plan, own)
            with own.stage("save", "Saving and verifying"):
                save(model, staging[index], source=source, dtype=dtype, extra_files={"recipe.yaml": config.to_yaml()})
                verify(staging[index], model, example_inputs(dense))
                again = load(staging[index], dtype=torch.float32, device=device)
            saved.append(_Saved(again, plan, description.layers(factors, plan), own, staging[index]))
        measuring = Job(job.observer)
        reloaded = [each.model for each in saved]
        measurements = _measure(config, reloaded, dense, evaluation_samples, preprocessor, measuring)
        for each, measurement, directory in zip(saved, measurements, directories, strict=False):
            each.job.include(measuring)
            report = description.written(each.layers, each.plan, each.job, each.model, each.staging, measurement)
            write(report, each.staging)
            results.append(CompressionResult(directory, report))
    return results


def _require_calibration(config: CompressConfig, method: Method, compensation: str) -> None:
    if config.calibration is not None or (method.needs is Needs.WEIGHTS and compensation == "none"):
        return
    what = f"method {method.name!r}" if method.needs is not Needs.WEIGHTS else f"compensation {compensation!r}"
    raise UsageError(
        f"{what} needs calibration data: pass --calibration with a folder, a file, a recipe or a Hub data set "
        "(a few hundred unlabelled samples do), or use --method svd --compensation none."
    )


def check_options(method: Method, options: Mapping[str, Any]) -> None:
    """Raises UsageError for an option that the method does not have, or of another kind than its default."""
    parameters = inspect.signature(method.factorise).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "centred"}
    for name, value in options.items():
        if not defaults:
            raise UsageError(f"--option {name}: method {method.name!r} has no options.")
        default = choose(name, defaults, f"--option of method {method.name!r}:")
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(value, kinds) or isinstance(value, bool) is not isinstance(default, bool):
            raise UsageError(f"--option {name}={value}: give a value such as {name}={default}.")


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


def _sizes(
    config: CompressConfig,
    dense: PreTrainedModel,
    targets: Sequence[Target],
    dtype: torch.dtype,
    storage: Storage,
) -> list[Size]:
    """The requested sizes as budgets of the whole model. Raises TargetError for what no rank can reach."""
    total = cost.parameters(dense)
    least = fixed_parameters(dense, targets) + least_cost(_empty_curves(config, targets, storage))
    header = HEADER_BYTES_A_TENSOR * (len(dense.state_dict()) + len(targets))
    if config.keep:
        sizes = [Size(f"keep-{keep}", int(keep * total)) for keep in config.keep]
    elif config.target_params:
        sizes = [Size("", parse_quantity(config.target_params, "--target-params"))]
    elif config.target_size:
        room = parse_quantity(config.target_size, "--target-size")
        sizes = [Size("", (room - header) // dtype.itemsize)]
    else:
        sizes = [Size("", total - 1)]  # asked for by rank or by quality: any size but that of the dense model
    for size in sizes:
        if least >= total:
            raise TargetError(
                f"no layer gets smaller at a rank that is a multiple of {config.rank_multiple}: "
                "give a smaller --rank-multiple."
            )
        if size.budget >= total:
            raise TargetError(f"{config.model} has only {total:,} parameters: ask for a smaller size than that.")
        if size.budget < least:
            raise TargetError(
                f"cannot reach {max(size.budget, 0):,} parameters: what is not factorised, and rank "
                f"{config.rank_multiple} everywhere else, need {least:,} of {total:,}. The least to ask for is "
                f"--keep {_up(least / total)}, --target-params {least} or "
                f"--target-size {_up((least * dtype.itemsize + header) / 1e6)}MB."
                + (" Choose more --layers to go lower." if config.layers != "all" or config.exclude else "")
            )
    return sizes


def _up(number: float) -> str:
    """Rounded up to three decimals, so that what a message calls reachable is."""
    return f"{math.ceil(number * 1000) / 1000:g}"


def _allocated_by(config: CompressConfig, allocation: str) -> str:
    if config.explained_variance is not None:
        return "explained variance"
    return allocation if config.rank is None else "fixed rank"


def _empty_curves(config: CompressConfig, targets: Sequence[Target], storage: Storage) -> list[Curve]:
    nothing = torch.zeros(1, dtype=torch.float64)
    return [Curve(target.name, target.shape, nothing, storage, config.rank_multiple) for target in targets]


def _data(
    config: CompressConfig, source: LoadedModel, job: Job, *, calibrated: bool
) -> tuple[Preprocessor | None, CalibrationData | None, SampleSet | None, SampleSet | None]:
    """What to calibrate on, where that is needed, what is held out of it, and what to evaluate on."""
    if config.calibration_data is None and config.eval_data is None:
        job.warn("the result is not evaluated: pass --eval or --calibration.")
        return None, None, None, None
    preprocessor = Preprocessor.from_checkpoint(
        source.directory, source.family.modality, max_length=config.max_length, offline=config.offline
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
            )
        if Bound.of(config) is not None or (config.eval_data is None and not config.dry_run):
            # the same samples for every method, so that methods can be compared; where there are enough
            used = config.samples if calibrated or config.samples < len(unlabelled) else 0
            held_out = hold_out(unlabelled, job, used=used, holdout=config.holdout, seed=config.seed)
    if config.eval_data is None:
        samples = held_out
    elif not config.dry_run:
        samples = open_data(config.eval_data, source, offline=config.offline)
        if config.eval_limit is not None and config.eval_limit < len(samples):
            samples = samples.select(config.eval_limit, config.seed)
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
    )
