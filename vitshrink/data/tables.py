"""Text tables: .csv .tsv .txt .jsonl."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vitshrink.errors import DataError

TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl")


@dataclass(frozen=True)
class Table:
    """``rows`` hold one value a column: strings, or any JSON value."""

    columns: list[str]
    rows: list[list[Any]]


def read_table(
    path: Path,
    *,
    delimiter: str | None = None,
    header: bool = True,
    quoting: Literal["minimal", "none"] | None = None,
    columns: Sequence[str] | None = None,
) -> Table:
    """Read a UTF-8 table; a ``.txt`` file has one column, ``text``, and a row for each line that is not blank.

    Tab-separated files are read without quoting unless told otherwise: those of GLUE hold single quotation marks that
    would swallow the rows up to the next one. ``columns`` names the first fields of a file without a header line; what
    follows them is not read.

    Raises:
        DataError: not UTF-8, a row with another number of fields than the header, or a line that is not a JSON object.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".txt":
                return Table(["text"], [[line.strip()] for line in file if line.strip()])
            if path.suffix == ".jsonl":
                return _read_json_lines(path, file)
            first = file.readline()
            file.seek(0)
            if delimiter is None:
                delimiter = "\t" if path.suffix == ".tsv" else max(",\t;", key=first.count)
            if quoting is None:
                quoting = "none" if delimiter == "\t" else "minimal"
            styles: dict[str, Literal[0, 3]] = {"minimal": csv.QUOTE_MINIMAL, "none": csv.QUOTE_NONE}
            lines = list(csv.reader(file, delimiter=delimiter, quoting=styles[quoting], strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table ({error}).") from error
    rows = [line for line in lines if line]
    if not rows:
        raise DataError(f"{path} is empty.")
    names = rows.pop(0) if header else list(columns or map(str, range(len(rows[0]))))
    for number, row in enumerate(rows, start=1):
        if len(row) < len(names) or (len(row) > len(names) and columns is None):
            raise DataError(
                f"{path}, row {number}: {len(row)} fields where {len(names)} were expected. Check delimiter, quoting "
                "and header, which a recipe can give."
            )
    return Table(names, rows)


def _read_json_lines(path: Path, lines: Iterable[str]) -> Table:
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: a JSON object was expected, not {type(record).__name__}.")
        records.append(record)
    if not records:
        raise DataError(f"{path} is empty.")
    columns = list(dict.fromkeys(key for record in records for key in record))
    return Table(columns, [[record.get(column) for column in columns] for record in records])
