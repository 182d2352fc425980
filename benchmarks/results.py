"""A file that keeps the figures of a table, so that a run that was stopped goes on, and rows are added to others."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Results:
    """Rows by name, and the circumstances that they share."""

    file: Path | None
    circumstances: dict[str, Any]
    rows: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, file: Path | None, circumstances: dict[str, Any] | None) -> "Results":
        """What ``file`` has, if anything. Raises SystemExit where it was measured otherwise, or nothing is known."""
        if file is None or not file.exists():
            if circumstances is None:
                raise SystemExit("--model, --calibration and --eval say what to run; there are no --results yet.")
            return cls(file, circumstances, {})
        document = json.loads(file.read_text(encoding="utf-8"))
        there = document["circumstances"]
        if circumstances is not None and there != circumstances:
            different = sorted(name for name in there if there[name] != circumstances.get(name))
            raise SystemExit(f"{file} has figures of other circumstances ({', '.join(different)}): take another file.")
        return cls(file, there, document["rows"])

    def add(self, name: str, figures: dict[str, Any]) -> None:
        """Enter a row, and write the file whole or not at all."""
        self.rows[name] = figures
        if self.file is not None:
            beside = self.file.with_suffix(".tmp")
            beside.write_text(json.dumps({"circumstances": self.circumstances, "rows": self.rows}, indent=1) + "\n")
            beside.replace(self.file)
