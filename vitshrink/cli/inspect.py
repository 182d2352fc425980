"""``vitshrink inspect``: the layers of a model before anything is done to them."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vitshrink.cli import checks, console
from vitshrink.cli.flags import command
from vitshrink.cli.groups import FigureOptions, JsonOptions
from vitshrink.cli.table import Table
from vitshrink.config.options import InspectJob

if TYPE_CHECKING:
    from vitshrink.jobs.inspection.job import Inspection


@command(InspectJob, FigureOptions, JsonOptions)
def inspect_command(flags: dict[str, Any], figures: FigureOptions, display: JsonOptions) -> None:
    """List the layers of MODEL that can be compressed: shape, break-even rank, effective rank, energy by rank.

    First, it says what was found in the model and what stays unchanged.
    With --calibration, the spectra are those of the layer outputs on real samples.
    """
    job = checks.job_of(InspectJob, flags, "the command line")
    checks.check_models(job)

    from vitshrink.jobs.inspection.job import inspect_checkpoint

    found = inspect_checkpoint(job, figures.figures, console.TerminalObserver(quiet=display.as_json))
    if display.as_json:
        console.show_json([asdict(layer) for layer in found.layers])
    else:
        for line in found.overview.lines():
            console.say(line, prose=True)
        console.show(_table(found))
        if found.page is not None:
            console.say(str(found.page))


def _table(found: "Inspection") -> Table:
    from vitshrink.jobs.inspection import rank_at
    from vitshrink.jobs.inspection.job import FRACTIONS

    kind = "activation-weighted" if found.weighted else "plain"
    table = Table(
        ["layer", "shape", "parameters", "break-even", "effective rank", *(f"{f:.1%} rank" for f in FRACTIONS)],
        caption=(
            f"the last columns: fraction of the {kind} squared spectrum that is kept at this fraction of the full rank"
        ),
    )
    for layer in found.layers:
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
