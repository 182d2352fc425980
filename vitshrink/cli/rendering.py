"""Tables for the terminal: aligned, with units, and no more than was asked for."""

from collections.abc import Sequence
from dataclasses import replace

from vitshrink.cli.table import Table
from vitshrink.evaluation.quality import EvaluationRecord
from vitshrink.jobs.evaluate import Assessment
from vitshrink.models.cost import Latency
from vitshrink.report import Report, summary_rows
from vitshrink.report.summary import accuracy_rows, latency_rows, timed_on
from vitshrink.report.wording import UNKNOWN, count, number, p_value, percent, prepared, size


def plan_table(report: Report) -> Table:
    """Layer, shape, rank and what it stores."""
    table = Table(["layer", "shape", "rank", "parameters", "kept", "error"], left=2)
    for layer in report.layers:
        outputs, inputs = layer.shape
        table.add(
            layer.name,
            f"{outputs} × {inputs}",
            layer.stored,
            f"{layer.parameters:,}",
            f"{layer.parameters / (outputs * inputs):.0%}",
            number(layer.relative_error),
        )
    return table


def _size(report: Report) -> str:
    kept = f"keep {report.parameters.kept:.3f}"
    if report.coded_bits is not None:
        return str(report.integers)
    return kept if report.integers is None else f"{kept}, {report.integers}"


def results_table(reports: Sequence[Report]) -> Table:
    """Before and after, one column a size."""
    evaluation = reports[0].evaluation
    table = Table(["", "dense", *map(_size, reports)], caption=evaluation and embedded(evaluation))
    rows = [summary_rows(report) for report in reports]
    for index, row in enumerate(rows[0]):
        table.add(row.name, row.dense, *(each[index].compressed for each in rows))
    return table


def evaluation_table(found: Assessment) -> Table:
    """One evaluation, alone or beside its baseline: quality first, then cost."""
    evaluation, alone = found.evaluation, found.baseline is None
    table = Table(["", "model"] if alone else ["", "baseline", "model", "change"], caption=_conditions(found))

    def add(name: str, baseline: str, model: str, change: str) -> None:
        cells = (name, model) if alone else (name, baseline, model, change)
        table.add(*("" if cell == UNKNOWN else cell for cell in cells))

    if alone:  # whichever of the two it is, it is the only one
        evaluation = replace(evaluation, dense=None, compressed=evaluation.compressed or evaluation.dense)
    add("Samples", "", f"{evaluation.samples:,}", "")
    for row in accuracy_rows(evaluation):
        add(row.name, row.dense, row.compressed, row.change)
    difference = evaluation.difference
    if difference is not None and difference.drop is not None:
        add("Is the change significant?", "", "", "yes" if difference.significant else "within noise")
        add(f"  {difference.test}", "", "", p_value(difference.p_value))
    own, other = found.footprint, found.baseline_footprint
    for name, needed, before, show in (
        ("Parameters", own.parameters, other and other.parameters, count),
        ("Weight files", own.bytes, other and other.bytes, size),
        ("Weights in memory", own.memory, other and other.memory, size),
        ("MACs per sample", own.macs, other and other.macs, count),
    ):
        kept = f"{percent(needed / before)} kept" if needed and before else ""
        add(name, "" if other is None else show(before), show(needed), kept)
    for row in latency_rows(found.latency_record):
        add(row.name, row.dense, row.compressed, row.change)
    add("Peak memory", "", size(found.peak_memory), "")
    return table


def embedded(measured: EvaluationRecord) -> str | None:
    """How sentences became vectors that were compared; None where they did not."""
    made = {"pooling": measured.pooling, "similarity": measured.similarity}
    return "; ".join(f"{name}: {how}" for name, how in made.items() if how) or None


def _conditions(found: Assessment) -> str:
    """What the figures rest on."""
    lines = [f"preprocessing: {prepared(found.preprocessing)}"]
    if (tokens := found.tokens) is not None:
        lines.append(f"tokens: at most {tokens.budget} patches of {tokens.levels} sizes, by {tokens.scorer}")
    if (maps := found.landmarks) is not None:
        lines.append(f"attention maps: {maps.landmarks} landmarks, {maps.form}")
    if made := embedded(found.evaluation):
        lines.append(made)
    if found.preprocessing.get("kind") == "text":
        lines.append("batches: texts of similar length, padded to the longest")
    if (timed := found.latency_record) is not None and timed.compressed is not None:
        lines.append(f"time: {_clocked(timed.compressed, timed.dense)}")
    if found.evaluation.label_rule:
        lines.append(f"labels: {found.evaluation.label_rule}")
    return "\n".join(lines)


def _clocked(model: Latency, baseline: Latency | None) -> str:
    """How passes were timed."""
    if baseline is None:
        return f"median of {model.repeats} in {timed_on(model)}"
    same = timed_on(model) == timed_on(baseline)
    where = timed_on(model) if same else f"{timed_on(baseline)}, and {timed_on(model)}"
    return f"both models in turn, median of {model.repeats}, in {where}"
