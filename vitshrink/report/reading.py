"""Records from JSON, and the JSON Schema of them."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, GetJsonSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, ErrorDetails

from vitshrink.errors import DataError
from vitshrink.runtime.records import Emptied, key_of

T = TypeVar("T")

RULES = ConfigDict(extra="ignore", alias_generator=key_of, use_attribute_docstrings=True)
"""For records, and the records in them: entries that are not known are left out."""


class _EmptyObject(Emptied):
    """As which the JSON Schema shows None."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        made = handler(core)
        return made | {"anyOf": [each for each in made["anyOf"] if each != {"type": "null"}] + [_NOTHING]}


_NOTHING = {"type": "object", "maxProperties": 0}

Group = Annotated[T | None, BeforeValidator(lambda value: None if value == {} else value), _EmptyObject()]
"""A record that is None, and an empty object in JSON, where nothing was measured."""


def parse(adapter: TypeAdapter[T], text: str, where: str, newest: int) -> T:
    """A record that was written as JSON. Raises DataError that names ``where``, and the entry that is damaged.

    ``newest`` is the last version of its schema that can be read.
    """
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is not valid JSON ({error}): write it again with vitshrink compress.") from error
    written = entries.get("schema") if isinstance(entries, dict) else None
    if isinstance(written, int) and written > newest:
        raise DataError(
            f"{where} was written by a newer vitshrink (schema {written}; this version reads up to {newest}): "
            "upgrade vitshrink."
        )
    try:
        return adapter.validate_python(entries)
    except ValidationError as error:
        raise DataError(f"{where}{_problem(entries, error.errors(include_url=False))}") from error


def _problem(entries: Any, errors: list[ErrorDetails]) -> str:
    """What to say of the first of the errors."""
    missing = [str(error["loc"][0]) for error in errors if error["type"] == "missing" and len(error["loc"]) == 1]
    if not isinstance(entries, dict) or missing:
        known = f": it has no {', '.join(sorted(missing))}" if missing else ""
        return f" is not a report of vitshrink{known}."
    # where one of several records may stand, each of them has its errors: the right one has the fewest
    lacking = Counter(error["loc"][:-1] for error in errors)
    first = min(errors, key=lambda error: (error["type"] == "missing", lacking[error["loc"][:-1]]))
    path, value = _found(entries, first["loc"])
    if first["type"] == "missing":
        return f": the entry {path!r} has no {str(first['loc'][-1])!r}: the file is damaged."
    return f": the entry {path!r} cannot be {value!r}: the file is damaged."


def _found(entries: Any, location: Sequence[int | str]) -> tuple[str, Any]:
    """The path that an error is about, without the names of classes in it, and the value that lies there."""
    path = []
    for part in location:
        try:
            entries = entries[part]
        except (LookupError, TypeError):
            continue
        path.append(str(part))
    return ".".join(path), entries
