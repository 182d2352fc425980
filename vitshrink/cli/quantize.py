"""``vitshrink quantize``: integer weights for a checkpoint, dense or compressed."""

from pathlib import Path
from typing import Annotated

import typer

from vitshrink.cli import console
from vitshrink.cli.tables import results_table
from vitshrink.config.options import DataConfig
from vitshrink.jobs.quantize import quantize_checkpoint


@console.reported
def quantize_command(
    model: Annotated[str, typer.Argument(help="A checkpoint, dense or compressed: a directory or a Hub id.")],
    output: Annotated[str, typer.Argument(help="The directory to write; must not exist.")],
    weights: Annotated[str, typer.Option(help="int8, or int4 in groups of 32.")] = "int8",
    activations: Annotated[
        str | None,
        typer.Option(help="dynamic: int8 arithmetic (the default for int8); none: weights only, no faster."),
    ] = None,
    eval_data: Annotated[str | None, typer.Option("--eval", help="Samples to evaluate on.")] = None,
    eval_split: Annotated[str | None, typer.Option(help="Its split.")] = None,
    eval_limit: Annotated[int | None, typer.Option(min=1, help="Evaluate on this many at most.")] = None,
    baseline: Annotated[str | None, typer.Option(help="What to compare with; MODEL itself if not given.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of the images.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the texts.")] = None,
    text_pair_column: Annotated[str | None, typer.Option(help="Column of the second texts.")] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of the labels; several with commas, one for each label or score.")
    ] = None,
    class_map: Annotated[Path | None, typer.Option(help="File that maps class names to indices.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a batch.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the samples and the intervals.")] = 0,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that vitshrink wrote.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Only JSON on stdout.")] = False,
) -> None:
    """Store the matrices of MODEL as integers in OUTPUT, and report what it cost.

    Example: vitshrink quantize ./my-vit-small ./my-vit-int8 --baseline ./my-vit --eval ./val
    """
    data = None
    if eval_data is not None:
        data = DataConfig(eval_data, eval_split, image_column, text_column, text_pair_column, label_column)
    result = quantize_checkpoint(
        model,
        output,
        weights=weights,
        activations=activations,
        data=data,
        baseline=baseline,
        limit=eval_limit,
        batch_size=batch_size,
        class_map=class_map,
        seed=seed,
        offline=offline,
        overwrite=overwrite,
        observer=console.TerminalObserver(quiet=quiet or as_json),
    )
    if as_json:
        console.show_json(result.report.to_dict())
    elif not quiet:
        console.show(results_table([result.report]))
        console.say(f"{result.directory}")
