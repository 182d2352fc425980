"""``vitshrink compress``: flags, or a recipe, to a config; results to a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitshrink.cli import catalog, checks, console
from vitshrink.cli.flags import command
from vitshrink.cli.groups import DisplayOptions, RecipeOptions, RowOptions, UploadOptions
from vitshrink.config.options import SIZES, CompressConfig, read_recipe, renamed
from vitshrink.errors import UsageError
from vitshrink.runtime.storage import is_url

if TYPE_CHECKING:
    from vitshrink.jobs.result import CompressionResult


@command(CompressConfig, RowOptions, RecipeOptions, UploadOptions, DisplayOptions, suggested={"method": catalog.names})
def compress_command(
    flags: dict[str, Any], rows: RowOptions, recipe: RecipeOptions, upload: UploadOptions, display: DisplayOptions
) -> None:
    """Compress MODEL, write it to OUTPUT, and report sizes, quality and time.

    Example: vitshrink compress ./my-vit ./my-vit-small --keep 0.6 --calibration ./photos --eval ./val
    """
    job = _job(flags, recipe.config, display)
    if upload.push_to_hub is not None and (len(job.keep) > 1 or job.dry_run):
        raise UsageError("--push-to-hub uploads one finished model: give one size, and remove --dry-run.")
    if upload.push_to_hub is not None and is_url(job.output):
        raise UsageError(f"--push-to-hub uploads a local directory, not {job.output}: give a path.")
    checks.check_methods(job)
    checks.check_models(job)
    results = _run(job, rows, upload, display)
    if results is None:
        return
    _show(results, job, display)
    if upload.push_to_hub is not None:
        from vitshrink.models.hub import push

        address = push(Path(job.output), upload.push_to_hub, private=upload.private)
        if not display.silent:
            console.say(address)


def _job(flags: Mapping[str, Any], config: Path | None, display: DisplayOptions) -> CompressConfig:
    """What the flags ask for and, where they say nothing, the recipe, and then that of the data."""
    warn = console.TerminalObserver(quiet=display.silent).warn
    flags = renamed(flags, "the command line", warn)
    recipe = renamed(read_recipe(config), str(config), warn) if config else {}
    if "finetune" in flags:
        flags["finetune"] = _finetune(flags["finetune"], recipe.get("finetune") or {})
    if any(name in flags for name in SIZES):  # a size on the command line replaces the recipe's
        recipe = {name: value for name, value in recipe.items() if str(name).replace("-", "_") not in SIZES}
    where = str(config) if config else "the command line"
    return checks.job_of(CompressConfig, recipe | flags, where)


def _finetune(flags: Mapping[str, Any], recipe: Any) -> dict[str, Any]:
    """The settings of the recipe with those of the flags over them."""
    before = dict(recipe) if isinstance(recipe, Mapping) else {"objective": recipe}
    if "objective" not in before | dict(flags):
        raise UsageError("--finetune-option needs --finetune distill or --finetune supervised.")
    return {key.replace("-", "_"): value for key, value in (before | dict(flags)).items()}


def _run(
    job: CompressConfig, rows: RowOptions, upload: UploadOptions, display: DisplayOptions
) -> "list[CompressionResult] | None":
    """The results, in the first of several processes; None in the others."""
    from vitshrink.jobs.compress import compress
    from vitshrink.models.hub import require_hub
    from vitshrink.report import append_rows, check_appendable, report_row
    from vitshrink.runtime import processes

    if rows.csv is not None:
        check_appendable(rows.csv)
    if upload.push_to_hub is not None:
        require_hub(upload.push_to_hub, offline=job.offline)
    processes.join(job.device)
    try:
        results = compress(job, console.TerminalObserver(quiet=display.silent or not processes.is_main()))
        if not processes.is_main():
            return None
    finally:
        processes.leave()
    if rows.csv is not None:
        append_rows(rows.csv, [report_row(result.report, str(result.directory or "")) for result in results])
    return results


def _show(results: "Sequence[CompressionResult]", job: CompressConfig, display: DisplayOptions) -> None:
    from vitshrink.cli.rendering import plan_table, results_table

    if display.as_json:
        documents = [result.report.to_dict() for result in results]
        console.show_json(documents[0] if len(documents) == 1 else documents)
        return
    if display.quiet:
        return
    if job.dry_run:
        for result in results:
            console.show(plan_table(result.report))
    console.show(results_table([result.report for result in results]))
    for result in results:
        if result.directory is not None:
            console.say(f"{result.directory}  (with report.html, report.md and report.json)")
    if len(results) > 1 and not job.dry_run:
        console.say(f"{Path(job.output) / 'comparison.html'}")
