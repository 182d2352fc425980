"""``vitshrink report``: render what compress wrote once more, or compare several results."""

from pathlib import Path
from typing import Annotated

import typer

from vitshrink import checksums
from vitshrink.cli import console
from vitshrink.publication import REPORT
from vitshrink.report import Report, comparison_markdown, render_comparison_html, write


@console.reported
def report_command(
    directories: Annotated[list[Path], typer.Argument(help="Directories that `vitshrink compress` wrote.")],
    html: Annotated[Path | None, typer.Option(help="Write the comparison as a page to this file.")] = None,
) -> None:
    """Render the reports of DIRECTORIES again; with several, or --html, compare them."""
    reports = [Report.read(directory) for directory in directories]
    for report, directory in zip(reports, directories, strict=True):
        if directory.is_dir():
            write(report, directory)
            checksums.renew(directory, REPORT)
    if html is not None:
        html.write_text(render_comparison_html(reports), encoding="utf-8")
    console.say(comparison_markdown(reports).rstrip())
