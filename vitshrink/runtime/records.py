"""Records: frozen dataclasses that are written as JSON."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, TypeVar, get_type_hints

from vitshrink.config.names import shown_text

T = TypeVar("T")


@dataclass(frozen=True)
class LeftOut:
    """Marks a field that is not written where it is None.

    ``beside`` names another field of the record: where that one is set, this one is written even if it is None.
    """

    beside: str | None = None


class Emptied:
    """Marks a field that is written as an empty object where it is None."""


IfSet = Annotated[T | None, LeftOut()]
"""A field that is written only where it is set."""


def key_of(name: str) -> str:
    """The JSON key of a field: ``class_`` is written as ``class``, which is a word of Python."""
    return name.removesuffix("_")


def plain(value: Any) -> Any:
    """Plain data for JSON, from records, mappings, sequences and single values.

    What is not a finite number becomes None. Names, paths, types and devices become text without control characters.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return _entries(value)
    if isinstance(value, Mapping):
        return {shown_text(str(key)): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, int | float | bool):
        return value
    return shown_text(str(value))


def _entries(record: Any) -> dict[str, Any]:
    entries = {}
    for name, mark in _marks(type(record)).items():
        value = getattr(record, name)
        if value is None and isinstance(mark, LeftOut) and not _beside(mark, record):
            continue
        entries[key_of(name)] = {} if value is None and isinstance(mark, Emptied) else plain(value)
    return entries


def _beside(mark: LeftOut, record: Any) -> bool:
    return mark.beside is not None and getattr(record, mark.beside) is not None


def _marks(record: type[Any]) -> dict[str, LeftOut | Emptied | None]:
    """The fields of a class of records, in their order, each with its mark."""
    hints = get_type_hints(record, include_extras=True)
    return {
        each.name: next(
            (mark for mark in getattr(hints[each.name], "__metadata__", ()) if isinstance(mark, LeftOut | Emptied)),
            None,
        )
        for each in fields(record)
    }
