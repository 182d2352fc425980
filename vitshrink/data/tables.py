"""Tables of text: .csv .tsv .txt .json .jsonl, also compressed as .gz, .bz2 or .xz."""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from vitshrink.data.text_files import read_text, text_suffix
from vitshrink.errors import DataError

SEPARATED_SUFFIXES = (".csv", ".tsv", ".txt")
TABLE_SUFFIXES = (*SEPARATED_SUFFIXES, ".json", ".jsonl")

DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "pipe"}
"""What may separate the fields of a table that nobody gives a delimiter for, and their names in recipes."""

_REMEDY = "Check delimiter, quoting and header; a recipe can set them."

Quoting = Literal["minimal", "none"]


@dataclass(frozen=True)
class Table:
    """``rows`` hold one value a column: strings, or any JSON value."""

    columns: list[str]
    rows: list[list[Any]]
    running: bool = False
    """Running text, a row a line, and no table."""

    def column(self, name: str | None) -> list[Any]:
        """The values of a column; None for each row where there is no column."""
        if name is None:
            return [None] * len(self.rows)
        index = self.columns.index(name)
        return [row[index] for row in self.rows]

    def records(self) -> Iterator[dict[str, Any]]:
        """The values of each row by column."""
        return (dict(zip(self.columns, row, strict=True)) for row in self.rows)


def is_table(path: Path) -> bool:
    """Whether ``read_table`` reads files of this name."""
    return text_suffix(path) in TABLE_SUFFIXES


def read_table(
    path: Path,
    *,
    delimiter: str | None = None,
    header: bool | None = None,
    quoting: Quoting | None = None,
    columns: Sequence[str] | None = None,
) -> Table:
    """Read a table; a ``.txt`` file has one column, ``text``, and a row for each line that is not blank.

    With ``delimiter``, ``quoting``, ``columns`` or ``header=True`` a ``.txt`` file is a table like the others. All of
    these are for separated values; JSON has names of its own. A delimiter that is not given is the one that divides
    all lines into equally many fields. Tab-separated files are read without quoting unless told otherwise, or all of
    their first line is quoted: those of GLUE hold single quotation marks that would swallow the rows up to the next
    one. ``columns`` names the first fields
    of a file without a header line; what follows them is not read.

    Raises:
        DataError: not text, a row with another number of fields than the header, or JSON of another form; names the
            line or row.
    """
    suffix, text = text_suffix(path), read_text(path)
    if suffix in (".json", ".jsonl"):
        return _read_json(path, text, lines=suffix == ".jsonl")
    if suffix == ".txt" and not (delimiter or quoting or columns or header):
        return Table(["text"], [[line.strip()] for line in _lines(text) if line.strip()], running=True)
    return _read_separated(path, text, delimiter, header is not False, quoting, columns)


def _lines(text: str) -> StringIO:
    """Lines as a file has them; `str.splitlines` would also divide at characters that JSON strings may hold."""
    return StringIO(text, newline="")


def _read_separated(
    path: Path, text: str, delimiter: str | None, header: bool, quoting: Quoting | None, columns: Sequence[str] | None
) -> Table:
    if delimiter is None:
        delimiter = _delimiter(path, text, quoting, least=len(columns or ()))
    rows = list(_rows(path, text, delimiter, quoting))
    if not rows:
        raise DataError(f"{path} is empty.")
    names = [name.strip() for name in rows.pop(0)] if header else list(columns or map(str, range(len(rows[0]))))
    for number, row in enumerate(rows, start=1):
        if len(row) < len(names) or (len(row) > len(names) and columns is None):
            raise DataError(f"{path}, row {number}: {len(row)} fields, but {len(names)} were expected. {_REMEDY}")
    return Table(names, rows)


def _rows(path: Path, text: str, delimiter: str, quoting: Quoting | None) -> Iterator[list[str]]:
    """The rows that are not blank. Raises DataError, which names the line."""
    if quoting is None:
        first = next(filter(str.strip, _lines(text)), "").strip()
        quoted = all(re.fullmatch('".*"', field) for field in first.split("\t"))
        quoting = "none" if delimiter == "\t" and not quoted else "minimal"
    style: Literal[0, 3] = csv.QUOTE_NONE if quoting == "none" else csv.QUOTE_MINIMAL
    csv.field_size_limit(2**31 - 1)  # the module stops at 131,072 characters otherwise
    reader = csv.reader(_lines(text), delimiter=delimiter, quoting=style, strict=True)
    try:
        yield from (row for row in reader if len(row) > 1 or "".join(row).strip())
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: cannot be read as a table ({error}). {_REMEDY}") from error


def _delimiter(path: Path, text: str, quoting: Quoting | None, *, least: int) -> str:
    """The delimiter that divides all lines into equally many fields, or the first line at least.

    ``least`` is the number of fields that there must be; with it lines may have more.
    """
    usual = "," if text_suffix(path) == ".csv" else "\t"

    def widths(delimiter: str) -> Iterator[int]:
        return map(len, _rows(path, text, delimiter, quoting))

    def fits(delimiter: str) -> bool:
        try:
            return all(width >= least if least else width == found[delimiter] for width in widths(delimiter))
        except DataError:
            return False

    found = {}
    for delimiter in DELIMITERS:
        try:
            width = next(widths(delimiter), 0)
        except DataError:  # quotation marks that are none with this delimiter
            continue
        if width >= max(2, least):
            found[delimiter] = width
    if text_suffix(path) == ".tsv" and usual in found:
        return usual
    sure = usual == "," and len(found) == 1  # then a row of another length is a fault, and told as one
    fitting = [delimiter for delimiter in found if sure or fits(delimiter)]
    if not fitting:
        return max(found, key=found.__getitem__) if found and usual == "," else usual
    widest = [delimiter for delimiter in fitting if found[delimiter] == max(found[each] for each in fitting)]
    if len(widest) > 1:
        named = " or ".join(DELIMITERS[delimiter] for delimiter in widest)
        raise DataError(f"{path}: {named} could divide its lines. Choose one with `delimiter` in a recipe.")
    return widest[0]


def _read_json(path: Path, text: str, *, lines: bool) -> Table:
    """JSON lines, or one document: a list of objects, or lists (or objects by row) by column, as of pandas."""
    content = _parsed(path, text) if not lines and text.strip() else None
    if content is None:
        records = list(_json_lines(path, text))
    elif isinstance(content, list):
        records = content
        for number, record in enumerate(records, start=1):
            if not isinstance(record, dict):
                raise DataError(f"{path}, row {number}: expected a JSON object, not {type(record).__name__}.")
    else:
        records = _by_row(path, content)
    if not records:
        raise DataError(f"{path} is empty.")
    columns = list(dict.fromkeys(key for record in records for key in record))
    return Table([name.strip() for name in columns], [[record.get(column) for column in columns] for record in records])


def _json_lines(path: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(text), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object, not {type(record).__name__}.")
        yield record


def _parsed(path: Path, text: str) -> Any:
    """The document, None where there are several: JSON lines under the name of ``.json``."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):
            return None
        raise DataError(f"{path}: not JSON ({error}).") from error


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice in one object")
    return found


def _by_row(path: Path, content: object) -> list[dict[str, Any]]:
    if content == {}:
        return []
    if isinstance(content, dict):
        if not all(isinstance(value, list | dict) for value in content.values()):
            return [content]  # JSON lines, of which there is one
        columns = [list(value.values() if isinstance(value, dict) else value) for value in content.values()]
        if len(set(map(len, columns))) == 1:
            return [dict(zip(content, row, strict=True)) for row in zip(*columns, strict=True)]
    found = f"an object of {', '.join(map(repr, content))}" if isinstance(content, dict) else type(content).__name__
    raise DataError(
        f"{path}: {found[:200]} is not a table: expected a list of objects, one object per line, or lists of "
        "equal length by column."
    )
