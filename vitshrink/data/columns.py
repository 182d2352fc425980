"""Which column of a table or data set holds the image, the text and the label, and what its labels are."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitshrink.data.recipes import Kind, suggestion
from vitshrink.data.samples import Label, LabelsAre
from vitshrink.errors import DataError

IMAGE_COLUMNS = (
    ("image", "img", "jpg", "jpeg", "png", "webp", "file_name"),
    ("filename", "file", "path", "file_path", "filepath", "image_path", "image_file"),
)
TEXT_COLUMNS = ("text", "sentence")
TEXT_PAIR_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "context"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("query", "passage"),
    ("query", "document"),
)
QUERY_COLUMNS = ("query_id", "qid", "query_idx")
LABEL_COLUMNS = (
    ("label", "labels", "cls", "fine_label", "coarse_label", "score", "similarity_score"),
    (
        *("target", "targets", "class", "classes", "class_name", "class_id", "class_label", "category", "y"),
        *("gold", "gold_label", "label_id", "label_name", "sentiment", "polarity", "emotion", "intent"),
        *("rating", "stars", "similarity", "relatedness_score", "relevance"),
    ),
)
"""As for images, names that say so, and names that may: the second are for where there is none of the first."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are used, None where there is none."""

    image: str | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    """Several, separated by commas, are a column for each label or score: ``several``."""
    flags: str = "--"
    """How the flags begin that name them, ``--eval-`` for the evaluation data of ``compress``."""
    unlabeled: str | None = None
    """Why there is no label, and what to do about it; None where there is one."""
    model_labels: tuple[str, ...] = ()
    """Names of a model's labels where several apply to a sample: a table may have a column for each of them."""
    layout: str | None = None
    """Of samples that are more than a text and a label: a name in ``LAYOUTS``."""
    choices: tuple[str, ...] = ()
    """A column for each of several texts, where they are not in a list."""
    query: str | None = None
    """Of the query that a pair of texts belongs to."""
    several: tuple[str, ...] = ()
    """The columns of labels where each has one of its own; ``label`` is None then."""

    @property
    def place(self) -> str:
        """Where the labels stand, for messages."""
        return f"columns {', '.join(self.several)}" if self.several else f"column {self.label!r}"

    @property
    def labeled(self) -> bool:
        return self.label is not None or bool(self.several)

    def labels(self, column: Callable[[str | None], Sequence[Any]]) -> list[Any]:
        """The labels of all rows, from a function that gives a column; ``typed_labels`` takes them on."""
        return list(zip(*map(column, self.several), strict=True)) if self.several else list(column(self.label))


def find_columns(source: str, kind: Kind, available: Sequence[str], wanted: Columns) -> Columns:
    """``wanted`` completed by a guess from the usual names, in upper or lower case, with blanks or underscores.

    Labels are optional. A pair is guessed only together with its text: the text named alone means no pair.

    Raises:
        DataError: a wanted column does not exist, or stands there twice, or the usual names give no column, or more
            than one choice.
    """
    flags = wanted.flags
    listed, shown = shortened(available), listing(available)
    several = _several(wanted.label, available)
    for column in (wanted.image, wanted.text, wanted.text_pair, None if several else wanted.label):
        if column is not None and column not in available:
            raise DataError(f"{source} has no column {column!r}.{suggestion(column, listed)}")

    def only(choices: Sequence[tuple[str, ...]], role: str, remedy: str) -> tuple[str, ...]:
        if len(choices) == 1:
            return choices[0]
        raise DataError(f"{source}: {_undecided(choices, role)} {remedy} {shown}")

    def present(usual: Sequence[str]) -> list[tuple[str, ...]]:
        return [(found,) for name in usual for found in _called(name, available)]

    def complete() -> tuple[str | None, str | None, str | None]:
        """Image, text and second text."""
        if kind == "image":
            found = present(IMAGE_COLUMNS[0]) or present(IMAGE_COLUMNS[1])
            image = wanted.image or only(found, "image", f"Give {flags}image-column.")[0]
            return image, None, None
        if wanted.text is not None:
            return None, wanted.text, wanted.text_pair
        pairs = [
            (first, second)
            for names in TEXT_PAIR_COLUMNS
            for first in _called(names[0], available)
            for second in _called(names[1], available)
        ]
        singles = [name for name in present(TEXT_COLUMNS) if not any(name[0] in names for names in pairs)]
        named = [name for name in available if not re.fullmatch(r"(Unnamed: \d+)?", name)]  # pandas' index has no name
        text, *pair = only(
            [*pairs, *singles] or [(name,) for name in named if len(named) == 1],
            "text",
            f"Give {flags}text-column, and {flags}text-pair-column for pairs. A file without a header line needs "
            "a recipe that names its columns.",
        )
        return None, text, wanted.text_pair or next(iter(pair), None)

    remedy = f"Give {flags}label-column."
    sure, likely = map(present, LABEL_COLUMNS)
    label = None if several else wanted.label or (only(sure, "label", remedy)[0] if sure else None)
    if label is None and not several:
        several = _each(wanted.model_labels, available)
    if label is None and not several and len(likely) == 1:
        ((label,),) = likely
    unlabeled = None if label or several else f"{_undecided(likely, 'label')} {remedy} {shown}"
    image, text, pair = complete()
    for column in (image, text, pair, label, *several):
        if column is not None and available.count(column) > 1:
            raise DataError(
                f"{source} has {available.count(column)} columns with the name {column!r}: rename all but one."
            )
    query = next((column for name in QUERY_COLUMNS for column in _called(name, available)), None)
    if pair is None or available.count(query or "") > 1:
        query = None
    if query is None and pair is not None and _plain(text or "") == "query":
        query = text
    return Columns(image, text, pair, label, flags, unlabeled, query=query, several=several)


def shortened(names: Sequence[str]) -> list[str]:
    return [name if len(name) <= 40 else name[:37] + "..." for name in names]


def listing(names: Sequence[str]) -> str:
    """The columns that there are, for messages."""
    return f"Columns: {', '.join(name or repr(name) for name in shortened(names))}."


def named_column(
    source: str,
    available: Sequence[str],
    wanted: str | None,
    usual: Sequence[str],
    flags: str,
    role: str,
    *,
    needed: bool = True,
) -> str | None:
    """The column that is wanted, or else the first that is called by a usual name.

    Raises:
        DataError: a wanted column that is not there, or stands there twice, or none that is needed.
    """
    if wanted is not None and wanted not in available:
        raise DataError(f"{source} has no column {wanted!r}.{suggestion(wanted, shortened(available))}")
    found = wanted or next((column for name in usual for column in _called(name, available)), None)
    if found is None and needed:
        raise DataError(
            f"{source}: no column looks like the {role}. Give {flags}{role}-column, or name it "
            f"{' or '.join(usual[:2])}. {listing(available)}"
        )
    if found is not None and available.count(found) > 1:
        raise DataError(f"{source} has {available.count(found)} columns with the name {found!r}: rename all but one.")
    return found


def _several(wanted: str | None, available: Sequence[str]) -> tuple[str, ...]:
    """The columns in a list with commas; nothing where that is the name of one column, or one is not there."""
    names = () if wanted is None or wanted in available else tuple(name.strip() for name in wanted.split(","))
    return names if len(names) > 1 and set(names) <= set(available) else ()


def _each(labels: Sequence[str], available: Sequence[str]) -> tuple[str, ...]:
    """A column for each label, where every one has its own."""
    found = [_called(_plain(label), available) for label in labels]
    return tuple(columns[0] for columns in found) if found and all(len(columns) == 1 for columns in found) else ()


def _called(usual: str, available: Sequence[str]) -> list[str]:
    """The column of exactly this name, or else those whose names differ in case, blanks and hyphens alone."""
    alike = [name for name in dict.fromkeys(available) if _plain(name) == usual]
    return [usual] if usual in alike else alike


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip()).casefold()


def _undecided(choices: Sequence[tuple[str, ...]], role: str) -> str:
    found = " and ".join(" with ".join(choice) for choice in choices)
    return f"{found} could each be the {role}." if found else f"no column looks like the {role}."


def typed_labels(
    where: str, values: Sequence[Any], several: Sequence[str] = ()
) -> tuple[list[Label], LabelsAre | None]:
    """The labels of a column, as one type whatever they were read from: integers, scores, or names.

    Numbers are integers where all of them are whole (1.0 is, and so is "1"), and scores where any is not; what is no
    number makes all of them names. Truth values are 0 and 1. Blank values, and NaN among numbers, become None.
    Lists stay lists, and the values of ``several`` columns are numbers. ``where`` names source and column in errors.

    Raises:
        DataError: a value that is no class or score, nor a list of them.
    """
    if several:
        return [
            _row_of_numbers(f"{where}, row {number}", several, row) for number, row in enumerate(values, 1)
        ], "columns"
    lists = [isinstance(value, Sequence) and not isinstance(value, str) for value in values]
    for number, value in enumerate(values, start=1):
        nested = value if lists[number - 1] else [value]
        if any(isinstance(each, Mapping | list | tuple) for each in nested):
            raise DataError(f"{where}, row {number}: {str(value)[:40]} is not a class, a score or a list of them.")
    if any(lists):
        return _listed(where, values, lists), "lists"
    present = [None if _is_blank(value) else value for value in values]
    numbers = [None if value is None else _number(value) for value in present]
    given = [number for number in numbers if number is not None and not math.isnan(number)]
    if all(value is None for value in present):
        return list(present), None
    if not given or any(number is None for number, value in zip(numbers, present, strict=True) if value is not None):
        return [None if value is None else str(value).strip() for value in present], "names"
    labels = [None if number is None or math.isnan(number) else number for number in numbers]
    if all(float(number).is_integer() for number in given):
        return [None if label is None else int(label) for label in labels], "integers"
    return [None if label is None else float(label) for label in labels], "scores"


def _listed(where: str, values: Sequence[Any], lists: Sequence[bool]) -> list[Label]:
    """A tuple a row; blank rows become None. Raises DataError for one class among lists."""
    for number, (value, listed) in enumerate(zip(values, lists, strict=True), start=1):
        if not listed and not _is_blank(value):
            raise DataError(f"{where}, row {number}: {str(value)[:40]} is not a list, but other rows hold lists.")
        if listed and any(_is_blank(each) for each in value):
            raise DataError(f"{where}, row {number}: {str(value)[:40]} contains a blank entry.")
    return [tuple(value) if listed else None for value, listed in zip(values, lists, strict=True)]


def _row_of_numbers(where: str, columns: Sequence[str], row: Sequence[Any]) -> tuple[float, ...]:
    numbers = [None if _is_blank(value) else _number(value) for value in row]
    for column, value, number in zip(columns, row, numbers, strict=True):
        if number is None or not math.isfinite(number):
            raise DataError(f"{where}: column {column!r} holds {str(value)[:40]!r}, which is not a number.")
    return tuple(number for number in numbers if number is not None)


def class_names(labels: Sequence[Label], labels_are: LabelsAre | None) -> list[str] | None:
    """The distinct names in order; None where labels are no names."""
    return sorted({str(label) for label in labels if label is not None}) if labels_are == "names" else None


def _is_blank(value: object) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf|nan|n/?a|null|none", re.IGNORECASE)


def _number(value: object) -> float | None:
    """The number that a value is, NaN for what stands for a missing one, None for anything else."""
    if isinstance(value, int | float):
        return value
    text = str(value).strip()
    if not _NUMBER.fullmatch(text):  # float() would take "1_0" as well
        return None
    try:
        return float(text)
    except ValueError:
        return math.nan
