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


def find_columns(source: str, kind: Kind, available: Sequence[str], wanted: Columns) -> Columns:
    """``wanted`` completed by a guess from the usual names.

    Labels are optional. A pair is guessed only together with its text: the text named alone means no pair.

    Raises:
        DataError: a wanted column does not exist, or the usual names give no column, or more than one choice.
    """
    listed = f"Columns: {', '.join(map(_shortened, available))}."
    for column in (wanted.image, wanted.text, wanted.text_pair, wanted.label):
        if column is not None and column not in available:
            raise DataError(f"{source} has no column {column!r}.{suggestion(column, list(map(_shortened, available)))}")

    image, text, pair, label = wanted.image, wanted.text, wanted.text_pair, wanted.label
    if kind == "image":
        text = pair = None
        if image is None:
            images = [name for name in IMAGE_COLUMNS if name in available]
            if len(images) != 1:
                raise DataError(f"{source}: {_which(images, 'image')} Give --image-column. {listed}")
            image = images[0]
    elif text is None:
        image = None
        pairs = [names for names in TEXT_PAIR_COLUMNS if set(names) <= set(available)]
        paired = {name for names in pairs for name in names}
        singles = [(name, None) for name in TEXT_COLUMNS if name in available and name not in paired]
        choices: list[tuple[str, str | None]] = [*pairs, *singles]
        if not choices and len(available) == 1:
            choices = [(available[0], None)]
        if len(choices) != 1 or pair is not None:
            found = [" + ".join(filter(None, choice)) for choice in choices]
            raise DataError(
                f"{source}: {_which(found, 'text')} Give --text-column (and --text-pair-column for pairs). {listed} "
                "A file without a header line needs a recipe with `header: false` and `columns`."
            )
        text, pair = choices[0]
    if label is None:
        labels = [name for name in LABEL_COLUMNS if name in available]
        if len(labels) > 1:
            raise DataError(f"{source}: {_which(labels, 'label')} Give --label-column. {listed}")
        label = labels[0] if labels else None
    return Columns(image, text, pair, label)


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


def _which(found: Sequence[str], role: str) -> str:
    return f"{' and '.join(found)} could each be the {role}." if found else f"no column looks like the {role}."


def _shortened(name: str) -> str:
    return name if len(name) <= 40 else name[:37] + "..."
