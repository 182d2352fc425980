"""``vitshrink eval``: a model measured on a data set."""

from pathlib import Path
from typing import Annotated

import typer

from vitshrink.cli import console
from vitshrink.cli.tables import evaluation_table
from vitshrink.config.options import DataConfig, Preprocessing, parse_quantity
from vitshrink.config.tokens import TokenOptions
from vitshrink.evaluation.gates import Gates
from vitshrink.jobs.evaluate import evaluate_checkpoint
from vitshrink.models.structures.tokens import MixedTokens
from vitshrink.report import append_rows, check_appendable
from vitshrink.runtime import processes


@console.reported
def evaluate_command(
    model: Annotated[
        str,
        typer.Argument(help="A checkpoint, dense or compressed: a directory or a Hub id; or an exported .onnx file."),
    ],
    data: Annotated[str, typer.Option(help="Samples: a folder, a file, a recipe or a Hub data set.")],
    baseline: Annotated[str | None, typer.Option(help="The dense model to compare with.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the data.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="This many samples at most, drawn by seed.")] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Samples a batch; halved where a GPU has too little memory.")
    ] = 32,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Threads that decode images; one a core if not given.")
    ] = None,
    preprocess: Annotated[
        Preprocessing,
        typer.Option(help="checkpoint: as it says; timm: resized and cropped as there, to compare with its figures."),
    ] = "checkpoint",
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens of a text at most.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of the images.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the texts.")] = None,
    text_pair_column: Annotated[str | None, typer.Option(help="Column of the second texts.")] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of the labels; several with commas, one for each label or score.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="File with the classes of a flat folder of images: `image class` lines.")
    ] = None,
    class_map: Annotated[Path | None, typer.Option(help="File that maps class names to indices.")] = None,
    max_bad_samples: Annotated[int | None, typer.Option(min=0, help="Unreadable samples to put up with.")] = None,
    min_accuracy: Annotated[float | None, typer.Option(help="Exit with 3 below this accuracy, in percent.")] = None,
    max_drop: Annotated[float | None, typer.Option(help="Exit with 3 when more points of accuracy are lost.")] = None,
    max_changed: Annotated[
        float | None, typer.Option(help="Exit with 3 when more percent of the predictions differ from the baseline's.")
    ] = None,
    max_kl: Annotated[float | None, typer.Option(help="Exit with 3 when the divergence is larger.")] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Exit with 3 when the relative error of scores or features is larger.")
    ] = None,
    max_size: Annotated[str | None, typer.Option(help="Exit with 3 when the files are larger, e.g. 90MB.")] = None,
    max_latency_ratio: Annotated[
        float | None, typer.Option(help="Exit with 3 when a pass takes longer than this fraction of the baseline's.")
    ] = None,
    latency: Annotated[
        list[int] | None, typer.Option(min=1, help="Time a batch of this size; repeat it for several.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Append the figures as a row to this file.")] = None,
    tokens: Annotated[str, typer.Option(help="all, or mixed: few patches where there is no detail.")] = "all",
    token_budget: Annotated[int | None, typer.Option(min=1, help="Patches of an image, with --tokens mixed.")] = None,
    token_levels: Annotated[int, typer.Option(min=2, help="Sizes of patches, each twice the one before.")] = 2,
    token_scorer: Annotated[str, typer.Option(help="What decides on a split: blur or features.")] = "blur",
    resolution: Annotated[int | None, typer.Option(min=1, help="Pixels of an image, if not the model's.")] = None,
    landmarks: Annotated[
        int | None,
        typer.Option(min=1, help="Landmarks of every attention map, which are then of low rank (ViT and DeiT)."),
    ] = None,
    landmark_form: Annotated[str, typer.Option(help="What such a map is: pooled or nystrom.")] = "pooled",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the samples, the masks and the intervals.")] = 0,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Only JSON on stdout.")] = False,
) -> None:
    """Measure MODEL on a data set: accuracy where there are labels, fidelity to a baseline where there is one.

    Example: vitshrink eval ./my-vit-small --baseline ./my-vit --data ./val
    """
    largest = None if max_size is None else parse_quantity(max_size, "--max-size")
    gates = Gates(min_accuracy, max_drop, max_changed, max_kl, max_error, largest, max_latency_ratio)
    gates.require(baseline=baseline)
    TokenOptions(
        tokens=tokens,  # type: ignore[arg-type]
        token_budget=token_budget,
        token_levels=token_levels,
        token_scorer=token_scorer,
        landmarks=landmarks,
        landmark_form=landmark_form,
    )
    mixed = None if token_budget is None else MixedTokens(token_budget, token_levels, token_scorer)
    processes.join(device)
    if csv is not None and processes.is_main():
        check_appendable(csv)
    found = evaluate_checkpoint(
        model,
        DataConfig(data, split, image_column, text_column, text_pair_column, label_column, labels),
        baseline=baseline,
        limit=limit,
        batch_size=batch_size,
        max_length=max_length,
        preprocess=preprocess,
        class_map=class_map,
        max_bad_samples=max_bad_samples,
        workers=workers,
        latency=latency or ((1,) if max_latency_ratio is not None else ()),
        device=device,
        seed=seed,
        offline=offline,
        resolution=resolution,
        tokens=mixed,
        landmarks=landmarks,
        landmark_form=landmark_form,
        observer=console.TerminalObserver(quiet=quiet or as_json or not processes.is_main()),
    )
    main = processes.is_main()
    processes.leave()
    if not main:
        return
    if csv is not None:
        append_rows(csv, [found.to_row()])
    if as_json:
        console.show_json(found.to_dict())
    else:
        console.show(evaluation_table(found))
    gates.check(found.evaluation, nbytes=found.footprint.bytes, latency_ratio=found.latency_ratio)
