"""JUnit XML, as CI systems read it: every job of a sweep is a test."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from vitshrink.config.names import shown_text
from vitshrink.jobs.sweep.outcome import Status

TAIL = 4000
"""Bytes of a log that are shown with a job that failed."""

_KINDS = {Status.GATE: "failure", Status.FAILED: "error", Status.TIMEOUT: "error", Status.CANCELLED: "skipped"}


def junit_xml(rows: Sequence[Mapping[str, Any]], logs: Mapping[str, Path]) -> str:
    """A missed bound is a failure, a broken job an error with the end of its log, one that was not run is skipped."""
    kinds = [_KINDS.get(row["status"], "skipped" if not row["status"].ended else "") for row in rows]
    counts = {
        "tests": str(len(rows)),
        "failures": str(kinds.count("failure")),
        "errors": str(kinds.count("error")),
        "skipped": str(kinds.count("skipped")),
        "time": f"{sum(row['seconds'] for row in rows):.3f}",
    }
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "vitshrink sweep", **counts})
    for row, kind in zip(rows, kinds, strict=True):
        attributes = {"classname": "vitshrink.sweep", "name": shown_text(row["job"]), "time": f"{row['seconds']:.3f}"}
        case = ElementTree.SubElement(suite, "testcase", attributes)
        if kind:
            message = shown_text(row["message"]) or str(row["status"])
            problem = ElementTree.SubElement(case, kind, {"message": message, "type": str(row["status"])})
            problem.text = message if kind != "error" else shown_text(_tail(logs[row["job"]]))
        elif row["message"]:
            ElementTree.SubElement(case, "system-out").text = shown_text(row["message"])
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _tail(log: Path) -> str:
    try:
        return log.read_bytes()[-TAIL:].decode(errors="replace")
    except OSError:
        return ""
