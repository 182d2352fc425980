"""``vitshrink quantize``: integer weights for a checkpoint, dense or compressed."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitshrink.cli import checks, console
from vitshrink.cli.flags import command
from vitshrink.cli.groups import DisplayOptions
from vitshrink.config.options import QuantizeJob

if TYPE_CHECKING:
    from vitshrink.jobs.result import CompressionResult


@command(QuantizeJob, DisplayOptions)
def quantize_command(flags: dict[str, Any], display: DisplayOptions) -> None:
    """Store the matrices of MODEL as integers in OUTPUT, and report what it cost.

    Example: vitshrink quantize ./my-vit-small ./my-vit-int8 --baseline ./my-vit --eval ./val
    """
    job = checks.job_of(QuantizeJob, flags, "the command line")
    checks.check_models(job)

    from vitshrink.cli.rendering import results_table
    from vitshrink.runtime import processes

    processes.join(job.device)
    try:
        result = _quantized(job, console.TerminalObserver(quiet=display.silent or not processes.is_main()))
        if not processes.is_main():
            return
    finally:
        processes.leave()
    if display.as_json:
        console.show_json(result.report.to_dict())
    elif not display.quiet:
        console.show(results_table([result.report]))
        console.say(f"{result.directory}")


def _quantized(job: QuantizeJob, observer: console.TerminalObserver) -> "CompressionResult":
    from vitshrink.jobs.quantize import quantize_checkpoint

    return quantize_checkpoint(
        job.model,
        job.output,
        weights=job.weights,
        activations=job.activations,
        data=job.eval_data,
        baseline=job.baseline,
        limit=job.eval_limit,
        batch_size=job.batch_size,
        max_length=job.max_length,
        preprocess=job.preprocess,
        class_map=Path(job.class_map) if job.class_map else None,
        max_bad_samples=job.max_bad_samples,
        workers=job.workers,
        device=job.device,
        seed=job.seed,
        offline=job.offline,
        overwrite=job.overwrite,
        observer=observer,
    )
