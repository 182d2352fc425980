"""What the user sees while a job runs and when it fails: progress on stderr, errors in a sentence, exit codes."""

import functools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table as Grid
from rich.text import Text

from vitshrink.cli.table import Table
from vitshrink.config.names import shown, shown_data, shown_text
from vitshrink.errors import VitshrinkError, explanation

INTERRUPTED = 130
TERMINATED = 143

errors = Console(stderr=True, highlight=False, emoji=False)
output = Console(highlight=False, emoji=False)

UNBOUNDED = 10_000
"""Columns of a terminal that is wide enough for anything."""

Command = TypeVar("Command", bound=Callable[..., Any])


def say(text: str, *, prose: bool = False) -> None:
    """Lines of a result, as text: nothing in them is markup, and none is broken unless it is prose."""
    output.print(Text(shown_text(text)), soft_wrap=not prose)


def show_json(document: Any) -> None:
    """One strict JSON document, and nothing else."""
    sys.stdout.write(json.dumps(shown_data(document), indent=2, allow_nan=False) + "\n")


def show(table: Table) -> None:
    """Print a table: in columns where they fit, otherwise row by row, so that a narrow terminal loses nothing.

    Nothing is known of the width behind a pipe: columns always fit there.
    """
    grid = Grid(box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(table.headings):
        grid.add_column(heading, justify="left" if index < table.left else "right", no_wrap=True)
    for row in table.rows:
        grid.add_row(*(Text(shown(cell)) for cell in row))
    bounded = output.is_terminal or "COLUMNS" in os.environ
    needed = output.measure(grid, options=output.options.update(max_width=UNBOUNDED)).maximum
    if needed <= output.width or not bounded:
        # a console never prints wider than itself
        wide = (
            Console(highlight=False, emoji=False, width=max(needed, output.width)) if needed > output.width else output
        )
        wide.print(grid)
    else:
        for row in table.rows:
            output.print(Text(shown(row[0]) or " ", style="bold"))
            for heading, cell in zip(table.headings[1:], map(shown, row[1:]), strict=True):
                if cell:
                    output.print(Padding(Text(f"{heading}: {cell}" if heading else cell), (0, 0, 0, 2)))
    if table.caption:
        output.print(Text(shown_text(table.caption)), soft_wrap=not bounded)


class Terminated(BaseException):
    """SIGTERM, as an exception: so that staging directories are removed on the way out."""


def on_sigterm(_signal: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not stop the cleaning up
    raise Terminated


class TimeLeft(TimeElapsedColumn):
    """What is left of the job, where that is known.

    Otherwise of a stage, at the pace of its steps so far, which are alike; before the first, what has passed.
    """

    def __init__(self, of_job: Callable[[], float | None] = lambda: None) -> None:
        super().__init__()
        self.of_job = of_job

    def render(self, task: Task) -> Text:
        if (seconds := self.of_job()) is not None:
            return Text(f"{timedelta(seconds=round(seconds))} left of the job", style="progress.remaining")
        if not task.total or not task.completed or task.elapsed is None:
            return super().render(task)
        left = timedelta(seconds=round(task.elapsed * (task.total / task.completed - 1)))
        return Text(f"{left} left", style="progress.remaining")


class TerminalObserver:
    """Bars on a terminal, a plain line for every stage elsewhere, nothing when quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.left: Callable[[], float | None] = lambda: None

    def foresee(self, left: Callable[[], float | None]) -> None:
        self.left = left

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        if self.quiet:
            yield lambda _steps: None
        elif errors.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            shown = columns if total else columns[:2]
            with Progress(*shown, TimeLeft(self.left), console=errors, transient=True) as progress:
                task = progress.add_task(title, total=total)
                yield lambda steps: progress.update(task, advance=steps)
        else:
            errors.print(Text(title if total is None else f"{title} ({total})"), soft_wrap=True)
            yield lambda _steps: None

    def warn(self, message: str) -> None:
        if not self.quiet:
            errors.print(Text.assemble(("warning: ", "yellow"), shown_text(message)), soft_wrap=True)


def _out_of_memory() -> tuple[type[BaseException], ...]:
    """What says that memory is short; torch says it only where it is there."""
    torch = sys.modules.get("torch")
    return (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)


def reported(command: Command) -> Command:
    """Turn what a command raises into one sentence on stderr and an exit code; a traceback only with ``--debug``."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        signal.signal(signal.SIGTERM, on_sigterm)
        try:
            return command(*args, **kwargs)
        except VitshrinkError as error:
            if error.silent:
                raise typer.Exit(error.exit_code) from None
            fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            fail("interrupted; nothing was written.", INTERRUPTED)
        except Terminated:
            fail("terminated; nothing was written.", TERMINATED)
        except _out_of_memory() as error:
            fail(f"out of memory: lower --batch-size or --samples. {error}".strip(), 1)
        except typer.Exit:
            raise
        except OSError as error:  # where no module knows more to say of it
            fail(
                (
                    f"the operating system reports an error: {explanation(error)}. `vitshrink --debug …` shows in "
                    "which step."
                ),
                1,
            )
        except Exception as error:
            fail(
                f"unexpected {type(error).__name__}: {error}. This is a bug in vitshrink: run `vitshrink --debug …` "
                "to get the traceback, and report it.",
                1,
            )

    return wrapper  # type: ignore[return-value]


debug = False
"""Set by the ``--debug`` option, before a command runs."""


def fail(message: str, code: int) -> NoReturn:
    if debug:
        traceback.print_exc()
    complain(message)
    raise typer.Exit(code)


def complain(message: str) -> None:
    errors.print(Text.assemble(("error: ", "bold red"), shown_text(message)), soft_wrap=True)
