"""Size against quality, as a picture of the tables that ``fidelity.py`` prints.

python benchmarks/fidelity.py --model MODEL ... > table.md
python benchmarks/picture.py table.md --output picture.svg
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt

FRACTION = "fraction"
OURS = "curvature"


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
    plt.rcParams["svg.hashsalt"] = "vitshrink"  # the same table gives the same bytes
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for method, points in curves.items():
        ours = method.startswith(OURS)
        whole = [] if dense is None else [(1.0, dense)]  # what every method begins with
        shown = zip(*points, *whole, strict=True)
        axes.plot(*shown, marker="o", label=method, linewidth=3 if ours else 1.5, zorder=2 + ours)
    if dense is not None:
        axes.axhline(dense, color="grey", linestyle="--", linewidth=1, label="dense")
    axes.set_xlabel("kept of the weights of the encoder")
    axes.set_ylabel(score)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
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
