"""``vitshrink report``: what compress wrote, rendered once more, or several results compared."""

from pathlib import Path
from typing import Annotated

import typer

from vitshrink.cli import console


def _show_schema(wanted: bool) -> None:
    if wanted:
        from vitshrink.report import report_schema

        console.show_json(report_schema())
        raise typer.Exit


@console.reported
def report_command(
    directories: Annotated[list[Path], typer.Argument(help="Directories that `vitshrink compress` wrote.")],
    html: Annotated[Path | None, typer.Option(help="Write the comparison as an HTML page to this file.")] = None,
    _schema: Annotated[
        bool,
        typer.Option("--schema", callback=_show_schema, is_eager=True, help="Print the JSON Schema of report.json."),
    ] = False,
) -> None:
    """Render the report of a directory again, or compare the reports of several directories.

    For one directory, report.md and report.html are written again, and README.md, the model card, if it is missing.
    Several directories do not change.
    """
    from vitshrink.report import Report, comparison_markdown, render_comparison_html, write_again, write_text

    reports = [Report.read(directory) for directory in directories]
    if html is not None:
        write_text(html, render_comparison_html(reports))
    elif len(reports) == 1 and directories[0].is_dir():
        write_again(reports[0], directories[0])
    console.say(comparison_markdown(reports).rstrip())
