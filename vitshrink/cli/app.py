"""The ``vitshrink`` command and its options for all commands."""

import signal
import sys
from typing import Annotated

import typer

from vitshrink._version import __version__
from vitshrink.cli import console, streams
from vitshrink.cli.compress import compress_command
from vitshrink.cli.demo import demo_command
from vitshrink.cli.evaluate import evaluate_command
from vitshrink.cli.export import export_command
from vitshrink.cli.finetune import finetune_command
from vitshrink.cli.frontier import frontier_command
from vitshrink.cli.inspect import inspect_command
from vitshrink.cli.methods import methods_command
from vitshrink.cli.quantize import quantize_command
from vitshrink.cli.report import report_command
from vitshrink.cli.sweep import sweep_command
from vitshrink.cli.verify import verify_command

app = typer.Typer(
    name="vitshrink",
    help="Compress ViT, DeiT, BERT and other transformer encoders, and measure the result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("compress")(compress_command)
app.command("frontier")(frontier_command)
app.command("eval")(evaluate_command)
app.command("sweep")(sweep_command)
app.command("finetune")(finetune_command)
app.command("inspect")(inspect_command)
app.command("quantize")(quantize_command)
app.command("export")(export_command)
app.command("verify")(verify_command)
app.command("report")(report_command)
app.command("methods")(methods_command)
app.command("demo")(demo_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        console.say(f"vitshrink {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with every error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options that go before the command."""
    console.debug = debug


def main() -> None:
    output = streams.guard()
    code: str | int | None = 0
    try:
        app()
    except SystemExit as end:
        code = end.code
    except console.Terminated:  # while it said how it ended
        code = console.TERMINATED
    for number in (signal.SIGINT, signal.SIGTERM):  # nothing is left to clean up, and nobody left to catch
        signal.signal(number, signal.SIG_DFL)
    if (problem := streams.lost(output)) is not None:
        console.complain(problem)
        code = code or 1
    sys.exit(code)
