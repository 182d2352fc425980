"""The whole job on an embedded example: train a small ViT, make it smaller and faster in every way, and compare.

Needs no network and no files: the scanned digits are part of the package.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

from vitshrink.errors import OutputError
from vitshrink.jobs.demo_page import accuracies, comparison_page, comparison_table
from vitshrink.jobs.demo_parts import Made, Part, Place, left_out, make, parts
from vitshrink.jobs.demo_reload import check_reload
from vitshrink.jobs.digits import EPOCHS, train_digits_model, write_digits
from vitshrink.report import Report, render_comparison_html, write_text

MARKER = ".vitshrink-demo"


@dataclass(frozen=True)
class DemoResult:
    """The reports by output directory, in the order of the parts, and the file that compares them."""

    reports: dict[Path, Report]
    comparison: Path


@dataclass(frozen=True)
class WarningsOnly:
    """Follows a job for its warnings; the jobs are too short for progress."""

    echo: Callable[[str], None]

    def stage(self, _title: str, _total: int | None = None) -> AbstractContextManager[Callable[[int], None]]:
        return nullcontext(lambda _steps: None)

    def warn(self, message: str) -> None:
        self.echo(f"  warning: {message}")


def run_demo(
    output: Path,
    echo: Callable[[str], None],
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    methods: Sequence[str] | None = None,
) -> DemoResult:
    """Train, compress in every way (with ``methods`` of those for linear layers), reload in a fresh process, compare.

    ``output`` is replaced when an earlier demo left it. ``echo`` receives the lines meant for the reader.
    Raises OutputError when ``output`` holds something else or a reloaded checkpoint does not give the accuracy that
    its report states.
    """
    started = time.perf_counter()
    _prepare_output(output)
    place = Place(output / "model", output / "digits", output / "compressed", seed)
    write_digits(place.digits, seed=seed)
    echo(f"Training a ViT on scanned digits ({epochs} epochs) …")
    train_digits_model(place.digits / "train", place.model, seed=seed, epochs=epochs)
    echo(f"  {time.perf_counter() - started:.0f} s: {place.model}")
    chosen = parts(methods)
    made = [_make(part, place, echo, f"{i} of {len(chosen)}") for i, part in enumerate(chosen, start=1)]

    echo("Reloading every checkpoint in a new process with plain transformers calls …")
    expected = {each.directory: accuracies(each.report)[1].correct for each in made}
    check_reload(output / "reload.py", place.digits / "val", expected)
    echo("  each checkpoint has as many correct predictions as its report says")
    return _compared(output, made, left_out(methods), echo, started)


def _make(part: Part, place: Place, echo: Callable[[str], None], count: str) -> Made:
    echo(f"{count}: vitshrink {part}")
    return make(part, place, WarningsOnly(echo))


def _compared(
    output: Path, made: Sequence[Made], missing: Sequence[str], echo: Callable[[str], None], started: float
) -> DemoResult:
    """The table on the terminal, and both pages."""
    table = comparison_table(made)
    comparison, page = output / "comparison.md", output / "comparison.html"
    write_text(comparison, comparison_page(table, made, missing))
    write_text(page, render_comparison_html([each.report for each in made]))
    echo(f"\n{table}\n\nNot part of the demo:")
    for each in missing:
        echo(f"  {each}")
    echo(f"\n{time.perf_counter() - started:.0f} s in all. Pictures: {page}; a report.html lies beside the weights.")
    return DemoResult({each.directory: each.report for each in made}, comparison)


def _prepare_output(output: Path) -> None:
    """Make ``output`` an empty demo folder; remove only what an earlier demo wrote."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file: choose another --output.")
    if output.is_dir() and any(output.iterdir()) and not (output / MARKER).is_file():
        raise OutputError(f"{output} is not empty, and the demo did not write it: choose another --output.")
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / MARKER).touch()
        for part in ("digits", "model", "compressed"):
            if (output / part).exists():
                rmtree(output / part)
    except OSError as error:
        raise OutputError(f"cannot write the demo to {output}: {error}. Choose another --output.") from error
