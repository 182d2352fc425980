"""Pictures of a report: its rank plan, its errors, and how several trade size for quality."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vitshrink.config.names import shown
from vitshrink.evaluation.quality import Evaluation
from vitshrink.report.drawing import COLORS, INK, available, canvas, svg
from vitshrink.report.making import LayerEntry
from vitshrink.report.record import Report
from vitshrink.report.summary import metric_name
from vitshrink.report.wording import percent

ONE_SIZE = 0.005
"""Fractions kept that differ by less are those of one size: methods do not hit a size exactly."""

__all__ = ["available", "error_by_layer", "loss_by_cost", "rank_plan", "trade_off"]


def rank_plan(report: Report) -> str | None:
    """Blocks by place in the block, colored by the fraction of the weights kept, with the rank written in.

    Of integers colored by bits, which are written in.
    """
    shown = [layer for layer in report.layers if layer.block is not None]
    if not shown:
        return None
    blocks, places = sorted({int(layer.block or 0) for layer in shown}), _places(shown)
    cell = max(0.62, 0.12 + 0.07 * max(len(layer.stored) for layer in shown))  # inches: room for the longest text
    figure, axes = canvas(max(4.5, cell * len(blocks) + 2.4), max(2.9, 0.42 * len(places) + 1.5))
    import matplotlib

    colors = matplotlib.colormaps["viridis"]
    from matplotlib.patches import Rectangle

    coded = report.coded_bits is not None
    most = max(layer.bits or 0.0 for layer in shown) if coded else 1.0

    for layer in shown:
        x, y = blocks.index(int(layer.block or 0)), places.index(layer.place)
        share = (layer.bits or 0.0) / most if coded else min(layer.kept, 1.0)
        color = (0.5, 0.5, 0.5, 0.35) if layer.dense else colors(share)
        axes.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, facecolor=color, linewidth=0))
        light = not layer.dense and sum(color[:3]) > 1.5
        ink = INK if layer.dense else "#1a1a1a" if light else "#ffffff"
        axes.text(x, y, layer.stored, ha="center", va="center", fontsize=8, color=ink)
    axes.set_xlim(-0.5, len(blocks) - 0.5)
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.set_xticks(range(len(blocks)), [str(block) for block in blocks])
    axes.set_yticks(range(len(places)), map(_plain, places))
    axes.set_xlabel("block")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, most), colors)
    bar = figure.colorbar(scale, ax=axes, pad=0.02, aspect=12)
    bar.set_label("bits a weight" if coded else "fraction of the weights kept")
    bar.outline.set_visible(False)
    return svg(figure)


def error_by_layer(report: Report) -> str | None:
    """Relative error of each compressed layer over the blocks, a line a place in the block."""
    shown = [
        layer
        for layer in report.layers
        if layer.block is not None and not layer.dense and layer.relative_error is not None
    ]
    if not shown:
        return None
    figure, axes = canvas(9.6, 3.4)
    for i, place in enumerate(_places(shown)):
        line = sorted((layer.block or 0, layer.relative_error or 0.0) for layer in shown if layer.place == place)
        axes.plot(
            *zip(*line, strict=True), color=COLORS[i % len(COLORS)], marker="o", markersize=4, label=_plain(place)
        )
    axes.set_xlabel("block")
    axes.set_ylabel("relative error")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.2, color=INK)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return svg(figure)


@dataclass(frozen=True)
class _Point:
    report: Report
    kept: float
    score: float
    bounds: Sequence[float]

    @property
    def line(self) -> str:
        """What points of one line have in common."""
        return "bits" if self.report.coded_bits is not None else self.report.kind

    @property
    def spread(self) -> tuple[float, float]:
        """From the score down and up to the ends of its interval."""
        return max(0.0, self.score - self.bounds[0]), max(0.0, self.bounds[1] - self.score)


def trade_off(reports: Sequence[Report]) -> str | None:
    """Score over the fraction of parameters kept, with its interval, a line a method; None without two points.

    Of the bytes, where some are integers. Where all are of one size, the methods stand below each other instead.
    """
    in_bytes = any(report.integers for report in reports) and all(report.bytes for report in reports)
    points = [point for report in reports if (point := _point(report, in_bytes=in_bytes)) is not None]
    if len(points) < 2:
        return None
    kept = [point.kept for point in points]
    label, dense = "same prediction as dense", None
    for report in reports:
        evaluation = report.evaluation
        if evaluation is not None and _is_scored(evaluation):
            label = metric_name(evaluation)
            dense = dense if evaluation.dense is None else evaluation.dense.score(evaluation.metric)
    draw = _by_method if max(kept) - min(kept) < ONE_SIZE else _by_size
    return draw(points, label, dense, "bytes" if in_bytes else "parameters")


def loss_by_cost(reports: Sequence[Report]) -> str | None:
    """KL from the dense model over the size of the files, and over the time where it was measured; None without two.

    Times are shares of the dense model's, which was timed in turn with each.
    """
    known = [(report, kl) for report in reports if (kl := _kl(report)) and report.bytes is not None]
    sizes = [(report.bytes.compressed / 1e3, kl, report) for report, kl in known if report.bytes]
    panels = [("weight files, kB", sizes)]
    times = [(ratio, kl, report) for report, kl in known if (ratio := report.latency_ratio) is not None]
    if len({report.latency and report.latency.batch_size for _, _, report in times}) == 1:
        batch_size = next(report.latency.batch_size for _, _, report in times if report.latency)
        panels.append((f"time of a batch of {batch_size}, fraction of the dense model's", times))
    panels = [panel for panel in panels if len(panel[1]) > 1]
    if not panels:
        return None
    figure, axes = canvas(5.4 * len(panels), 4.4, 1, len(panels), sharey=True, squeeze=False)
    for panel, (label, points) in zip(axes[0], panels, strict=True):
        _scatter(panel, points)
        panel.set_xlabel(label)
    axes[0, 0].set_ylabel("KL from the dense model, nats")
    return svg(figure)


def _kl(report: Report) -> float | None:
    fidelity = report.evaluation and report.evaluation.fidelity
    return None if fidelity is None else fidelity.kl


def _scatter(axes: Any, points: Sequence[tuple[float, float, Report]]) -> None:
    """A point a report with its name: at the left of the point where another stands close at the right."""
    axes.set_yscale("log")
    axes.margins(x=0.3, y=0.08)
    near = 0.3 * (max(x for x, _, _ in points) - min(x for x, _, _ in points))
    for i, (x, kl, report) in enumerate(points):
        others = [(place, loss) for place, loss, _ in points[i + 1 :] if place == x]
        others += [(place, loss) for place, loss, _ in points if x < place < x + near]
        left = any(kl / 1.5 < loss < 1.5 * kl for _, loss in others)
        axes.plot([x], [kl], color=COLORS[0], marker="o", markersize=5)
        place = {"xytext": (-6 if left else 6, 0), "textcoords": "offset points", "ha": "right" if left else "left"}
        axes.annotate(_plain(report.kind), (x, kl), va="center", fontsize=8, **place)
    axes.grid(alpha=0.2, color=INK)


def _by_size(points: Sequence[_Point], label: str, dense: float | None, what: str) -> str:
    figure, axes = canvas(9.6, 3.8)
    for i, method in enumerate(sorted({point.line for point in points})):
        line = sorted((point for point in points if point.line == method), key=lambda each: each.kept)
        axes.errorbar(
            [point.kept for point in line],
            [point.score for point in line],
            yerr=list(zip(*(point.spread for point in line), strict=True)),
            color=COLORS[i % len(COLORS)],
            marker="osD^v"[i // len(COLORS) % 5],
            markersize=5,
            capsize=3,
            label=_plain(method),
        )
    if dense is not None:
        axes.axhline(dense, color=INK, alpha=0.5, linewidth=1, linestyle="--", label="dense")
    axes.set_xlabel(f"fraction of the {what} kept")
    axes.set_ylabel(label)
    axes.grid(alpha=0.2, color=INK)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return svg(figure)


def _by_method(points: Sequence[_Point], label: str, dense: float | None, what: str) -> str:
    """The best at the top."""
    rows = sorted(points, key=lambda point: point.score)
    names = [_plain(point.line) for point in rows]
    if len(set(names)) < len(names):  # then they differ in something else
        parts = [(point.report.method, point.report.allocation, point.report.compensation) for point in rows]
        names = [_plain(", ".join(each)) for each in parts]
    figure, axes = canvas(9.6, 0.36 * len(rows) + 1.3)
    for row, point in enumerate(rows):
        spread = [[side] for side in point.spread]
        axes.errorbar([point.score], [row], xerr=spread, color=COLORS[0], marker="o", markersize=5, capsize=3)
    if dense is not None:
        axes.axvline(dense, color=INK, alpha=0.5, linewidth=1, linestyle="--", label="dense")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    sizes = dict.fromkeys(percent(extreme([point.kept for point in rows])) for extreme in (min, max))
    axes.set_xlabel(f"{label}, with {' to '.join(sizes)} of the {what} kept")
    axes.grid(alpha=0.2, color=INK, axis="x")
    return svg(figure)


def _point(report: Report, *, in_bytes: bool) -> _Point | None:
    """The score, or without labels the agreement with the dense model; None where neither was measured."""
    evaluation, value, bounds = report.evaluation, None, None
    if evaluation is not None and _is_scored(evaluation):
        value, bounds = evaluation.score, evaluation.compressed and evaluation.compressed.interval
    elif evaluation is not None and evaluation.fidelity is not None:
        value, bounds = evaluation.fidelity.agreement, evaluation.fidelity.agreement_interval
    kept = (report.bytes if in_bytes and report.bytes else report.parameters).kept
    return None if value is None else _Point(report, kept, value, bounds or (value, value))


def _is_scored(evaluation: Evaluation) -> bool:
    """Whether the compressed model has a figure of the metric."""
    return evaluation.compressed is not None and evaluation.score is not None


def _plain(name: str) -> str:
    """A name as matplotlib draws it as it is, and not as a formula."""
    return shown(name).replace("$", "\\$")


def _places(shown: Sequence[LayerEntry]) -> list[str]:
    return list(dict.fromkeys(layer.place for layer in shown))
