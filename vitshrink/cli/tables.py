"""Tables on the terminal: aligned, with units, and no more than was asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from vitshrink.report import Report, summary_rows


def _table(*headings: str, right: Sequence[int] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index in right else "left", overflow="fold")
    return table


def plan_table(report: Report) -> Table:
    """Layer, shape, rank and what it stores."""
    table = _table("layer", "shape", "rank", "parameters", "kept", "error", right=(2, 3, 4, 5))
    for layer in report.layers:
        m, n = layer["shape"]
        table.add_row(
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
    rows = [summary_rows(report) for report in reports]
    table = _table(
        "", "dense", *(f"keep {r.parameters['kept']:.3f}" for r in reports), right=range(1, 2 + len(reports))
    )
    for index, row in enumerate(rows[0]):
        table.add_row(row.name, row.dense, *(each[index].compressed for each in rows))
    return table


def evaluation_table(document: Mapping[str, Any]) -> Table:
    """The figures of one evaluation with their 95 % intervals."""
    evaluation = document["evaluation"]
    table = _table("figure", "baseline", "model", "95 % interval", right=(1, 2, 3))
    dense, model = evaluation["dense"] or {}, evaluation["compressed"] or {}
    for name in ("top1", "top5", "spearman", "pearson"):
        if name in model:
            key = "interval" if name in ("top1", "spearman") else f"{name}_interval"
            table.add_row(name, _figure(dense.get(name)), _figure(model[name]), _interval(model.get(key)))
    for name, value in (evaluation["fidelity"] or {}).items():
        if not name.endswith("_interval"):
            table.add_row(name, "", _figure(value), _interval(evaluation["fidelity"].get(f"{name}_interval")))
    difference = evaluation["difference"] or {}
    if difference.get("drop") is not None:
        real = "real" if difference.get("significant") else "may be chance"
        table.add_row("drop", "", f"{difference['drop']:.4f}", _interval(difference.get("drop_interval")))
        table.add_row("", "", real, f"p = {difference['p_value']:.2g}" if difference.get("p_value") is not None else "")
    table.add_row("samples", "", str(evaluation["samples"]), "")
    table.add_row("parameters", "", f"{document['parameters']:,}", "")
    if document["label_rule"]:
        table.caption = f"labels: {document['label_rule']}"
    return table


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]:.4f} to {bounds[1]:.4f}"
