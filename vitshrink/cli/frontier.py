"""``vitshrink frontier``: what a model may become, before a size is chosen."""

from typing import TYPE_CHECKING, Any

from vitshrink.cli import checks, console
from vitshrink.cli.flags import command
from vitshrink.cli.groups import ResultOptions
from vitshrink.cli.table import Table
from vitshrink.config.frontier import FrontierJob

if TYPE_CHECKING:
    from vitshrink.jobs.frontier import Survey


@command(FrontierJob, ResultOptions)
def frontier_command(flags: dict[str, Any], display: ResultOptions) -> None:
    """Show the loss of many sizes of MODEL, predicted from one calibration and measured at some of them.

    Example: vitshrink frontier ./my-vit --calibration ./photos --output ./sizes
    """
    job = checks.job_of(FrontierJob, flags, "the command line")
    checks.check_models(job)

    from vitshrink.jobs.frontier import survey
    from vitshrink.runtime import processes

    processes.join(job.device)
    try:
        found = survey(job, console.TerminalObserver(quiet=display.silent or not processes.is_main()))
        if not processes.is_main():
            return
    finally:
        processes.leave()
    if display.as_json:
        console.show_json(found.frontier.to_dict())
    else:
        _show(found)


def _show(found: "Survey") -> None:
    from vitshrink.report.frontier import headings, rows

    frontier = found.frontier
    table = Table(headings(frontier), caption=frontier.remarks)
    for row in rows(frontier):
        table.add(*row)
    console.show(table)
    console.say("Commands that build these models:")
    for point in frontier.built:
        console.say(point.command)
    if found.page is not None:
        console.say(str(found.page))
