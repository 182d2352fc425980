"""A file of texts, as people keep them."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tiny

from .checkpoint import Checkpoint, Reference
from .data import Data

ROWS = 20


@dataclass
class Row:
    """``good`` says whether it can be used; of ``labeled`` ones the label is what the model answers."""

    text: Any
    pair: str | None = None
    good: bool = True
    label: Any = None


@dataclass
class Table:
    """Texts, with labels for a model that knows classes; written in one of many forms."""

    checkpoint: Checkpoint
    rows: list[Row] = field(default_factory=list)
    paired: bool = False
    labels: str | None = "label"
    """Name of the column."""
    spell: Callable[[int, str], Any] = lambda _index, name: name
    """How a class is written."""
    form: str = "csv"
    delimiter: str = ","
    encoding: str = "utf-8"
    newline: str = "\n"
    name: str = ""
    """Of the file; the usual one if empty."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More columns, the same in every row."""
    flags: list[str] = field(default_factory=list)
    compressed: bool = False
    changes: list[Callable[[list[dict[str, Any]]], None]] = field(default_factory=list)
    """What is done to the records before they are written."""
    files: list[Callable[[Path], Path]] = field(default_factory=list)
    """What is done with the file at last; gives the path that is named on the command line."""
    sure: bool = True
    """Whether the number of samples is known, and whether the model is right in all of them."""

    def __post_init__(self) -> None:
        generator = np.random.default_rng(0)
        for _ in range(ROWS):
            self.rows.append(Row(" ".join(generator.choice(tiny.WORDS, size=generator.integers(3, 13)))))
        if not self.checkpoint.classifies:
            self.labels = None

    def write(self, directory: Path, reference: Reference) -> Data:
        answered = self._label(reference) if self.labels else False
        records = [self._record(row) for row in self.rows]
        for change in self.changes:
            change(records)
        file = directory / (self.name or f"data.{self.form}{'.gz' if self.compressed else ''}")
        self._store(records, file)
        for finish in self.files:
            file = finish(file)
        bad = sum(not row.good for row in self.rows)
        return Data(file, self.flags, len(self.rows) - bad, bad, bool(self.labels), answered and self.sure, self.sure)

    def _label(self, reference: Reference) -> bool:
        usable = [row for row in self.rows if row.good]
        answers = reference.answers([row.text for row in usable])
        classes = reference.classes
        for number, row in enumerate(self.rows):
            index = answers[usable.index(row)] if answers and row.good else number % len(classes)
            row.label = self.spell(index, classes[index])
        return answers is not None

    def _record(self, row: Row) -> dict[str, Any]:
        texts = {"sentence1": row.text, "sentence2": row.pair} if self.paired else {"text": row.text}
        return texts | self.extra | ({self.labels: row.label} if self.labels else {})

    def _store(self, records: list[dict[str, Any]], file: Path) -> None:
        if self.form == "parquet":
            _arrow(records).to_parquet(str(file))
            return
        content = self._text(records).encode(self.encoding, "surrogatepass")
        file.write_bytes(gzip.compress(content, mtime=0) if self.compressed else content)

    def _text(self, records: list[dict[str, Any]]) -> str:
        if self.form == "json":
            return json.dumps(records)
        if self.form == "jsonl":
            return "".join(json.dumps(record) + self.newline for record in records)
        if self.form == "txt":
            return "".join(f"{record['text']}{self.newline}" for record in records)
        written = io.StringIO(newline="")
        rows = csv.writer(written, delimiter=self.delimiter, lineterminator=self.newline)
        rows.writerow(records[0])
        rows.writerows(record.values() for record in records)
        return written.getvalue()


def _arrow(records: list[dict[str, Any]]) -> Any:
    import datasets

    return datasets.Dataset.from_list(records)
