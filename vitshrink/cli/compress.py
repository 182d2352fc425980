"""``vitshrink compress``: flags, or a recipe, to a config; results to a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vitshrink.cli import console
from vitshrink.cli.tables import plan_table, results_table
from vitshrink.config.options import SIZES, CompressConfig, parse_option, read_recipe, renamed
from vitshrink.data import recipe_defaults
from vitshrink.errors import UsageError
from vitshrink.jobs.compress import CompressionResult, compress
from vitshrink.models.hub import push, require_hub
from vitshrink.report import append_rows, check_appendable, report_row
from vitshrink.runtime import processes

SIZE, DATA, LAYERS, TOKENS = "Size", "Data", "Layers and method", "Images and tokens"
RECOVERY, RUN = "Recovery", "Run"


@console.reported
def compress_command(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="A checkpoint directory, or a Hub id.")] = None,
    output: Annotated[str | None, typer.Argument(help="The directory to write; must not exist.")] = None,
    keep: Annotated[
        list[float] | None,
        typer.Option(
            help="Fraction of the whole model's parameters to keep; repeat it for several outputs.",
            rich_help_panel=SIZE,
        ),
    ] = None,
    target_params: Annotated[
        str | None, typer.Option(help="Parameters of the result, e.g. 22M.", rich_help_panel=SIZE)
    ] = None,
    target_size: Annotated[
        str | None, typer.Option(help="Bytes of the weight files, e.g. 90MB.", rich_help_panel=SIZE)
    ] = None,
    rank: Annotated[int | None, typer.Option(help="One rank for every layer.", rich_help_panel=SIZE)] = None,
    explained_variance: Annotated[
        float | None,
        typer.Option(
            help="In every layer the smallest rank that keeps this share of its energy, e.g. 0.9.",
            rich_help_panel=SIZE,
        ),
    ] = None,
    max_changed: Annotated[
        float | None,
        typer.Option(
            help="The smallest model that changes at most this many percent of the predictions on held-out "
            "calibration samples (no labels needed).",
            rich_help_panel=SIZE,
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="The smallest model at most this many nats of KL divergence from the dense one on them.",
            rich_help_panel=SIZE,
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            help="The same for scores and features: their squared error, as a share of their spread, e.g. 0.01.",
            rich_help_panel=SIZE,
        ),
    ] = None,
    max_drop: Annotated[float | None, typer.Option(hidden=True, help="The old name of --max-changed.")] = None,
    method: Annotated[
        str, typer.Option(help="See `vitshrink methods`.", rich_help_panel=LAYERS)
    ] = CompressConfig.method,
    allocation: Annotated[
        str | None,
        typer.Option(
            help="How ranks are shared out: uniform-rank, uniform-ratio, energy, loss, measured. Default: the method's",
            rich_help_panel=LAYERS,
        ),
    ] = None,
    compensation: Annotated[
        str | None,
        typer.Option(
            help="Repair after truncation: none, bias, residual, rescale; the method's own if not given.",
            rich_help_panel=LAYERS,
        ),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="An option of the method, e.g. alpha=0.3.", rich_help_panel=LAYERS)
    ] = None,
    rank_multiple: Annotated[
        int, typer.Option(help="Ranks are multiples of this.", rich_help_panel=LAYERS)
    ] = CompressConfig.rank_multiple,
    storage: Annotated[
        str,
        typer.Option(
            help="gauge: r(m+n-r) numbers a layer; factors: r(m+n); auto: what goes with the method.",
            rich_help_panel=LAYERS,
        ),
    ] = CompressConfig.storage,
    quantize: Annotated[
        str | None,
        typer.Option(help="Store factors and dense layers as int8 or int4 as well.", rich_help_panel=LAYERS),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            help="With --quantize: dynamic (int8 arithmetic, the default for int8) or none.", rich_help_panel=LAYERS
        ),
    ] = None,
    refine: Annotated[
        int,
        typer.Option(
            help="Times the curvature is estimated again on the compressed model, for every size.",
            rich_help_panel=LAYERS,
        ),
    ] = CompressConfig.refine,
    precision: Annotated[
        str,
        typer.Option(
            help="Of the passes that gradients are taken through: bf16, no (float32), or auto (bf16 where it is fast).",
            rich_help_panel=LAYERS,
        ),
    ] = CompressConfig.precision,
    probes: Annotated[
        int, typer.Option(help="Backward passes a batch for the curvature.", rich_help_panel=LAYERS)
    ] = CompressConfig.probes,
    layers: Annotated[str, typer.Option(help="attention, mlp or all.", rich_help_panel=LAYERS)] = "all",
    include: Annotated[
        list[str] | None, typer.Option(help="Only layers whose name matches this.", rich_help_panel=LAYERS)
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="No layer whose name matches this.", rich_help_panel=LAYERS)
    ] = None,
    tokens: Annotated[
        str,
        typer.Option(
            help="all, or mixed: large patches where an image has no detail (ViT and DeiT).", rich_help_panel=TOKENS
        ),
    ] = CompressConfig.tokens,
    token_budget: Annotated[
        int | None, typer.Option(help="Patches of an image, with --tokens mixed.", rich_help_panel=TOKENS)
    ] = None,
    token_levels: Annotated[
        int, typer.Option(help="Sizes of patches, each twice as wide as the one before.", rich_help_panel=TOKENS)
    ] = CompressConfig.token_levels,
    token_scorer: Annotated[
        str, typer.Option(help="What decides on a split: blur or features.", rich_help_panel=TOKENS)
    ] = CompressConfig.token_scorer,
    resolution: Annotated[
        int | None,
        typer.Option(
            help="Pixels of an image, if not the model's; positions are interpolated.", rich_help_panel=TOKENS
        ),
    ] = None,
    landmarks: Annotated[
        int | None,
        typer.Option(
            help="Landmarks of every attention map, which are then of low rank (ViT and DeiT).", rich_help_panel=TOKENS
        ),
    ] = None,
    landmark_form: Annotated[
        str, typer.Option(help="What such a map is: pooled or nystrom.", rich_help_panel=TOKENS)
    ] = CompressConfig.landmark_form,
    calibration: Annotated[
        str | None,
        typer.Option(help="Unlabelled samples: a folder, a file, a recipe or a Hub data set.", rich_help_panel=DATA),
    ] = None,
    calibration_split: Annotated[str | None, typer.Option(help="Its split.", rich_help_panel=DATA)] = None,
    samples: Annotated[int, typer.Option(help="How many to use.", rich_help_panel=DATA)] = CompressConfig.samples,
    holdout: Annotated[
        int,
        typer.Option(
            help="How many others judge --max-changed and --max-kl, and measure the fidelity without --eval.",
            rich_help_panel=DATA,
        ),
    ] = CompressConfig.holdout,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a text at most.", rich_help_panel=DATA)] = None,
    eval_data: Annotated[
        str | None, typer.Option("--eval", help="Samples to evaluate on.", rich_help_panel=DATA)
    ] = None,
    eval_split: Annotated[str | None, typer.Option(help="Its split.", rich_help_panel=DATA)] = None,
    eval_limit: Annotated[int | None, typer.Option(help="Evaluate on this many at most.", rich_help_panel=DATA)] = None,
    eval_image_column: Annotated[str | None, typer.Option(help="Its column of images.", rich_help_panel=DATA)] = None,
    eval_text_column: Annotated[str | None, typer.Option(help="Its column of texts.", rich_help_panel=DATA)] = None,
    eval_text_pair_column: Annotated[
        str | None, typer.Option(help="Its column of second texts.", rich_help_panel=DATA)
    ] = None,
    eval_label_column: Annotated[str | None, typer.Option(help="Its column of labels.", rich_help_panel=DATA)] = None,
    eval_labels: Annotated[
        str | None,
        typer.Option(help="File with the classes of a flat folder: `image class` lines.", rich_help_panel=DATA),
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Calibration column of images.", rich_help_panel=DATA)
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Calibration column of texts.", rich_help_panel=DATA)] = None,
    text_pair_column: Annotated[
        str | None, typer.Option(help="Column of their second texts.", rich_help_panel=DATA)
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of their labels.", rich_help_panel=DATA)] = None,
    class_map: Annotated[
        str | None, typer.Option(help="File that maps class names to indices.", rich_help_panel=DATA)
    ] = None,
    max_bad_samples: Annotated[
        int | None, typer.Option(help="Unreadable samples to put up with; 1 % if not given.", rich_help_panel=DATA)
    ] = None,
    preprocess: Annotated[
        str,
        typer.Option(help="checkpoint: as it says; timm: resized and cropped as there.", rich_help_panel=DATA),
    ] = CompressConfig.preprocess,
    workers: Annotated[
        int | None, typer.Option(help="Threads that decode images; one a core if not given.", rich_help_panel=DATA)
    ] = None,
    latency: Annotated[
        list[int] | None, typer.Option(help="Time a batch of this size; repeat it for several.", rich_help_panel=RUN)
    ] = None,
    thumbnails: Annotated[
        bool,
        typer.Option(
            "--thumbnails",
            help="Show the images that dense and compressed model disagree on in the report, which then holds them.",
            rich_help_panel=RUN,
        ),
    ] = False,
    csv: Annotated[
        Path | None, typer.Option(help="Append a row for every output to this file.", rich_help_panel=RUN)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of samples.", rich_help_panel=RUN)] = CompressConfig.seed,
    batch_size: Annotated[int, typer.Option(help="Samples a batch.", rich_help_panel=RUN)] = CompressConfig.batch_size,
    cache: Annotated[
        str | None,
        typer.Option(
            help="A directory that keeps statistics and factors: another size of the same job is then quick, most of "
            "all with --refine 0.",
            rich_help_panel=RUN,
        ),
    ] = None,
    save_every: Annotated[
        float,
        typer.Option(
            help="Seconds between two savings of what was computed, from which the same command goes on after a kill.",
            rich_help_panel=RUN,
        ),
    ] = CompressConfig.save_every,
    finetune: Annotated[
        str | None,
        typer.Option(
            help="Train afterwards: distill (no labels needed) or supervised; see `vitshrink finetune --help`.",
            rich_help_panel=RECOVERY,
        ),
    ] = None,
    finetune_option: Annotated[
        list[str] | None,
        typer.Option(
            help="A flag of `vitshrink finetune`, e.g. minutes=5 or learning-rate=1e-4; repeat it for several.",
            rich_help_panel=RECOVERY,
        ),
    ] = None,
    attention: Annotated[
        str, typer.Option(help="sdpa, eager, or flash_attention_2 (in training, on a GPU).", rich_help_panel=RUN)
    ] = CompressConfig.attention,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …", rich_help_panel=RUN)] = CompressConfig.device,
    dtype: Annotated[
        str | None, typer.Option(help="Type to save in; that of the source if not given.", rich_help_panel=RUN)
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Recipe with any of these as entries; flags go before.", rich_help_panel=RUN)
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.", rich_help_panel=RUN)] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that vitshrink wrote.", rich_help_panel=RUN)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the sizes; write nothing.", rich_help_panel=RUN)
    ] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(help="Upload the finished result to this Hub model, such as me/small-vit.", rich_help_panel=RUN),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push-to-hub: make it private.", rich_help_panel=RUN)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors.", rich_help_panel=RUN)] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, and nothing else, on stdout.", rich_help_panel=RUN)
    ] = False,
) -> None:
    """Compress MODEL into OUTPUT and report what it cost.

    Example: vitshrink compress ./my-vit ./my-vit-small --keep 0.6 --calibration ./photos --eval ./val
    """
    flags: dict[str, Any] = {
        name: value
        for name, value in context.params.items()
        if (given := context.get_parameter_source(name)) is not None and given.name == "COMMANDLINE"
    }
    for own in ("config", "csv", "quiet", "as_json", "push_to_hub", "private"):
        flags.pop(own, None)
    if "eval_data" in flags:
        flags["eval"] = flags.pop("eval_data")
    if option:
        flags["options"] = dict(_parse_option(text) for text in flags.pop("option"))
    observer = console.TerminalObserver(quiet=quiet or as_json)
    flags = renamed(flags, "the command line", observer.warn)
    recipe = renamed(read_recipe(config), str(config), observer.warn) if config else {}
    if "finetune" in flags or finetune_option:
        flags["finetune"] = _finetune(flags, recipe)
    if any(name in flags for name in SIZES):  # a size on the command line replaces the recipe's
        recipe = {name: value for name, value in recipe.items() if str(name).replace("-", "_") not in SIZES}
    entries = recipe | flags
    entries = recipe_defaults(entries.get("calibration")) | entries
    job = CompressConfig.from_mapping(entries, str(config) if config else "the command line")
    if csv is not None:
        check_appendable(csv)
    if push_to_hub is not None:
        if len(job.keep) > 1 or job.dry_run:
            raise UsageError("--push-to-hub uploads one finished model: give one size, and no --dry-run.")
        require_hub(push_to_hub, offline=job.offline)
    processes.join(job.device)
    try:
        results = compress(job, console.TerminalObserver(quiet=quiet or as_json or not processes.is_main()))
        if not processes.is_main():
            return
    finally:
        processes.leave()
    if csv is not None:
        append_rows(csv, [report_row(result.report, str(result.directory or "")) for result in results])
    _show(results, job, quiet=quiet, as_json=as_json)
    if push_to_hub is not None:
        address = push(Path(job.output), push_to_hub, private=private)
        if not (quiet or as_json):
            console.say(address)


def _show(results: Sequence[CompressionResult], job: CompressConfig, *, quiet: bool, as_json: bool) -> None:
    if as_json:
        documents = [result.report.to_dict() for result in results]
        console.show_json(documents[0] if len(documents) == 1 else documents)
        return
    if not quiet:
        if job.dry_run:
            for result in results:
                console.show(plan_table(result.report))
        console.show(results_table([result.report for result in results]))
        for result in results:
            if result.directory is not None:
                line = f"{result.directory}  (report.html, report.md, report.json beside the weights)"
                console.say(line)
        if len(results) > 1 and not job.dry_run:
            console.say(f"{Path(job.output) / 'comparison.html'}")


def _finetune(flags: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings of the recipe with those of the flags over them."""
    own = dict(_parse_option(text) for text in flags.pop("finetune_option", ()))
    before = recipe.get("finetune") or {}
    before = dict(before) if isinstance(before, dict) else {"objective": before}
    if "finetune" in flags:
        own["objective"] = flags["finetune"]
    elif "objective" not in before:
        raise UsageError("--finetune-option needs --finetune distill or --finetune supervised.")
    return {key.replace("-", "_"): value for key, value in (before | own).items()}


def _parse_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"{text!r} is no option: write name=value.")
    return name, parse_option(value)
