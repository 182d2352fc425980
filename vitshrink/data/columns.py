"""Which column of a table or data set holds the image, the text and the label."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vitshrink.data.recipes import Kind, suggestion
from vitshrink.data.samples import Label, LabelsAre
from vitshrink.errors import DataError

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "file_name")
TEXT_COLUMNS = ("text", "sentence")
TEXT_PAIR_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "context"),
    ("question1", "question2"),
    ("text1", "text2"),
)
SCORE_COLUMNS = ("score", "similarity_score")
LABEL_COLUMNS = ("label", "labels", "cls", "fine_label", "coarse_label", *SCORE_COLUMNS)


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are used, None where there is none."""

    image: str | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    flags: str = "--"
    """How the flags begin that name them, ``--eval-`` for the evaluation data of ``compress``."""


def find_columns(source: str, kind: Kind, available: Sequence[str], wanted: Columns) -> Columns:
    """``wanted`` completed by a guess from the usual names.

    Labels are optional. A pair is guessed only together with its text: the text named alone means no pair.

    Raises:
        DataError: a wanted column does not exist, or the usual names give no column, or more than one choice.
    """
    flags = wanted.flags
    listed = [name if len(name) <= 40 else name[:37] + "..." for name in available]
    for column in (wanted.image, wanted.text, wanted.text_pair, wanted.label):
        if column is not None and column not in available:
            raise DataError(f"{source} has no column {column!r}.{suggestion(column, listed)}")

    def only(choices: Sequence[tuple[str, ...]], role: str, remedy: str) -> tuple[str, ...]:
        if len(choices) == 1:
            return choices[0]
        found = " and ".join(" with ".join(choice) for choice in choices)
        problem = f"{found} could each be the {role}." if found else f"no column looks like the {role}."
        raise DataError(f"{source}: {problem} {remedy} Columns: {', '.join(listed)}.")

    def present(usual: Sequence[str]) -> list[tuple[str, ...]]:
        return [(name,) for name in usual if name in available]

    labels = present(LABEL_COLUMNS)
    label = wanted.label or (only(labels, "label", f"Give {flags}label-column.")[0] if labels else None)
    if kind == "image":
        image = wanted.image or only(present(IMAGE_COLUMNS), "image", f"Give {flags}image-column.")[0]
        return Columns(image=image, label=label)
    if wanted.text is not None:
        return Columns(text=wanted.text, text_pair=wanted.text_pair, label=label)
    pairs = [names for names in TEXT_PAIR_COLUMNS if set(names) <= set(available)]
    singles = [name for name in present(TEXT_COLUMNS) if not any(name[0] in names for names in pairs)]
    alone = [(available[0],)] if len(available) == 1 else []
    text, *pair = only(
        [*pairs, *singles] or alone,
        "text",
        f"Give {flags}text-column, and {flags}text-pair-column for pairs; a file without a header line needs a recipe "
        "that names its columns.",
    )
    return Columns(text=text, text_pair=wanted.text_pair or next(iter(pair), None), label=label)


def typed_labels(column: str, values: Sequence[Any]) -> tuple[list[Label], LabelsAre | None]:
    """Labels read from a file, as one type: integers, scores, or names.

    Whole numbers are integers, except in a column called score; anything that is not a number makes all of them names.
    Blank values become None.
    """
    present = [None if value is None or str(value).strip() == "" else value for value in values]
    given = [value for value in present if value is not None]
    if not given:
        return list(present), None
    try:
        numbers = [float(value) for value in given]
    except (TypeError, ValueError):
        return [None if value is None else str(value).strip() for value in present], "names"
    if column not in SCORE_COLUMNS and all(number.is_integer() for number in numbers):
        return [None if value is None else int(float(value)) for value in present], "integers"
    return [None if value is None else float(value) for value in present], "scores"
