"""A text and several that may follow it, one of which is right: for multiple choice."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vitshrink.data.columns import Columns, named_column
from vitshrink.data.layouts.layout import Layout, listed, text, texts
from vitshrink.data.samples import Sample
from vitshrink.errors import DataError

LISTS = ("choices", "options", "endings")
_NUMBERED = re.compile(r"(ending|choice|option|sol|solution)_?\d+", re.IGNORECASE)


class Choices(Layout):
    """A list of choices a row, or a column for each of them (``ending0``, ``ending1`` …)."""

    labels_are = "integers"
    first = ("question", "prompt", "context", "startphrase", "sent1", "goal", "text")
    labels = ("label", "answer", "answerkey", "answer_idx", "answer_index", "correct")

    def columns(self, source: str, available: Sequence[str], wanted: Columns) -> Columns:
        found = super().columns(source, available, wanted)
        numbered = tuple(name for name in available if _NUMBERED.fullmatch(name.strip()))
        pair = named_column(
            source, available, wanted.text_pair, LISTS, wanted.flags, "text-pair", needed=len(numbered) < 2
        )
        return replace(found, text_pair=pair, choices=() if pair else numbered)

    def sample(self, key: str, row: Mapping[str, Any], columns: Columns, names: Sequence[str] | None) -> Sample:  # noqa: ARG002
        choices, marks = _choices(row, columns)
        if len(choices) < 2:
            raise ValueError(f"{len(choices)} choices: at least two are needed")
        given = None if columns.label is None else row[columns.label]
        missing = given is None or given != given or given in ("", -1)
        label = None if missing else _index(given, choices, marks)
        return Sample(key, text=text(row, columns.text), label=label, choices=choices)


CHOICES = Choices()


def _choices(row: Mapping[str, Any], columns: Columns) -> tuple[tuple[str, ...], Sequence[str]]:
    """The choices, and how they are marked where that is said."""
    if columns.choices:
        return tuple(text(row, name) for name in columns.choices), ()
    given = row[columns.text_pair or ""]
    if isinstance(given, Mapping):
        return texts(given.get("text") or (), columns.text_pair), list(map(str, given.get("label") or ()))
    if isinstance(given, str) and not given.strip().startswith("["):
        raise ValueError(f"column {columns.text_pair!r} contains {given[:40]!r}, which is not a list of choices")
    return texts(listed(given, columns.text_pair), columns.text_pair), ()


def _index(given: Any, choices: Sequence[str], marks: Sequence[str]) -> int:
    """Of the right choice, which is said by its number, its mark or letter, or its text. Raises ValueError."""
    said = str(given).strip()
    letters = [chr(ord("A") + index) for index in range(len(choices))]
    found = int(said) if said.isdecimal() and said not in marks else None
    for names in (marks, choices, letters):
        if found is None and said in names:
            found = list(names).index(said)
    if found is None or not 0 <= found < len(choices):
        raise ValueError(f"the label {said[:40]!r} is not one of the {len(choices)} choices, which count from 0")
    return found


def require_as_many(samples: Sequence[Sample], source: str) -> None:
    """Raises DataError where one sample has more choices than another: the model reads them side by side."""
    first = samples[0]
    for sample in samples:
        if len(sample.choices or ()) != len(first.choices or ()):
            raise DataError(
                f"{source}, {sample.key}: {len(sample.choices or ())} choices, but {first.key} has "
                f"{len(first.choices or ())}: every sample needs the same number."
            )
