"""The algorithm, told once from top to bottom: ``compress``."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from vitshrink._version import __version__
from vitshrink.compression.candidates import Plan
from vitshrink.compression.choices import Choices
from vitshrink.compression.outlook import Outlook
from vitshrink.compression.pace import Paced
from vitshrink.compression.quantization import Quantization
from vitshrink.compression.rounding import at_steps
from vitshrink.compression.search import Bound
from vitshrink.compression.shrinking import Shrinking, Shrunk
from vitshrink.config.fields import plain_values
from vitshrink.config.options import CompressConfig
from vitshrink.errors import DataError, GateError, NumericsError, UsageError
from vitshrink.evaluation.measurement import Measurement
from vitshrink.jobs.description import Description
from vitshrink.jobs.inputs import Inputs, trains_on_calibration
from vitshrink.jobs.result import CompressionResult, published, result_at, write_result
from vitshrink.jobs.session import Session, Settings
from vitshrink.models import cost
from vitshrink.models.loading import LoadedModel, moved
from vitshrink.models.publication import check_writable
from vitshrink.models.runtimes import find_runtime
from vitshrink.models.views import own
from vitshrink.recovery import Recovery, clear_state, recover
from vitshrink.report import write, write_comparison
from vitshrink.report.making import LayerEntry
from vitshrink.runtime import processes
from vitshrink.runtime.forecast import Ahead
from vitshrink.runtime.observer import Job, Observer, Silent
from vitshrink.runtime.paging import drop, in_file, page_weights
from vitshrink.runtime.state import FINETUNE, Progress, state_of
from vitshrink.statistics.digests import data_digest, model_digest
from vitshrink.statistics.recomputing import is_large

__all__ = ["CompressionResult", "compress"]


def compress(config: CompressConfig, observer: Observer | None = None) -> list[CompressionResult]:
    """Compress a checkpoint to every requested size, from one calibration, and publish the verified results.

    All outputs appear at the end in one rename, or none does. Several outputs come with a comparison. A job continues
    from the saved state of a killed job with the same options. If a launcher started several processes, they share the
    work, and the first one publishes.

    Raises:
        UsageError: options that are wrong; before any work if possible.
        TargetError: a size that cannot be reached.
        CheckpointError: a checkpoint that cannot be read, or is not supported.
        DataError: samples that cannot be used.
        NumericsError: NaN or infinity, or no layer that can be compressed.
        OutputError: an output that cannot be written or verified.
        GateError: no size keeps the bound.
        OtherProcessError: another process of this job failed.
    """
    job = Job(observer or Silent())
    choices = Choices.of(config)
    with processes.together():
        _check(config)
    session = Session.open(config.model, Settings.of(config), job, allow_compressed=False)
    session.source.companions.tell(job)
    dense = moved(session.source.model, session.device)
    shrinking = Shrinking.of(choices, dense, session.dtype(config.stored_dtype))
    parts = [size.label for size in shrinking.sizes] if len(shrinking.sizes) > 1 else []
    with _staging(config, session, shrinking, parts) as staging:
        with processes.together():
            data = Inputs.open(config, session, shrinking)
        read = None if data.calibration is None else data.calibration.batches
        training = None if data.material is None else data.material.samples
        session.require_same(config.common(), calibration=read, evaluation=data.evaluation, training=training)
        progress = _progress(config, session, data, resumable=staging is not None)
        paged = _lay_in_files(config, dense, data, progress)
        description = Description.of(shrinking, data.calibration, data.preprocessor)
        job.expect(_outlook(shrinking, data))
        with _unless_in_vain(progress):
            shrunken = shrinking.run(data.calibration, data.held_out, data.preprocessor, job, progress)
            if staging is None:
                return [
                    CompressionResult(None, description.planned(shrunk.findings, shrunk.plan, shrunk.job))
                    for shrunk in shrunken
                ]
            saved = [
                _saved(config, session, data, description, shrunk, staging, part, progress)
                for part, shrunk in zip(parts or [""], shrunken, strict=True)
            ]
        if paged:
            own(dense)  # it is timed as the compressed models are
            drop()
        results = _measured(config, session, data, description, saved, staging)
    progress.discard()
    if config.finetune is not None and config.finetune.checkpoints is not None and processes.is_main():
        for part in ("", *parts):
            clear_state(Path(config.finetune.checkpoints) / part)
    return results


def _check(config: CompressConfig) -> None:
    """Raises OutputError, UsageError and DependencyError for what can be known before a model is loaded."""
    if processes.is_main():
        check_writable(config.cache, "--cache")
    check_writable(config.finetune.checkpoints if config.finetune else None, "--checkpoints")
    if config.runtime is not None:
        find_runtime(config.runtime)
    if trains_on_calibration(config) and config.calibration is None:
        raise UsageError("--finetune needs training samples: pass --calibration, or --finetune-option data=FOLDER.")


def _staging(
    config: CompressConfig, session: Session, shrinking: Shrinking, parts: Sequence[str]
) -> AbstractContextManager[Path | None]:
    """Where all sizes are written before they are published; nowhere in a dry run."""
    if config.dry_run:
        return nullcontext()
    width = 1 if config.counts_bytes else shrinking.dtype.itemsize
    needed = 2 * sum(size.budget for size in shrinking.sizes) * width
    return published(config.output, session, needed, parts=parts, overwrite=config.overwrite)


def _progress(config: CompressConfig, session: Session, data: Inputs, *, resumable: bool) -> Progress:
    """What an interrupted job of the same kind has computed, and where this one keeps what it computes."""
    state, mirror = state_of(config.output) if resumable else (None, None)
    progress = Progress(
        state,
        partial(_identity, config, session.source.model, data),
        session.device,
        config.save_every,
        session.job.warn,
        mirror,
    )
    if progress.open():
        with session.job.stage("resume", "Continuing from the saved state"):
            pass
    return progress


def _lay_in_files(config: CompressConfig, dense: PreTrainedModel, data: Inputs, progress: Progress) -> bool:
    """Keep large weights and samples in files: a job reads them block by block, and batch by batch.

    Unless the model is timed on the way. Returns whether the weights are there.
    """
    if config.target_latency is not None:
        return False
    batches = [] if data.calibration is None else data.calibration.batches
    if is_large(sum(each.nbytes for batch in batches for each in batch.inputs.values()), dense):
        for batch in batches:
            batch.inputs = {name: in_file(each, progress.prepared()) for name, each in batch.inputs.items()}
    large = is_large(cost.memory_bytes(dense), dense)
    if large:
        page_weights(dense, progress.prepared())
    return large


def _outlook(shrinking: Shrinking, data: Inputs) -> Sequence[Ahead]:
    """The stages that the job will go through."""
    if data.calibration is None or shrinking.bound is not None or shrinking.choices.config.target_latency is not None:
        return []
    evaluated = 0 if data.evaluation is None else len(data.evaluation)
    sizes = len(shrinking.sizes)
    return Outlook.of(shrinking.choices, shrinking.base, shrinking.targets, data.calibration, sizes, evaluated).stages()


def _identity(config: CompressConfig, dense: PreTrainedModel, data: Inputs) -> dict[str, Any]:
    """All that the compressed models follow from."""
    held_out = data.held_out if Bound.of(config) is not None else None
    return plain_values(config, lambda option: option.changes == "models") | {
        "version of vitshrink": __version__,
        "version of torch": torch.__version__,
        "device": str(next(dense.parameters()).device),
        "number of processes": processes.count(),
        "weights": model_digest(dense),
        "calibration data": None if data.calibration is None else data_digest(data.calibration.batches),
        "held-out data": None if held_out is None else held_out.fingerprint(),
        "training data": None if data.material is None else data.material.identity(),
        "preprocessing": None if data.preprocessor is None else data.preprocessor.identity(),
    }


@contextmanager
def _unless_in_vain(progress: Progress) -> Iterator[None]:
    """Keep no state of a job that would fail in the same way again."""
    try:
        yield
    except (UsageError, DataError, NumericsError, GateError):
        progress.discard()
        raise


@dataclass(frozen=True, eq=False)
class _Saved:
    """One size, written and verified but not yet measured."""

    written: LoadedModel
    """As it was read back."""
    plan: Plan
    layers: tuple[LayerEntry, ...]
    job: Job
    part: str
    """Its directory below the output."""
    recovery: Recovery | None
    paced: Paced | None


def _saved(
    config: CompressConfig,
    session: Session,
    data: Inputs,
    description: Description,
    shrunk: Shrunk,
    staging: Path,
    part: str,
    progress: Progress,
) -> _Saved:
    """Train one size where that is asked for, and write it."""
    assert shrunk.model is not None
    recovery = _recover(config, shrunk.model, session, data, part, progress, shrunk.job)
    dtype = session.dtype(config.stored_dtype)
    quantization = Quantization.of(config, dtype)
    extra = {"recipe.yaml": config.to_yaml()}
    if config.resolution is not None and data.preprocessor is not None:
        extra["preprocessor_config.json"] = data.preprocessor.processor.to_json_string()
    with shrunk.job.stage("save", "Saving and verifying"):
        written = write_result(
            shrunk.model,
            staging / part,
            session,
            dtype=dtype,
            runs_in=session.runs_in(config.dtype),
            extra_files=extra,
            finish=None if quantization is None else quantization.applied,
        )
    layers = description.layers(shrunk.findings, shrunk.plan)
    return _Saved(written, shrunk.plan, layers, shrunk.job, part, recovery, shrunk.paced)


def _recover(
    config: CompressConfig,
    model: PreTrainedModel,
    session: Session,
    data: Inputs,
    label: str,
    progress: Progress,
    job: Job,
) -> Recovery | None:
    """Train a compressed model, in place, where that is asked for; from where an interrupted run was."""
    if config.finetune is None or data.material is None or data.preprocessor is None:
        return None
    finetune = config.finetune
    if finetune.checkpoints is None and processes.count() == 1 and (state := progress.prepared()) is not None:
        finetune = replace(finetune, checkpoints=str(state / FINETUNE))
    recovery = recover(
        model,
        session.source.model,
        data.material,
        data.preprocessor,
        finetune.of_size(label),
        job,
        rounder=at_steps,
        seed=config.seed,
        attention=config.attention,
        max_bad_samples=config.max_bad_samples,
    )
    return replace(recovery, settings={**recovery.settings, "checkpoints": config.finetune.checkpoints})


def _measured(
    config: CompressConfig,
    session: Session,
    data: Inputs,
    description: Description,
    saved: Sequence[_Saved],
    staging: Path,
) -> list[CompressionResult]:
    """Measure all sizes in one pass, in which the dense model runs once, and write their reports."""
    source, results = session.source, []
    job = Job(session.job.observer, forecast=session.job.forecast)
    measurements: Sequence[Measurement | None] = [None] * len(saved)
    if data.evaluation is not None and data.preprocessor is not None:
        models = [each.written.model for each in saved]
        labeled = config.eval is not None or config.max_accuracy_drop is not None
        measurements = session.measure_each(
            models, data.evaluation, data.preprocessor, against=source, job=job, labeled=labeled
        )
    for each, measurement in zip(saved, measurements, strict=True):
        each.job.include(job)
        nbytes = (source.source.nbytes, each.written.source.nbytes)
        report = description.written(
            each.layers, each.plan, each.job, each.written.model, nbytes, measurement, each.recovery, each.paced
        )
        report = replace(report, left_out=source.companions.left)
        write(report, staging / each.part)
        results.append(CompressionResult(result_at(config.output, each.part), report))
    if len(saved) > 1:
        write_comparison([result.report for result in results], staging)
    return results
