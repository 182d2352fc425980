"""The table beside the images of a folder: ``metadata.csv``, ``.jsonl`` or ``.parquet``, as `datasets` reads it."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vitshrink.data.columns import Columns, find_columns
from vitshrink.data.tables import Table, read_table
from vitshrink.errors import DataError

METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass
class Metadata:
    """``labels`` by the path of each image; without a column of labels all of them are None."""

    name: str = ""
    """Of the files, for messages; empty where there is none."""
    labels: dict[Path, Any] = field(default_factory=dict)
    several: tuple[str, ...] = ()
    """The columns of labels where each has one of its own."""
    labeled: bool = False
    unlabeled: str | None = None
    ignored: list[str] = field(default_factory=list)

    def notes(self, source: str, folder: Path, images: Collection[Path]) -> tuple[str, ...]:
        """What does not fit together: rows without an image below ``folder``, and images without a row."""
        notes = list(self.ignored)
        missing = [path for path in self.labels if folder in path.parents and path not in images]
        if missing:
            notes.append(f"{source}: {len(missing)} images of {self.name} do not exist ({missing[0].name} …).")
        unnamed = [path for path in images if path not in self.labels] if self.labeled else []
        if unnamed:
            notes.append(f"{source}: {len(unnamed)} images are not in {self.name} ({min(unnamed).name} …).")
        return tuple(notes)


def read_metadata(files: Sequence[Path], wanted: Columns) -> Metadata:
    """What ``files`` say of the images in and below their folders; what comes later goes before.

    Raises:
        DataError: a file that cannot be read, or one without a wanted column.
    """
    found = Metadata()
    for file in files:
        table = _read(file)
        image = wanted.image or next((name for name in table.columns if name.strip().casefold() == "file_name"), None)
        if image is None:
            found.ignored.append(f"{file} was not read: it has no column file_name ({', '.join(table.columns)}).")
            continue
        columns = find_columns(str(file), "image", table.columns, replace(wanted, image=image))
        found.name = f"{found.name} and {file}" if found.name else str(file)
        if found.labeled and columns.several != found.several:
            raise DataError(f"{file} has other label columns than {found.name.removesuffix(f' and {file}')}.")
        found.labeled |= columns.labeled
        found.several = columns.several
        found.unlabeled = found.unlabeled or (columns.unlabeled and f"{file}: {columns.unlabeled}")
        names, labels = table.column(columns.image), columns.labels(table.column)
        for name, label in zip(names, labels, strict=True):
            if name is not None:
                found.labels[Path(os.path.normpath(file.parent / str(name)))] = label
    return found


def _read(file: Path) -> Table:
    if file.suffix != ".parquet":
        return read_table(file)
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except Exception as error:  # Arrow's own, and those of file systems
        raise DataError(f"{file}: cannot be read ({error}).") from error
    return Table(list(table.column_names), [list(row) for row in zip(*table.to_pydict().values(), strict=True)])
