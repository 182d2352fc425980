"""Size against quality: a picture of the tables that ``fidelity.py`` prints, and one for ``bytes.py``.

python benchmarks/fidelity.py --model MODEL ... > table.md
python benchmarks/picture.py table.md --output picture.svg
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FRACTION = "fraction"
OURS = "curvature"
OUR_BYTES = "ours"
OUR_NAME = "vitshrink"
"""What a legend calls ours."""

LEAST = 1e-5
"""Nats: divergences below are rounding, and drawn as if they were so large."""


def read_curves(lines: Iterable[str]) -> tuple[str, dict[str, list[tuple[float, float]]], float | None]:
    """The name of the score, its (fraction, score) of each method, and the dense model's score where it is told."""
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    head: list[str] = []
    score, dense = "", None
    for line in lines:
        if line.startswith("dense ") and ":" in line:
            dense = float(line.split(":")[1].split()[0])
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if FRACTION in cells:
            head = cells
            score = head[head.index("came out") + 1]
        elif line.startswith("|") and head and not cells[0].startswith("---"):
            value = cells[head.index(score)].split(" ± ")[0]
            if value != "–":
                curves[cells[0]].append((float(cells[head.index(FRACTION)]), float(value)))
    return score, {method: sorted(points) for method, points in curves.items()}, dense


def draw(lines: Iterable[str], output: Path) -> None:
    """Write the picture, in the format of the name of ``output``. Raises ValueError where there is no table."""
    score, curves, dense = read_curves(lines)
    if not curves:
        raise ValueError("no row of a table of fidelity.py in it")
    figure, axes = _canvas(7, 4)
    for method, points in curves.items():
        ours = method.startswith(OURS)
        whole = [] if dense is None else [(1.0, dense)]  # what every method begins with
        shown = zip(*points, *whole, strict=True)
        axes.plot(*shown, marker="o", label=method, linewidth=3 if ours else 1.5, zorder=2 + ours)
    if dense is not None:
        axes.axhline(dense, color="gray", linestyle="--", linewidth=1, label="dense")
    axes.set_xlabel("kept of the weights of the encoder")
    axes.set_ylabel(score)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    _save(figure, output)


def byte_curves(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """(megabytes, KL in nats) of each family in the results of ``bytes.py``: what stands before a colon.

    Rows without a colon, floats, would only stretch the axes; a model that loses nothing has no place on them.
    """
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, row in rows.items():
        seeds = row.get("seeds", [])
        kl = mean(figures.get("kl", 0.0) for figures in seeds) if seeds else 0.0
        family, colon, _ = name.partition(":")
        if kl > 0 and colon:
            curves[family].append((max(figures["bytes"] for figures in seeds) / 1e6, kl))
    return {family: sorted(points) for family, points in curves.items()}


def draw_bytes(rows: Mapping[str, Mapping[str, Any]], output: Path) -> None:
    """Bytes against KL, a curve a family. Raises ValueError where there is no row with a divergence."""
    curves = byte_curves(rows)
    if not curves:
        raise ValueError("no row with a divergence to draw")
    figure, axes = _canvas(9, 5)
    peers = [family for family in curves if not family.startswith(OUR_BYTES)]
    for family, points in curves.items():
        ours = family not in peers
        color = None if ours else plt.get_cmap("tab20")(peers.index(family) % 20)
        dashed = "--" if ours and family != OUR_BYTES else "-"
        shown = {"label": _label(family), "color": "black" if ours else color, "linestyle": dashed, "zorder": 2 + ours}
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=3 if ours else 1.2, **shown)
    axes.set_xlabel("megabytes of the file")
    axes.set_ylabel("KL(dense ‖ variant), nats")
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, output)


def time_curves(rows: Mapping[str, Mapping[str, Any]], workload: str) -> dict[str, list[tuple[float, float]]]:
    """(multiple of PyTorch's time, KL in nats) of each family in the results of ``latency.py``, as ``byte_curves``."""
    baseline = next((row["times"][workload] for row in rows.values() if row.get("times")), 1.0)
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, row in rows.items():
        family, made, _ = name.partition(": ")
        if row.get("times") and row.get("kl", 0.0) > 0 and made:
            ours = name.startswith(OUR_BYTES)
            curves[family if ours else name].append((row["times"][workload] / baseline, max(row["kl"], LEAST)))
    return {family: sorted(points) for family, points in curves.items()}


def draw_times(rows: Mapping[str, Mapping[str, Any]], output: Path) -> None:
    """Time against KL, a picture a workload. Raises ValueError where there is no row with a divergence."""
    workloads = list(dict.fromkeys(name for row in rows.values() for name in row.get("times", {})))
    curves = {each: time_curves(rows, each) for each in workloads}
    families = list(dict.fromkeys(family for each in curves.values() for family in each))
    if not families:
        raise ValueError("no row with a divergence to draw")
    plt.rcParams["svg.hashsalt"] = "vitshrink"
    figure, axes = plt.subplots(
        1, len(workloads), figsize=(4 * len(workloads) + 4, 5), layout="constrained", sharey=True
    )
    for name, each in zip(workloads, np.atleast_1d(axes), strict=True):
        for family, points in curves[name].items():
            ours = family.startswith(OUR_BYTES)
            color = plt.get_cmap("tab20")(families.index(family) % 20)
            shown = {"label": _label(family), "color": color, "zorder": 2 + ours}
            each.plot(*zip(*points, strict=True), marker="o" if ours else "x", linewidth=2.5 if ours else 1, **shown)
        each.set(xlabel=f"time, {name} (PyTorch float32 = 1)", yscale="log")
        each.grid(alpha=0.3)
    np.atleast_1d(axes)[0].set_ylabel("KL(dense ‖ variant), nats")
    np.atleast_1d(axes)[-1].legend(frameon=False, fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, output)


def _label(family: str) -> str:
    return OUR_NAME + family.removeprefix(OUR_BYTES) if family.startswith(OUR_BYTES) else family


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    plt.rcParams["svg.hashsalt"] = "vitshrink"  # the same table gives the same bytes
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, output: Path) -> None:
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument("tables", nargs="+", type=Path)
    known.add_argument("--output", required=True, type=Path)
    args = known.parse_args(arguments)
    try:
        draw((line for table in args.tables for line in table.read_text().splitlines()), args.output)
    except (OSError, ValueError) as error:
        sys.exit(f"{args.tables[0]}: {error}")


if __name__ == "__main__":
    main()
