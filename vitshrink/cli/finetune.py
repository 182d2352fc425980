"""``vitshrink finetune``: a compressed checkpoint, trained until it is as near to the dense one as the data allow."""

from typing import Any

from vitshrink.cli import checks, console
from vitshrink.cli.flags import command
from vitshrink.cli.groups import DisplayOptions, RecipeOptions
from vitshrink.config.options import FinetuneJob, read_recipe


@command(FinetuneJob, RecipeOptions, DisplayOptions)
def finetune_command(flags: dict[str, Any], recipe: RecipeOptions, display: DisplayOptions) -> None:
    """Train a compressed MODEL to recover quality, and write it to OUTPUT. Its ranks and size do not change.

    Example: vitshrink finetune ./small ./recovered --teacher ./model --data ./photos --minutes 5
    """
    where = str(recipe.config) if recipe.config else "the command line"
    job = checks.job_of(FinetuneJob, (read_recipe(recipe.config) if recipe.config else {}) | flags, where)
    checks.check_models(job)

    from vitshrink.cli.rendering import results_table
    from vitshrink.jobs.finetune import finetune_checkpoint
    from vitshrink.runtime import processes

    processes.join(job.device)
    try:
        result = finetune_checkpoint(job, console.TerminalObserver(quiet=display.silent or not processes.is_main()))
        if not processes.is_main():
            return
    finally:
        processes.leave()
    if display.as_json:
        console.show_json(result.report.to_dict())
    elif not display.quiet:
        console.show(results_table([result.report]))
        console.say(f"{result.directory}  (with report.md and report.json)")
