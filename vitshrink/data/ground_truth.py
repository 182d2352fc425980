"""A file that says which class each image of a flat folder shows."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from vitshrink.config.names import shown
from vitshrink.data.columns import Columns, find_columns
from vitshrink.data.labels import WORDNET_ID
from vitshrink.data.tables import Table, is_table, read_table
from vitshrink.data.text_files import read_text, text_suffix
from vitshrink.errors import DataError

_NUMBERED = re.compile(r"_(\d{8})\.\w+")
"""``ILSVRC2012_val_00000017.JPEG`` is line 17 of a list of labels, also where only some of the images are there."""


def read_ground_truth(file: Path, images: Sequence[str]) -> list[str]:
    """The label of every image, in the order of ``images``, which are file names.

    Either a table with a column of file names and one of labels, by their usual names; or a line an image, its name
    (with or without suffix) and its label separated by a tab, a comma, a semicolon, a pipe or a blank, with a header
    line or without; or a label a line, in the order of the names. JSON may hold ``{"image": label}`` as well. After a
    WordNet id the rest of its line is left out, as the boxes in the solution file of Kaggle.

    Raises:
        DataError: unreadable, images without a label, or not one line an image.
    """
    if table := _by_columns(file):
        return _in_order_of(file, images, table)
    text = read_text(file, errors="surrogateescape")  # as names of files are
    try:
        content = json.loads(text) if text_suffix(file) == ".json" else None
    except ValueError as error:
        raise DataError(f"cannot read the labels {file}: {error}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if content is not None and not isinstance(content, Mapping):
        raise DataError(f"cannot read the labels {file}: expected a JSON object with images and labels.")
    if isinstance(content, Mapping):
        table = {PurePosixPath(str(image)).name: str(label) for image, label in content.items()}
    else:
        known = {part for name in images for part in (name, Path(name).stem)}
        table = next(
            (found for separator in ("\t", ",", ";", "|", None) if (found := _table(lines, separator)).keys() & known),
            {},
        )
    if not table:
        return [_label(line) for line in _in_order(file, lines, images)]
    return _in_order_of(file, images, table)


def _in_order_of(file: Path, images: Sequence[str], table: Mapping[str, str]) -> list[str]:
    labels = [table.get(name, table.get(Path(name).stem)) for name in images]
    missing = [name for name, label in zip(images, labels, strict=True) if label is None]
    if missing:
        raise DataError(
            f"{file} has no label for {len(missing)} of the {len(images)} images: {', '.join(map(shown, missing[:5]))}."
        )
    return [_label(label) for label in labels if label is not None]


def _by_columns(file: Path) -> dict[str, str]:
    """Labels by name from a table whose header says which column is which; empty for any other file."""
    try:
        table = read_table(file) if is_table(file) else Table([], [])
        columns = find_columns(str(file), "image", table.columns, Columns())
    except DataError:
        return {}
    if columns.label is None:
        return {}
    rows = zip(table.column(columns.image), table.column(columns.label), strict=True)
    return {PurePosixPath(str(name)).name: str(label).strip() for name, label in rows if label not in (None, "")}


def _table(lines: Sequence[str], separator: str | None) -> dict[str, str]:
    """The rest of each line by the name in front of it."""
    parts = (line.split(separator, 1) for line in lines)
    return {PurePosixPath(part[0].strip("\"' ")).name: part[1].strip("\"' ") for part in parts if len(part) == 2}


def _in_order(file: Path, lines: Sequence[str], images: Sequence[str]) -> Sequence[str]:
    numbers = [int(match[1]) for match in map(_NUMBERED.search, images) if match]
    if len(numbers) == len(images) and len(lines) != len(images) and 0 < min(numbers) <= max(numbers) <= len(lines):
        return [lines[number - 1] for number in numbers]
    if len(lines) != len(images):
        raise DataError(
            f"{file} has {len(lines)} lines for the {len(images)} images, and no line names an image: write one "
            "label per line in the order of the file names, or lines of `image label`."
        )
    return lines


def _label(text: str) -> str:
    wnid = WORDNET_ID.match(text)
    return wnid[0] if wnid else text
