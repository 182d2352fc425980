"""From a row of a table or data set, as it is written, to a sample."""

import ast
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from vitshrink.data.columns import Columns, listing, named_column
from vitshrink.data.samples import LabelsAre, Sample, SampleSet
from vitshrink.data.tables import Table
from vitshrink.errors import DataError


class Layout(ABC):
    """Where the parts of a sample are."""

    labels_are: ClassVar[LabelsAre]
    """What the labels of its samples hold."""
    first: ClassVar[tuple[str, ...]]
    """Usual names of the column with the text that every sample has."""
    labels: ClassVar[tuple[str, ...]]
    """Those of the column with the labels."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Of files that no other layout reads."""

    def table(self, path: Path) -> Table | None:  # noqa: ARG002
        """The rows of a file that is no ordinary table; None for one that is. Raises DataError."""
        return None

    def columns(self, source: str, available: Sequence[str], wanted: Columns) -> Columns:
        """``wanted`` completed by usual names. Raises DataError where there is none, or more than one choice."""
        text = named_column(source, available, wanted.text, self.first, wanted.flags, "text")
        label = named_column(source, available, wanted.label, self.labels, wanted.flags, "label", needed=False)
        remedy = (
            f"no column looks like the labels. Give {wanted.flags}label-column, or name it {self.labels[0]}. "
            f"{listing(available)}"
        )
        return replace(wanted, text=text, label=label, unlabeled=None if label else remedy)

    @abstractmethod
    def sample(self, key: str, row: Mapping[str, Any], columns: Columns, names: Sequence[str] | None) -> Sample:
        """``names`` are those of labels that are integers, where the source has some.

        Raises ValueError for a row that makes no sense; ``read`` names it.
        """

    def read(
        self,
        source: str,
        rows: Iterable[Mapping[str, Any]],
        columns: Columns,
        names: Sequence[str] | None = None,
        called: str = "row",
    ) -> Iterator[Sample]:
        """The samples of all rows. Raises DataError, which names the row as it is ``called``, and its number."""
        for number, row in enumerate(rows, start=1):
            key = f"{called} {number}"
            try:
                yield self.sample(key, row, columns, names)
            except ValueError as problem:
                raise DataError(f"{source}, {key}: {problem}.") from problem

    def samples(self, source: str, rows: Iterable[Mapping[str, Any]], columns: Columns) -> SampleSet:
        """Those of a table."""
        found = list(self.read(source, rows, columns))
        labeled = any(sample.label is not None for sample in found)
        labels_are = self.labels_are if labeled else None
        return SampleSet(source, "text", found, None, labels_are, unlabeled=columns.unlabeled)


def listed(value: Any, column: str | None) -> list[Any]:
    """A list, also one in a string: as JSON or Python writes it, or its members between blanks. Raises ValueError."""
    if isinstance(value, str):
        if not value.strip().startswith("["):
            return value.split()
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            value = None
    if not isinstance(value, list | tuple):
        raise ValueError(f"column {column!r} does not contain a list")
    return list(value)


def texts(values: Iterable[Any], column: str | None) -> tuple[str, ...]:
    """The members of a list, all of which are texts. Raises ValueError."""
    found = tuple(values)
    for value in found:
        if not isinstance(value, str):
            raise ValueError(f"column {column!r} contains {str(value)[:40]!r}, which is not text")
    return found


def text(row: Mapping[str, Any], column: str | None) -> str:
    """Of a column; nothing where there is none. Raises ValueError."""
    value = None if column is None else row[column]
    if isinstance(value, list | dict):
        raise ValueError(f"column {column!r} contains a {type(value).__name__}, not text")
    return "" if value is None or value != value else str(value)
