"""What the benchmarks print: the circumstances of a run, then Markdown tables that grow row by row."""

import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
import transformers

import vitshrink


def print_circumstances(title: str, **facts: object) -> None:
    """A heading, and what a reader needs to judge the figures below it."""
    print(f"## {title}\n")
    known: dict[str, object] = {
        "vitshrink": vitshrink.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{_processor()}, {torch.get_num_threads()} threads",
    }
    for name, fact in (known | facts).items():
        print(f"* {name.replace('_', ' ')}: {fact}")
    print(flush=True)


def _processor() -> str:
    description = Path("/proc/cpuinfo")
    lines = description.read_text().splitlines() if description.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def print_head(columns: Sequence[str], texts: int = 1) -> None:
    """The first columns are text, the others are figures."""
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * texts + " ---: |" * (len(columns) - texts), flush=True)


def print_row(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def mean_and_deviation(values: Sequence[float | None], form: str) -> str:
    """``0.512``, or ``0.512 ± 0.004`` with the sample's standard deviation where there are several; a dash for none."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    shown = format(mean(known), form)
    return shown if len(known) == 1 else f"{shown} ± {format(stdev(known), form)}"
