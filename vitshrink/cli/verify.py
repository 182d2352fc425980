"""``vitshrink verify``: whether a compressed directory still is what was published."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vitshrink.cli import console
from vitshrink.cli.table import Table
from vitshrink.errors import OutputError
from vitshrink.runtime.storage import is_url


@console.reported
def verify_command(
    directory: Annotated[str, typer.Argument(help="Directory or URL that vitshrink wrote.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")] = False,
) -> None:
    """Check DIRECTORY: checksums, strict load, finite outputs, and the figures of its report.

    Exit code: 1 if anything differs from what was published.
    """
    from vitshrink.jobs.verify import verify_directory
    from vitshrink.models.source import resolve

    checks = verify_directory(resolve(directory) if is_url(directory) else Path(directory))
    if as_json:
        console.show_json([asdict(check) for check in checks])
    elif not quiet:
        table = Table(["check", "", "found"], left=3)
        for check in checks:
            table.add(check.name, "ok" if check.problem is None else "WRONG", check.found)
        console.show(table)
    wrong = [f"{check.name}: {check.problem}" for check in checks if check.problem is not None]
    if wrong:
        raise OutputError(f"{directory} differs from what was published. {'. '.join(wrong)}")
