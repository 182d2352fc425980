"""``vitshrink export``: a checkpoint for programs that do not have vitshrink."""

from typing import Annotated

import typer

from vitshrink.cli import console
from vitshrink.cli.tables import Table
from vitshrink.jobs.export import TOLERANCE, export
from vitshrink.report import size


@console.reported
def export_command(
    model: Annotated[str, typer.Argument(help="A checkpoint, dense or compressed: a directory or a Hub id.")],
    output: Annotated[str, typer.Argument(help="The directory to write; must not exist.")],
    to: Annotated[
        str,
        typer.Option(
            help="onnx: model.onnx for onnxruntime and others; torch: model.pt2, a torch.export program; dense: an "
            "ordinary checkpoint, factors multiplied out (loads anywhere, no smaller)."
        ),
    ],
    tolerance: Annotated[float, typer.Option(help="Largest difference from PyTorch to put up with.")] = TOLERANCE,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that vitshrink wrote.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Only JSON on stdout.")] = False,
) -> None:
    """Write MODEL into OUTPUT in another form, compared with the model on batches of several sizes.

    Example: vitshrink export ./my-vit-small ./my-vit-onnx --to onnx
    """
    found = export(
        model,
        output,
        to,
        tolerance=tolerance,
        offline=offline,
        overwrite=overwrite,
        observer=console.TerminalObserver(quiet=quiet or as_json),
    )
    if as_json:
        console.show_json(found.to_dict())
    elif not quiet:
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
