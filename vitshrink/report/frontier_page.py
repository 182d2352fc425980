"""The picture of a frontier, and the files that it is written to."""

import json
from pathlib import Path

from vitshrink.config.names import shown_data
from vitshrink.errors import OutputError
from vitshrink.report import figures
from vitshrink.report.drawing import COLORS, INK, canvas, svg
from vitshrink.report.frontier import Frontier, headings, rows
from vitshrink.report.render import render_frontier


def frontier_picture(frontier: Frontier) -> str:
    """Loss over the size: the prediction as a line, measurements with their intervals, and the knee."""
    figure, axes = canvas(9.6, 4.2)
    axes.plot(
        [point.target_bytes / 1e6 for point in frontier.points],
        [point.predicted for point in frontier.points],
        color=COLORS[0],
        label=frontier.predicted_name,
    )
    measured = [
        (point.target_bytes / 1e6, loss, frontier.interval(point) or (loss, loss))
        for point in frontier.points
        if (loss := frontier.loss(point)) is not None and loss > 0  # the scale has no place for others
    ]
    if measured:
        sizes, losses, bounds = zip(*measured, strict=True)
        spread = [
            [max(0.0, loss - low) for loss, (low, _) in zip(losses, bounds, strict=True)],
            [max(0.0, high - loss) for loss, (_, high) in zip(losses, bounds, strict=True)],
        ]
        label = f"measured {frontier.loss_name} on {frontier.holdout} held-out samples"
        style = {"marker": "o", "markersize": 5, "capsize": 3, "linestyle": "none"}
        axes.errorbar(sizes, losses, yerr=spread, color=COLORS[1], label=label, **style)
    for point in frontier.points:
        if point.knee:
            place, label = point.target_bytes / 1e6, f"knee: {point.target_size}"
            axes.axvline(place, color=INK, alpha=0.5, linewidth=1, linestyle="--", label=label)
    axes.set_yscale("log")
    axes.set_xlabel("MB of the weight file")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.2, color=INK)
    axes.legend(frameon=False, fontsize=8)
    return svg(figure)


def write_frontier(frontier: Frontier, directory: Path) -> Path:
    """Write ``frontier.json``, ``frontier.svg`` where matplotlib is there, and ``frontier.html``, which is returned.

    Raises:
        OutputError: the directory cannot be written.
    """
    picture = frontier_picture(frontier) if figures.available() else None
    page = directory / "frontier.html"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(shown_data(frontier.to_dict()), indent=2, allow_nan=False) + "\n"
        (directory / "frontier.json").write_text(text, encoding="utf-8")
        if picture is not None:
            (directory / "frontier.svg").write_text(picture, encoding="utf-8")
        page.write_text(render_frontier(frontier, headings(frontier), rows(frontier), picture), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write the frontier to {directory}: {error.strerror or error}.") from error
    return page
