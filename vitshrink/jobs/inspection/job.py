"""``vitshrink inspect``: the layers of a checkpoint before anything is done to them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from vitshrink.config.options import InspectJob
from vitshrink.data import Preprocessor
from vitshrink.data.opening import CalibrationData, open_data, read_calibration
from vitshrink.errors import UsageError
from vitshrink.jobs.inspection.activations import sample_activations
from vitshrink.jobs.inspection.layers import LayerInspection, inspect_layers
from vitshrink.jobs.inspection.overview import Overview, overview
from vitshrink.jobs.inspection.page import check_available, write_figures
from vitshrink.jobs.inspection.spectra import layer_spectra
from vitshrink.models.loading import LoadedModel, load_dense, moved
from vitshrink.models.publication import check_writable
from vitshrink.models.targets import Target, find_targets
from vitshrink.report.summary import base_name
from vitshrink.runtime.device import find_device
from vitshrink.runtime.observer import Job, Observer, Silent
from vitshrink.statistics.calibration import collect
from vitshrink.statistics.curvature import collect_curvature
from vitshrink.statistics.needs import Needs
from vitshrink.statistics.recomputing import batch_that_fits
from vitshrink.statistics.stats import LinearStats

FRACTIONS = (0.125, 0.25, 0.375, 0.5, 0.75)
"""Of the full rank, at which the energy is told."""


@dataclass(frozen=True)
class Inspection:
    """What was found of the layers of one model."""

    layers: list[LayerInspection]
    weighted: bool
    """Whether the spectra are those of the layers' outputs on samples."""
    page: Path | None
    """The figures, where they were asked for."""
    overview: Overview


@dataclass(frozen=True, eq=False)
class _Found:
    """The model and what its samples have told, on the way to figures."""

    dense: PreTrainedModel
    targets: list[Target]
    data: CalibrationData | None
    stats: dict[str, LinearStats]
    layers: list[LayerInspection]


def inspect_checkpoint(config: InspectJob, figures: Path | None = None, observer: Observer | None = None) -> Inspection:
    """List the layers of a dense checkpoint; with calibration, weighted by what goes through them.

    Raises:
        UsageError, DependencyError: before any work, for figures without samples or without what draws them.
        CheckpointError, DataError, NumericsError: as the parts that read and measure.
    """
    if figures is not None:
        check_available()
        check_writable(figures, "--figures")
        if config.calibration is None:
            raise UsageError("--figures needs samples: pass --calibration.")
    job = Job(observer or Silent())
    with job.stage("load", "Loading the model"):
        source = load_dense(config.model, offline=config.offline, warn=job.warn)
        dense = moved(source.model, find_device(config.device))
    targets = find_targets(dense, layers=config.layers, include=config.include, exclude=config.exclude)
    data = _calibration(config, source, job)
    stats: dict[str, LinearStats] = {}
    if data is not None:
        with job.stage("calibrate", "Calibrating", len(data.samples)) as advance:
            stats = collect(dense, targets, data.batches, Needs.COVARIANCE, on_batch=advance)
    with job.stage("inspect", "Decomposing"):
        layers = inspect_layers(dense, targets, stats, FRACTIONS)
    page = None
    if figures is not None:
        page = _draw(figures, config, _Found(dense, targets, data, stats, layers), job)
    return Inspection(layers, bool(stats), page, overview(dense, targets))


def _calibration(config: InspectJob, source: LoadedModel, job: Job) -> CalibrationData | None:
    if config.calibration_data is None:
        return None
    return read_calibration(
        open_data(config.calibration_data, source, offline=config.offline, job=job),
        Preprocessor.from_checkpoint(
            source.directory,
            source.family.modality,
            task=source.task,
            config=source.model.config,
            max_length=config.max_length,
            style=config.preprocess,
            offline=config.offline,
        ),
        job,
        samples=config.samples,
        seed=config.seed,
        batch_size=config.batch_size or batch_that_fits(source.model),
        max_bad_samples=config.max_bad_samples,
        workers=config.workers,
    )


def _draw(figures: Path, config: InspectJob, found: _Found, job: Job) -> Path:
    """Figures of the layers, their numbers, and a page with both."""
    assert found.data is not None
    dense, targets, batches = found.dense, found.targets, found.data.batches
    with job.stage("sample", "Sampling activations"):
        activations = sample_activations(dense, targets, batches, seed=config.seed)
    with job.stage("curvature", "Measuring the curvature", len(found.data.samples)) as advance:
        curvature = collect_curvature(dense, targets, batches, seed=config.seed, on_batch=advance)
    said: dict[str, Any] = {
        "model": config.model,
        "calibration": config.calibration,
        "samples": len(found.data.samples),
        "seed": config.seed,
    }
    with job.stage("figures", "Drawing"):
        return write_figures(
            figures,
            f"Layers of {base_name(config.model)}",
            said,
            targets=targets,
            plain=inspect_layers(dense, targets, {}, FRACTIONS),
            weighted=found.layers,
            stats=found.stats,
            activations=activations,
            spectra=layer_spectra(dense, targets, found.stats, activations, curvature),
        )
