"""``vitshrink inspect``: the layers of a model before anything is done to them."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vitshrink.cli import console
from vitshrink.cli.tables import Table
from vitshrink.config.options import DataConfig, Layers
from vitshrink.data import Batch, Preprocessor, recipe_defaults
from vitshrink.data.opening import open_data, read_calibration
from vitshrink.errors import UsageError
from vitshrink.jobs.inspection import (
    LayerInspection,
    check_available,
    inspect_layers,
    layer_spectra,
    rank_at,
    sample_activations,
    write_figures,
)
from vitshrink.models.loading import load_dense
from vitshrink.models.publication import check_writable
from vitshrink.models.targets import find_targets
from vitshrink.report.summary import base_name
from vitshrink.runtime.device import find_device
from vitshrink.runtime.observer import Job
from vitshrink.statistics.calibration import collect
from vitshrink.statistics.curvature import collect_curvature
from vitshrink.statistics.needs import Needs
from vitshrink.statistics.stats import LinearStats

FRACTIONS = (0.125, 0.25, 0.375, 0.5, 0.75)


@console.reported
def inspect_command(
    model: Annotated[str, typer.Argument(help="A dense checkpoint: a directory or a Hub id.")],
    calibration: Annotated[str | None, typer.Option(help="Samples that weight the spectra.")] = None,
    calibration_split: Annotated[str | None, typer.Option(help="Their split.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="How many to use; 128, or what a recipe says.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of the images.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the texts.")] = None,
    text_pair_column: Annotated[str | None, typer.Option(help="Column of the second texts.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens of a text at most.")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Write figures, their numbers and a page with both to this directory.")
    ] = None,
    layers: Annotated[Layers, typer.Option(help="Which layers of a block.")] = "all",
    include: Annotated[list[str] | None, typer.Option(help="Only layers whose name matches this.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="No layer whose name matches this.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a batch.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "auto",
    seed: Annotated[int | None, typer.Option(help="Of the samples; 0, or what a recipe says.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Only JSON on stdout.")] = False,
) -> None:
    """List the layers of MODEL that can be factorised: shape, break-even rank, effective rank, energy by rank.

    With --calibration the spectra are those of the layers' outputs on real samples, which is what counts.
    """
    if figures is not None:
        check_available()
        check_writable(figures, "--figures")
        if calibration is None:
            raise UsageError("--figures shows what goes through the layers: pass --calibration.")
    defaults = recipe_defaults(calibration)
    samples = defaults.get("samples", 128) if samples is None else samples
    seed = defaults.get("seed", 0) if seed is None else seed
    job = Job(console.TerminalObserver(quiet=as_json))
    with job.stage("load", "Loading the model"):
        source = load_dense(model, offline=offline, warn=job.warn)
        dense = source.model
        dense.to(find_device(device))  # type: ignore[arg-type] # wrapped, as mypy sees it
    targets = find_targets(dense, layers=layers, include=include or (), exclude=exclude or ())
    stats: dict[str, LinearStats] = {}
    batches: list[Batch] = []
    if calibration is not None:
        columns = DataConfig(calibration, calibration_split, image_column, text_column, text_pair_column)
        data = read_calibration(
            open_data(columns, source, offline=offline, job=job),
            Preprocessor.from_checkpoint(
                source.directory, source.family.modality, config=dense.config, max_length=max_length, offline=offline
            ),
            job,
            samples=samples,
            seed=seed,
            batch_size=batch_size,
        )
        batches = data.batches
        with job.stage("calibrate", "Calibrating", len(data.samples)) as advance:
            stats = collect(dense, targets, batches, Needs.COVARIANCE, on_batch=advance)
    with job.stage("inspect", "Decomposing"):
        found = inspect_layers(dense, targets, stats, FRACTIONS)
    if figures is not None:
        with job.stage("sample", "Sampling activations"):
            activations = sample_activations(dense, targets, batches, seed=seed)
        with job.stage("curvature", "Measuring the curvature", len(data.samples)) as advance:
            curvature = collect_curvature(dense, targets, batches, seed=seed, on_batch=advance)
        with job.stage("figures", "Drawing"):
            page = write_figures(
                figures,
                f"Layers of {base_name(model)}",
                {"model": model, "calibration": calibration, "samples": len(data.samples), "seed": seed},
                targets=targets,
                plain=inspect_layers(dense, targets, {}, FRACTIONS),
                weighted=found,
                stats=stats,
                activations=activations,
                spectra=layer_spectra(dense, targets, stats, activations, curvature),
            )
    if as_json:
        console.show_json([asdict(layer) for layer in found])
    else:
        console.show(_table(found, weighted=bool(stats)))
        if figures is not None:
            console.say(str(page))


def _table(layers: list[LayerInspection], *, weighted: bool) -> Table:
    kind = "activation-weighted" if weighted else "plain"
    table = Table(
        ["layer", "shape", "parameters", "break-even", "effective rank", *(f"{f:.1%} rank" for f in FRACTIONS)],
        caption=f"the last columns: share of the {kind} squared spectrum kept at that fraction of the full rank",
    )
    for layer in layers:
        energies = (layer.energy[rank_at(fraction, layer.shape)] for fraction in FRACTIONS)
        table.add(
            layer.name,
            "{} × {}".format(*layer.shape),
            f"{layer.parameters:,}",
            str(layer.break_even),
            f"{layer.effective_rank:.1f}",
            *(f"{energy:.1%}" for energy in energies),
        )
    return table
