"""Pictures of a report: its rank plan, its errors, and how several trade size for quality."""

from collections.abc import Sequence

from vitshrink.report.drawing import COLOURS, INK, available, canvas, svg
from vitshrink.report.layers import Layer, layers
from vitshrink.report.record import Report
from vitshrink.report.summary import metric_name

__all__ = ["available", "error_by_layer", "rank_plan", "trade_off"]


def rank_plan(report: Report) -> str | None:
    """Blocks by place in the block, coloured by the fraction of the weights kept, with the rank written in."""
    shown = [layer for layer in layers(report) if layer.block is not None]
    if not shown:
        return None
    blocks, places = sorted({int(layer.block or 0) for layer in shown}), _places(shown)
    figure, axes = canvas(max(4.5, 0.62 * len(blocks) + 2.4), 0.42 * len(places) + 1.5)
    import matplotlib

    colours = matplotlib.colormaps["viridis"]
    from matplotlib.patches import Rectangle

    for layer in shown:
        x, y = blocks.index(int(layer.block or 0)), places.index(layer.place)
        dense = layer.rank is None
        colour = (0.5, 0.5, 0.5, 0.35) if dense else colours(min(layer.kept, 1.0))
        axes.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, facecolor=colour, linewidth=0))
        light = not dense and sum(colour[:3]) > 1.5
        ink = INK if dense else "#1a1a1a" if light else "#ffffff"
        axes.text(x, y, "dense" if dense else str(layer.rank), ha="center", va="center", fontsize=8, color=ink)
    axes.set_xlim(-0.5, len(blocks) - 0.5)
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.set_xticks(range(len(blocks)), [str(block) for block in blocks])
    axes.set_yticks(range(len(places)), places)
    axes.set_xlabel("block")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), colours)
    bar = figure.colorbar(scale, ax=axes, pad=0.02, aspect=12)
    bar.set_label("fraction of the weights kept")
    bar.outline.set_visible(False)
    return svg(figure)


def error_by_layer(report: Report) -> str | None:
    """Relative error of each low-rank layer over the blocks, a line a place in the block."""
    shown = [
        layer
        for layer in layers(report)
        if layer.block is not None and layer.rank is not None and layer.relative_error is not None
    ]
    if not shown:
        return None
    figure, axes = canvas(9.6, 3.4)
    for i, place in enumerate(_places(shown)):
        line = sorted((layer.block or 0, layer.relative_error or 0.0) for layer in shown if layer.place == place)
        axes.plot(*zip(*line, strict=True), color=COLOURS[i % len(COLOURS)], marker="o", markersize=4, label=place)
    axes.set_xlabel("block")
    axes.set_ylabel("relative error")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.2, color=INK)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return svg(figure)


def trade_off(reports: Sequence[Report]) -> str | None:
    """Score over the fraction of parameters kept, with its interval, a line a method; None without two points."""
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    reference, label = None, ""
    for report in reports:
        evaluation = report.evaluation or {}
        metric, scores = evaluation.get("metric"), evaluation.get("compressed") or {}
        fidelity = evaluation.get("fidelity") or {}
        if metric and scores.get(metric) is not None:
            label = metric_name(report)
            value, bounds = scores[metric], scores.get("interval") or [scores[metric]] * 2
            reference = (evaluation.get("dense") or {}).get(metric, reference)
        elif fidelity.get("agreement") is not None:
            label = "same prediction as dense"
            value = fidelity["agreement"]
            bounds = fidelity.get("agreement_interval") or [value] * 2
        else:
            continue
        points.setdefault(report.method, []).append((report.parameters["kept"], value, *bounds))
    if sum(map(len, points.values())) < 2:
        return None
    figure, axes = canvas(9.6, 3.8)
    for i, (method, line) in enumerate(sorted(points.items())):
        kept, value, low, high = zip(*sorted(line), strict=True)
        spread = [
            [max(0.0, v - b) for v, b in zip(value, low, strict=True)],
            [max(0.0, b - v) for v, b in zip(value, high, strict=True)],
        ]
        colour = COLOURS[i % len(COLOURS)]
        axes.errorbar(kept, value, yerr=spread, color=colour, marker="o", markersize=5, capsize=3, label=method)
    if reference is not None:
        axes.axhline(reference, color=INK, alpha=0.5, linewidth=1, linestyle="--", label="dense")
    axes.set_xlabel("fraction of the parameters kept")
    axes.set_ylabel(label)
    axes.grid(alpha=0.2, color=INK)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return svg(figure)


def _places(shown: Sequence[Layer]) -> list[str]:
    return list(dict.fromkeys(layer.place for layer in shown))
