"""``vitshrink finetune``: a compressed checkpoint, trained until it is as near to the dense one as the data allow."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vitshrink.cli import console
from vitshrink.cli.tables import results_table
from vitshrink.config.options import FinetuneConfig, FinetuneJob, read_recipe
from vitshrink.jobs.finetune import finetune_checkpoint
from vitshrink.runtime import processes

DATA, TRAINING, TECHNIQUES, RUN = "Data", "Training", "Techniques", "Run"
DEFAULT = FinetuneConfig()


@console.reported
def finetune_command(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="A directory that vitshrink compressed.")] = None,
    output: Annotated[str | None, typer.Argument(help="The directory to write; must not exist.")] = None,
    teacher: Annotated[str | None, typer.Option(help="The dense model: a directory or a Hub id.")] = None,
    objective: Annotated[
        str, typer.Option(help="distill: the answers of the teacher; supervised: labels.")
    ] = DEFAULT.objective,
    data: Annotated[
        str | None, typer.Option(help="Samples to train on: a folder, a file, a recipe …", rich_help_panel=DATA)
    ] = None,
    split: Annotated[str | None, typer.Option(help="Their split.", rich_help_panel=DATA)] = None,
    samples: Annotated[
        int | None, typer.Option(help="How many to use; all if not given.", rich_help_panel=DATA)
    ] = None,
    validation: Annotated[
        float, typer.Option(help="Part of them that is held out to choose the best state.", rich_help_panel=DATA)
    ] = DEFAULT.validation,
    eval_data: Annotated[
        str | None, typer.Option("--eval", help="Samples to evaluate the result on.", rich_help_panel=DATA)
    ] = None,
    eval_split: Annotated[str | None, typer.Option(help="Their split.", rich_help_panel=DATA)] = None,
    eval_limit: Annotated[int | None, typer.Option(help="Evaluate on this many at most.", rich_help_panel=DATA)] = None,
    eval_image_column: Annotated[str | None, typer.Option(help="Their column of images.", rich_help_panel=DATA)] = None,
    eval_text_column: Annotated[str | None, typer.Option(help="Their column of texts.", rich_help_panel=DATA)] = None,
    eval_text_pair_column: Annotated[
        str | None, typer.Option(help="Their column of second texts.", rich_help_panel=DATA)
    ] = None,
    eval_label_column: Annotated[str | None, typer.Option(help="Their column of labels.", rich_help_panel=DATA)] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of the images.", rich_help_panel=DATA)] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the texts.", rich_help_panel=DATA)] = None,
    text_pair_column: Annotated[
        str | None, typer.Option(help="Column of the second texts.", rich_help_panel=DATA)
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            help="Column of the labels; several with commas, one for each label or score.", rich_help_panel=DATA
        ),
    ] = None,
    class_map: Annotated[
        str | None, typer.Option(help="File that maps class names to indices.", rich_help_panel=DATA)
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a text at most.", rich_help_panel=DATA)] = None,
    max_bad_samples: Annotated[
        int | None, typer.Option(help="Unreadable samples to put up with; 1 % if not given.", rich_help_panel=DATA)
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Passes over the samples at most; 10, or what --minutes allows.", rich_help_panel=TRAINING),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Time that training may take at most.", rich_help_panel=TRAINING)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak; that of the objective if not given.", rich_help_panel=TRAINING)
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Samples a batch, for each process.", rich_help_panel=TRAINING)
    ] = DEFAULT.batch_size,
    accumulation: Annotated[
        int, typer.Option(help="Batches for each step of the optimiser.", rich_help_panel=TRAINING)
    ] = DEFAULT.accumulation,
    patience: Annotated[
        int, typer.Option(help="Stop after this many evaluations without a gain.", rich_help_panel=TRAINING)
    ] = DEFAULT.patience,
    train: Annotated[
        str, typer.Option(help="all parameters, or only the low-rank factors.", rich_help_panel=TRAINING)
    ] = DEFAULT.train,
    label_smoothing: Annotated[
        float, typer.Option(help="Of the supervised objective.", rich_help_panel=TRAINING)
    ] = DEFAULT.label_smoothing,
    distillation: Annotated[
        float | None,
        typer.Option(help="Share of the teacher in the supervised objective, 0 to 1.", rich_help_panel=TRAINING),
    ] = None,
    features: Annotated[
        float | None,
        typer.Option(help="Weight of what the blocks hand on, compared with the teacher's.", rich_help_panel=TRAINING),
    ] = DEFAULT.features,
    temperature: Annotated[
        float, typer.Option(help="Divides the logits in distillation.", rich_help_panel=TRAINING)
    ] = DEFAULT.temperature,
    augment: Annotated[
        bool, typer.Option(help="Crop and mirror images, hide tokens.", rich_help_panel=TRAINING)
    ] = DEFAULT.augment,
    mixing: Annotated[
        float | None,
        typer.Option(
            help="Part of the images that are blended with another, in distillation.", rich_help_panel=TRAINING
        ),
    ] = DEFAULT.mixing,
    views: Annotated[
        int | None,
        typer.Option(
            help="Different augmentations of a sample; new ones forever if not given.", rich_help_panel=TRAINING
        ),
    ] = None,
    blockwise: Annotated[
        int, typer.Option(help="Epochs of block-wise reconstruction before.", rich_help_panel=TECHNIQUES)
    ] = DEFAULT.blockwise,
    decatt: Annotated[
        float, typer.Option(help="Weight of the correlation of attention heads.", rich_help_panel=TECHNIQUES)
    ] = DEFAULT.decatt,
    bdia: Annotated[
        bool, typer.Option("--bdia", help="Bidirectional integration approximation.", rich_help_panel=TECHNIQUES)
    ] = False,
    reversible: Annotated[
        bool,
        typer.Option(
            "--reversible", help="BDIA, with activations recomputed from outputs.", rich_help_panel=TECHNIQUES
        ),
    ] = False,
    gamma: Annotated[
        float,
        typer.Option(
            help="Of BDIA: 0.5 as published; 0.25 or 0.125 stay nearer to the model.", rich_help_panel=TECHNIQUES
        ),
    ] = DEFAULT.gamma,
    momentum: Annotated[
        bool,
        typer.Option("--momentum", help="BDIA with one sign: a momentum residual network.", rich_help_panel=TECHNIQUES),
    ] = False,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing", help="Recompute activations block by block.", rich_help_panel=TECHNIQUES
        ),
    ] = False,
    attention: Annotated[
        str, typer.Option(help="sdpa, eager, or flash_attention_2 (on a GPU).", rich_help_panel=TECHNIQUES)
    ] = "sdpa",
    precision: Annotated[
        str, typer.Option(help="auto, no, bf16 or fp16.", rich_help_panel=TECHNIQUES)
    ] = DEFAULT.precision,
    checkpoints: Annotated[
        str | None,
        typer.Option(
            help="A directory for the state of training: the same command goes on after a kill.", rich_help_panel=RUN
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order, the views and the split.", rich_help_panel=RUN)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …", rich_help_panel=RUN)] = "auto",
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
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors.", rich_help_panel=RUN)] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, and nothing else, on stdout.", rich_help_panel=RUN)
    ] = False,
) -> None:
    """Train a compressed MODEL and write it to OUTPUT; its ranks and sizes stay, and it never ends worse.

    Example: vitshrink finetune ./small ./recovered --teacher ./model --data ./photos --minutes 5
    """
    flags: dict[str, Any] = {
        name: value
        for name, value in context.params.items()
        if (given := context.get_parameter_source(name)) is not None and given.name == "COMMANDLINE"
    }
    for own in ("config", "quiet", "as_json"):
        flags.pop(own, None)
    if "eval_data" in flags:
        flags["eval"] = flags.pop("eval_data")
    recipe = read_recipe(config) if config else {}
    job = FinetuneJob.from_mapping(recipe | flags, str(config) if config else "the command line")
    processes.join(job.device)
    try:
        silent = quiet or as_json or not processes.is_main()
        result = finetune_checkpoint(job, console.TerminalObserver(quiet=silent))
        if not processes.is_main():
            return
    finally:
        processes.leave()
    if as_json:
        console.show_json(result.report.to_dict())
    elif not quiet:
        console.show(results_table([result.report]))
        console.say(f"{result.directory}  (report.md, report.json beside the weights)")
