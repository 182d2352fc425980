"""One row an evaluation, appended to a CSV file that any number of processes may write to."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vitshrink.config.names import shown_data
from vitshrink.errors import OutputError
from vitshrink.evaluation.quality import EvaluationRecord, Fidelity
from vitshrink.report.costs import BeforeAfter, Timings
from vitshrink.report.record import Report
from vitshrink.report.wording import prepared
from vitshrink.runtime.locks import require_locks, wait_for_lock

COLUMNS = (
    "time",
    "vitshrink",
    "model",
    "baseline",
    "output",
    "method",
    "allocation",
    "compensation",
    "token_budget",
    "landmarks",
    "kept",
    "parameters",
    "dense_parameters",
    "bytes",
    "dense_bytes",
    "macs",
    "dense_macs",
    "latency_batch_size",
    "latency",
    "dense_latency",
    "data",
    "fingerprint",
    "samples",
    "preprocessing",
    "pooling",
    "similarity",
    "seed",
    "task",
    "metric",
    "score",
    "score_low",
    "score_high",
    "dense_score",
    "drop",
    "drop_low",
    "drop_high",
    "p_value",
    "agreement",
    "kl",
    "relative_error",
    "feature_cosine",
    "warnings",
)
"""Fractions, bytes, seconds and nats; what was not measured is empty."""


def report_row(report: Report, output: str) -> dict[str, Any]:
    """The row of one compressed model that lies at ``output``."""
    return {
        "vitshrink": report.vitshrink,
        "model": report.model,
        "baseline": report.model,
        "output": output,
        "method": report.method,
        "allocation": report.allocation,
        "compensation": report.compensation,
        "token_budget": report.setting("token_budget"),
        "landmarks": report.setting("landmarks"),
        "kept": report.parameters.kept,
        **_cost_columns("parameters", report.parameters),
        **_cost_columns("bytes", report.bytes),
        **_cost_columns("macs", report.macs),
        "seed": report.setting("seed"),
        "warnings": len(report.warnings),
        **latency_columns(report.latency),
        **evaluation_columns(report.evaluation),
    }


def _cost_columns(name: str, cost: BeforeAfter | None) -> dict[str, Any]:
    return {} if cost is None else {name: cost.compressed, f"dense_{name}": cost.dense}


def latency_columns(latency: Timings | None) -> dict[str, Any]:
    """Medians of one batch size."""
    if latency is None:
        return {}
    return {
        "latency_batch_size": latency.batch_size,
        "latency": None if latency.compressed is None else latency.compressed.median,
        "dense_latency": None if latency.dense is None else latency.dense.median,
    }


def evaluation_columns(evaluation: EvaluationRecord | None) -> dict[str, Any]:
    """What was measured, and on which data."""
    if evaluation is None:
        return {}
    return {
        "data": evaluation.source,
        "fingerprint": evaluation.fingerprint,
        "samples": evaluation.samples,
        "preprocessing": prepared(evaluation.preprocessing),
        "pooling": evaluation.pooling,
        "similarity": evaluation.similarity,
        "task": evaluation.task,
        "metric": evaluation.metric,
        **_quality_columns(evaluation),
        **_fidelity_columns(evaluation.fidelity),
    }


def _quality_columns(evaluation: EvaluationRecord) -> dict[str, Any]:
    quality, difference = evaluation.compressed or evaluation.dense, evaluation.difference
    columns: dict[str, Any] = {"score": evaluation.score}
    if quality is not None:
        columns |= {"score_low": quality.interval.low, "score_high": quality.interval.high}
    if evaluation.dense is not None:
        columns["dense_score"] = evaluation.dense.score(evaluation.metric)
    if difference is not None:
        low, high = difference.drop_interval
        columns |= {"drop": difference.drop, "drop_low": low, "drop_high": high, "p_value": difference.p_value}
    return columns


def _fidelity_columns(fidelity: Fidelity | None) -> dict[str, Any]:
    if fidelity is None:
        return {}
    return {
        "agreement": fidelity.agreement,
        "kl": fidelity.kl,
        "relative_error": fidelity.relative_error,
        "feature_cosine": fidelity.feature_cosine,
    }


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append the rows, whose keys are some of COLUMNS, below a header that is written once.

    A lock keeps processes apart, and each writes its rows at once. Raises OutputError.
    """
    try:
        with path.open("a+b") as file:
            wait_for_lock(file.fileno())
            start = _line_start(path, file.fileno())
            text = io.StringIO()
            writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
            if start is None:
                writer.writeheader()
            writer.writerows(
                {"time": datetime.now(UTC).isoformat(timespec="seconds")} | shown_data(row) for row in rows
            )
            # a line that a killed process left unfinished stays a line of its own
            os.write(file.fileno(), ((start or "") + text.getvalue()).encode())
    except OSError as error:
        raise OutputError(f"cannot append to {path}: {error.strerror or error}.") from error


def check_appendable(path: Path) -> None:
    """Raises OutputError, before any work, where ``append_rows`` would."""
    require_locks()
    try:
        if path.is_dir():
            raise OutputError(f"cannot append to {path}: it is a folder.")
        if path.exists():
            with path.open("r+b") as file:
                _line_start(path, file.fileno())
        elif not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise OutputError(f"cannot append to {path}: {path.parent} is not a writable folder.")
    except OSError as error:
        raise OutputError(f"cannot append to {path}: {error.strerror or error}.") from error


def _line_start(path: Path, descriptor: int) -> str | None:
    """What ends an unfinished last line; None in an empty file. Raises OutputError for other columns."""
    size = os.fstat(descriptor).st_size
    if not size:
        return None
    header = os.pread(descriptor, 4096, 0).decode(errors="replace").splitlines()[0]
    if header.split(",") != list(COLUMNS):
        raise OutputError(f"{path} has other columns than evaluations of this version: give a new file.")
    return "" if os.pread(descriptor, 1, size - 1) == b"\n" else "\n"
