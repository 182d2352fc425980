"""Tables for the terminal: aligned, with units, and no more than was asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vitshrink.report import Report, summary_rows


@dataclass
class Table:
    """Rows of text under headings; how they are laid out depends on where they are shown."""

    headings: Sequence[str]
    caption: str | None = None
    left: int = 1
    """So many columns hold text and start at the left; the others hold figures and end at the right."""
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        self.rows.append(cells)


def plan_table(report: Report) -> Table:
    """Layer, shape, rank and what it stores."""
    table = Table(["layer", "shape", "rank", "parameters", "kept", "error"], left=2)
    for layer in report.layers:
        m, n = layer["shape"]
        table.add(
            layer["name"],
            f"{m} × {n}",
            "dense" if layer["rank"] is None else str(layer["rank"]),
            f"{layer['parameters']:,}",
            f"{layer['parameters'] / (m * n):.0%}",
            f"{layer['relative_error']:.3f}",
        )
    return table


def results_table(reports: Sequence[Report]) -> Table:
    """Before and after, one column a size."""
    table = Table(["", "dense", *(f"keep {report.parameters['kept']:.3f}" for report in reports)])
    rows = [summary_rows(report) for report in reports]
    for index, row in enumerate(rows[0]):
        table.add(row.name, row.dense, *(each[index].compressed for each in rows))
    return table


def evaluation_table(document: Mapping[str, Any]) -> Table:
    """The figures of one evaluation with their 95 % intervals."""
    evaluation = document["evaluation"]
    rule = document["label_rule"]
    table = Table(["figure", "baseline", "model", "95 % interval"], caption=f"labels: {rule}" if rule else None)
    dense, compressed = evaluation["dense"] or {}, evaluation["compressed"] or {}
    model, baseline = (compressed, dense) if compressed else (dense, {})
    for name in ("top1", "top5", "spearman", "pearson"):
        if name in model:
            key = "interval" if name in ("top1", "spearman") else f"{name}_interval"
            table.add(name, _figure(baseline.get(name)), _figure(model[name]), _interval(model.get(key)))
    for name, value in (evaluation["fidelity"] or {}).items():
        if not name.endswith("_interval"):
            table.add(name, "", _figure(value), _interval(evaluation["fidelity"].get(f"{name}_interval")))
    difference = evaluation["difference"] or {}
    if difference.get("drop") is not None:
        real = "real" if difference.get("significant") else "may be chance"
        table.add("drop", "", f"{difference['drop']:.4f}", _interval(difference.get("drop_interval")))
        table.add("", "", real, f"p = {difference['p_value']:.2g}" if difference.get("p_value") is not None else "")
    table.add("samples", "", str(evaluation["samples"]), "")
    table.add("parameters", "", f"{document['parameters']:,}", "")
    return table


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]:.4f} to {bounds[1]:.4f}"
