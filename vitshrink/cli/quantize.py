"""``vitshrink quantize``: integer weights for a checkpoint, dense or compressed."""

from typing import Any

from vitshrink.cli import checks, console
from vitshrink.cli.flags import command
from vitshrink.cli.groups import DisplayOptions
from vitshrink.config.quantize import QuantizeJob


@command(QuantizeJob, DisplayOptions)
def quantize_command(flags: dict[str, Any], display: DisplayOptions) -> None:
    """Quantize the weights of MODEL, write it to OUTPUT, and report sizes, quality and time.

    Example: vitshrink quantize ./my-vit ./my-vit-4bit --bits 4 --calibration ./photos --eval ./val
    """
    job = checks.job_of(QuantizeJob, flags, "the command line")
    checks.check_models(job)

    from vitshrink.cli.rendering import results_table
    from vitshrink.jobs.quantize import quantize_checkpoint
    from vitshrink.runtime import processes

    processes.join(job.device)
    try:
        result = quantize_checkpoint(job, console.TerminalObserver(quiet=display.silent or not processes.is_main()))
        if not processes.is_main():
            return
    finally:
        processes.leave()
    if display.as_json:
        console.show_json(result.report.to_dict())
    elif not display.quiet:
        console.show(results_table([result.report]))
        console.say(f"{result.directory}")
