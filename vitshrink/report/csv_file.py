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
from vitshrink.report.record import Report
from vitshrink.report.summary import prepared
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
    recipe = report.recipe or {}
    return {
        "vitshrink": report.vitshrink,
        "model": report.model,
        "baseline": report.model,
        "output": output,
        "method": report.method,
        "allocation": report.allocation,
        "compensation": report.compensation,
        "token_budget": recipe.get("token_budget"),
        "landmarks": recipe.get("landmarks"),
        "kept": report.parameters.get("kept"),
        "parameters": report.parameters.get("compressed"),
        "dense_parameters": report.parameters.get("dense"),
        "bytes": report.bytes.get("compressed"),
        "dense_bytes": report.bytes.get("dense"),
        "macs": report.macs.get("compressed"),
        "dense_macs": report.macs.get("dense"),
        "seed": recipe.get("seed"),
        "warnings": len(report.warnings),
        **latency_columns(report.latency),
        **evaluation_columns(report.evaluation or {}),
    }


def latency_columns(latency: Mapping[str, Any]) -> dict[str, Any]:
    """Medians of one batch size, from ``dense`` and ``compressed`` as ``vitshrink.models.cost.Latency``."""
    dense, compressed = latency.get("dense") or {}, latency.get("compressed") or {}
    return {
        "latency_batch_size": (compressed or dense).get("batch_size"),
        "latency": compressed.get("median"),
        "dense_latency": dense.get("median"),
    }


def evaluation_columns(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """From an evaluation with what is known of its data, as in a report."""
    metric, difference = evaluation.get("metric"), evaluation.get("difference") or {}
    dense, compressed = evaluation.get("dense") or {}, evaluation.get("compressed") or {}
    fidelity, model = evaluation.get("fidelity") or {}, compressed or dense
    low, high = model.get("interval") or (None, None)
    drop_low, drop_high = difference.get("drop_interval") or (None, None)
    return {
        "data": evaluation.get("source"),
        "fingerprint": evaluation.get("fingerprint"),
        "samples": evaluation.get("samples"),
        "preprocessing": prepared(evaluation.get("preprocessing") or {}),
        "pooling": evaluation.get("pooling"),
        "similarity": evaluation.get("similarity"),
        "task": evaluation.get("task"),
        "metric": metric,
        "score": model.get(metric),
        "score_low": low,
        "score_high": high,
        "dense_score": dense.get(metric),
        "drop": difference.get("drop"),
        "drop_low": drop_low,
        "drop_high": drop_high,
        "p_value": difference.get("p_value"),
        "agreement": fidelity.get("agreement"),
        "kl": fidelity.get("kl"),
        "relative_error": fidelity.get("relative_error"),
        "feature_cosine": fidelity.get("feature_cosine"),
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
            raise OutputError(f"cannot append to {path}: {path.parent} is not a folder that can be written to.")
    except OSError as error:
        raise OutputError(f"cannot append to {path}: {error.strerror or error}.") from error


def _line_start(path: Path, descriptor: int) -> str | None:
    """What ends an unfinished last line; None in an empty file. Raises OutputError for other columns."""
    size = os.fstat(descriptor).st_size
    if not size:
        return None
    header = os.pread(descriptor, 4096, 0).decode(errors="replace").splitlines()[0]
    if header.split(",") != list(COLUMNS):
        raise OutputError(
            f"{path} is not a table of evaluations of this version: its columns are others. Name a new file."
        )
    return "" if os.pread(descriptor, 1, size - 1) == b"\n" else "\n"
