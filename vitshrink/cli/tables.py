"""Tables for the terminal: aligned, with units, and no more than was asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vitshrink.report import Report, summary_rows
from vitshrink.report.summary import UNKNOWN, accuracy_rows, count, latency_rows, p_value, percent, prepared, size


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


def _size(report: Report) -> str:
    kept = f"keep {report.parameters['kept']:.3f}"
    return kept if report.quantization is None else f"{kept}, {report.quantization['weights']}"


def results_table(reports: Sequence[Report]) -> Table:
    """Before and after, one column a size."""
    table = Table(["", "dense", *map(_size, reports)], caption=embedded(reports[0].evaluation or {}))
    rows = [summary_rows(report) for report in reports]
    for index, row in enumerate(rows[0]):
        table.add(row.name, row.dense, *(each[index].compressed for each in rows))
    return table


def evaluation_table(document: Mapping[str, Any]) -> Table:
    """One evaluation, alone or beside its baseline: quality first, then cost."""
    evaluation, other = document["evaluation"], document["baseline_footprint"]
    alone = document["baseline"] is None
    table = Table(["", "model"] if alone else ["", "baseline", "model", "change"], caption=_conditions(document))

    def add(name: str, baseline: str, model: str, change: str) -> None:
        cells = (name, model) if alone else (name, baseline, model, change)
        table.add(*("" if cell == UNKNOWN else cell for cell in cells))

    dense, compressed = evaluation["dense"], evaluation["compressed"]
    if alone:  # whichever of the two it is, it is the only one
        evaluation = evaluation | {"dense": None, "compressed": compressed or dense}
    add("Samples", "", f"{evaluation['samples']:,}", "")
    for row in accuracy_rows(evaluation):
        add(row.name, row.dense, row.compressed, row.change)
    if (difference := evaluation["difference"] or {}).get("drop") is not None:
        add("Is the change real?", "", "", "yes" if difference["significant"] else "within noise")
        add(f"  {difference['test']}", "", "", p_value(difference["p_value"]))
    for name, key, show in (
        ("Parameters", "parameters", count),
        ("Weight files", "bytes", size),
        ("Weights in memory", "memory", size),
        ("MACs a sample", "macs", count),
    ):
        kept = f"{percent(document[key] / other[key])} kept" if other and other[key] and document[key] else ""
        add(name, show(other[key]) if other else "", show(document[key]), kept)
    for row in latency_rows(document["latency"] or {}):
        add(row.name, row.dense, row.compressed, row.change)
    add("Peak memory", "", size(document["peak_memory"]), "")
    return table


def embedded(measured: Mapping[str, Any]) -> str | None:
    """How sentences became vectors that were compared; None where they did not."""
    made = [f"{name}: {measured[name]}" for name in ("pooling", "similarity") if measured.get(name)]
    return "; ".join(made) or None


def _conditions(document: Mapping[str, Any]) -> str:
    """What the figures rest on."""
    lines = [f"preprocessing: {prepared(document['preprocessing'])}"]
    if tokens := document["tokens"]:
        lines.append(f"tokens: at most {tokens['budget']} patches of {tokens['levels']} sizes, by {tokens['scorer']}")
    if maps := document["landmarks"]:
        lines.append(f"attention maps: {maps['landmarks']} landmarks, {maps['form']}")
    if made := embedded(document):
        lines.append(made)
    if document["label_rule"]:
        lines.append(f"labels: {document['label_rule']}")
    return "\n".join(lines)
