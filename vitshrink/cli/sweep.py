"""``vitshrink sweep``: a matrix of jobs."""

from vitshrink.cli.flags import command
from vitshrink.cli.groups import DisplayOptions, SweepGateOptions, SweepOptions
from vitshrink.config.fields import plain_values


@command(None, SweepOptions, SweepGateOptions, DisplayOptions)
def sweep_command(options: SweepOptions, bounds: SweepGateOptions, display: DisplayOptions) -> None:
    """Run the jobs of FILE and compare the results.

    Exits with 0 when all passed, 3 when a bound is missed, 1 when a job failed or is missing.

    Example: vitshrink sweep nightly.yaml --jobs 2 --resume
    """
    from vitshrink.cli.sweep_display import run

    given = {name: bound for name, bound in plain_values(bounds).items() if bound is not None}
    run(options, given, display)
