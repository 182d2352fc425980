"""The results of a sweep: rows for a spreadsheet, JSON, Markdown for a CI job page, a page to look at, and JUnit."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from vitshrink._version import __version__
from vitshrink.config.names import shown_data
from vitshrink.errors import DataError, OutputError
from vitshrink.evaluation.quality import EvaluationRecord
from vitshrink.jobs.sweep.junit import junit_xml
from vitshrink.jobs.sweep.outcome import Outcome, Status, exit_code
from vitshrink.jobs.sweep.output import LOG, MODEL
from vitshrink.jobs.sweep.plan import JobPlan, SweepPlan
from vitshrink.report import Report, markdown_table, plain_markdown, render_comparison_html, write_text
from vitshrink.runtime.storage import below

Row = dict[str, Any]

FILES = ("results.json", "results.csv", "summary.md", "comparison.html", "junit.xml")

MARKS = {Status.PASSED: "✅ passed", Status.GATE: "❌ gate", Status.FAILED: "💥 failed", Status.TIMEOUT: "⏱ timeout"}


def result_rows(plan: SweepPlan, outcomes: Sequence[Outcome]) -> list[Row]:
    """One row a job, all with the same keys; fractions, bytes, seconds, nats, and None for what was not measured."""
    return [_row(plan, job, outcome) for job, outcome in zip(plan.jobs, outcomes, strict=True)]


def write_results(plan: SweepPlan, outcomes: Sequence[Outcome]) -> list[Row]:
    """Write ``FILES`` where the results of these jobs belong, each whole or not at all, and all that can be.

    Raises OutputError for those that cannot.
    """
    rows = result_rows(plan, outcomes)
    reports = [
        _report(plan, job) for job, outcome in zip(plan.jobs, outcomes, strict=True) if not outcome.status.broken
    ]
    measured = [report for report in reports if report is not None]
    document = {"vitshrink": __version__, "exit_code": exit_code(outcomes), "jobs": rows}
    logs = {job.name: plan.output / job.name / LOG for job in plan.jobs}
    texts: dict[str, Callable[[], str | None]] = {
        "results.json": lambda: json.dumps(shown_data(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "results.csv": lambda: _csv(rows),
        "summary.md": lambda: summary_markdown(rows),
        "comparison.html": lambda: render_comparison_html(measured) if measured else None,
        "junit.xml": lambda: junit_xml(rows, logs),
    }
    problems: list[tuple[str, Exception]] = []
    for name, text in texts.items():
        try:
            plan.results.mkdir(exist_ok=True)
            if (written := text()) is None:
                (plan.results / name).unlink(missing_ok=True)
            else:
                write_text(plan.results / name, written)
                if plan.store is not None:
                    plan.store.put(plan.results / name, (plan.results / name).relative_to(plan.output).as_posix())
        except Exception as error:
            problems.append((name, error))
    if problems:
        told = "; ".join(f"{name} ({type(error).__name__}: {error})" for name, error in problems)
        raise OutputError(f"cannot write in {plan.shown}: {told}.") from problems[0][1]
    return rows


def summary_markdown(rows: Sequence[Row]) -> str:
    """What a CI job page shows: a count, a table, and why anything failed."""
    counts = {status: sum(row["status"] == status for row in rows) for status in Status}
    counted = ", ".join(f"{number} {status.value}" for status, number in counts.items() if number)
    lines = [f"### vitshrink sweep: {len(rows)} jobs, {counted}", ""]
    headings: dict[str, Callable[[Row], str]] = {
        "job": lambda row: row["job"],
        "status": lambda row: MARKS.get(row["status"], str(row["status"])),
        "kept": lambda row: _percent(row["kept"]),
        "MB": lambda row: _figure(row["bytes"], 1e-6, 4),
        "time": lambda row: _figure(row["latency_ratio"], 1, 2, "×"),
        "dense": lambda row: _percent(row["dense_score"]),
        "score": lambda row: _percent(row["score"]),
        "drop": lambda row: _figure(row["drop"], 100, 2),
        "KL": lambda row: _figure(row["kl"], 1, 3),
    }
    lines += [markdown_table(list(headings), [[show(row) for show in headings.values()] for row in rows], 2)]
    failed = [row for row in rows if row["status"] != Status.PASSED]
    if failed:
        lines += ["", *(f"* **{row['job']}**: {plain_markdown(row['message'])}" for row in failed), ""]
    return "\n".join(lines)


def _row(plan: SweepPlan, job: JobPlan, outcome: Outcome) -> Row:
    report = None if outcome.status.broken else _report(plan, job)
    return {
        "job": job.name,
        "status": outcome.status,
        "message": outcome.message,
        "model": job.config.model,
        "method": job.config.method,
        "size": job.config.size,
        **_costs(report),
        **_quality(report and report.evaluation),
        "seconds": round(outcome.seconds, 3),
        "reused": outcome.reused,
        "fingerprint": outcome.fingerprint,
        "directory": below(plan.shown, job.name, MODEL) if report else None,
    }


def _costs(report: Report | None) -> Row:
    macs = report and report.macs
    return {
        "parameters": report and report.parameters.compressed,
        "kept": report and report.parameters.kept,
        "bytes": report and report.bytes and report.bytes.compressed,
        "macs": macs and macs.compressed,
        "macs_kept": macs and macs.kept,
        "latency_ratio": report and report.latency_ratio,
    }


def _quality(evaluation: EvaluationRecord | None) -> Row:
    metric = evaluation and evaluation.metric
    dense, compressed = evaluation and evaluation.dense, evaluation and evaluation.compressed
    difference, fidelity = evaluation and evaluation.difference, evaluation and evaluation.fidelity
    return {
        "metric": metric,
        "dense_score": dense and dense.score(metric),
        "score": compressed and compressed.score(metric),
        "drop": difference and difference.drop,
        "drop_is_real": difference and difference.significant,
        "agreement": fidelity and fidelity.agreement,
        "kl": fidelity and fidelity.kl,
        "relative_error": fidelity and fidelity.relative_error,
        "samples": evaluation and evaluation.samples,
    }


def _report(plan: SweepPlan, job: JobPlan) -> Report | None:
    try:
        return Report.read(plan.output / job.name / MODEL)
    except DataError:
        return None


def _csv(rows: Sequence[Row]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(map(shown_data, rows))
    return stream.getvalue()


def _percent(fraction: float | None) -> str:
    return _figure(fraction, 100, 1, " %")


def _figure(value: float | None, scale: float, digits: int, unit: str = "") -> str:
    return "–" if value is None else f"{value * scale:.{digits}f}{unit}"
