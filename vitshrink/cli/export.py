"""``vitshrink export``: a checkpoint for programs that do not have vitshrink."""

from typing import Any

from vitshrink.cli import checks, console
from vitshrink.cli.flags import command
from vitshrink.cli.groups import DisplayOptions
from vitshrink.cli.table import Table
from vitshrink.config.options import ExportJob


@command(ExportJob, DisplayOptions)
def export_command(flags: dict[str, Any], display: DisplayOptions) -> None:
    """Export MODEL to OUTPUT for other programs, after comparing both on batches of several sizes.

    Example: vitshrink export ./my-vit-small ./my-vit-onnx --to onnx
    """
    job = checks.job_of(ExportJob, flags, "the command line")
    checks.check_models(job)

    from vitshrink.jobs.export import export
    from vitshrink.report import size

    found = export(
        job.model,
        job.output,
        job.to,
        tower=job.tower,
        tolerance=job.tolerance,
        batch_size=job.batch_size,
        offline=job.offline,
        overwrite=job.overwrite,
        observer=console.TerminalObserver(quiet=display.silent),
    )
    if display.as_json:
        console.show_json(found.to_dict())
    elif not display.quiet:
        sizes = ", ".join(map(str, found.batch_sizes))
        table = Table(["", found.form])
        table.add("file", str(found.directory / found.file))
        table.add("size", size(found.bytes))
        table.add("numbers stored", f"{found.parameters:,}")
        table.add("largest difference", f"{found.difference:.2g} (outputs up to {found.largest:.3g})")
        if found.rounding:
            table.add("rounding of activations", f"{found.rounding:.2g}")
        table.add("compared at batches of", sizes)
        console.show(table)
