"""Values as flags and YAML give them, in the types of the fields of a group; and recipes, as files."""

import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from vitshrink.config.fields import Entry, Options, did_you_mean, entries_of, flag_of
from vitshrink.config.written import Written, plain, read_yaml, truth
from vitshrink.errors import UsageError

RENAMED = {"max_drop": "max_changed"}
"""Present names of entries of a job by the old ones. ``max_drop`` now is a gate alone: points of accuracy."""


def parse_option(text: str) -> Any:
    """The value in ``--option name=value``: JSON where it is, otherwise the string."""
    try:
        return json.loads(text, parse_float=Written)
    except json.JSONDecodeError:
        return text


def written_option(value: Any) -> str:
    """As ``--option name=value`` reads it: JSON, a string as it is where that reads back as the same."""
    return value if isinstance(value, str) and parse_option(value) == value else json.dumps(value)


def read_recipe(path: Path) -> dict[str, Any]:
    """The entries of a YAML recipe. Raises UsageError when it is missing or not a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the recipe {path}: {error}.") from error
    try:
        entries = read_yaml(text)
    except ValueError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(entries, dict):
        raise UsageError(f"{path} must hold entries such as 'method: whitened', one per line.")
    return entries


def warn_of_old_name(message: str) -> None:
    warnings.warn(message, FutureWarning, stacklevel=3)


def renamed(entries: Mapping[str, Any], where: str, warn: Callable[[str], None] = warn_of_old_name) -> dict[str, Any]:
    """Entries of a job by their present names; warns of an old name that says something.

    Raises UsageError for an entry under both of its names.
    """
    found = {key: value for key, value in entries.items() if str(key).replace("-", "_") not in RENAMED}
    present = {str(key).replace("-", "_") for key, value in found.items() if value is not None}
    for old, new in RENAMED.items():
        for key in (old, old.replace("_", "-")):
            if entries.get(key) is None:  # as in the recipe of an old result
                continue
            if new in present:
                raise UsageError(f"{where}: {key!r} is the old name of {new!r}, which is also given: remove {key!r}.")
            warn(
                f"{where}: {key!r} is the old name of {new!r}, the percentage of predictions that may change: write "
                f"{new!r} or {flag_of(new)}. In eval and sweeps, the gate {old!r} is points of accuracy; its "
                "counterpart here is --max-accuracy-drop."
            )
            found[new] = entries[key]
    return found


def values_of(cls: type[Options], entries: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The entries in the types of the fields of a group. Raises UsageError for one that it does not have."""
    known = {entry.name: entry for entry in entries_of(cls)}
    values: dict[str, Any] = {}
    for key, value in entries.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UsageError(f"{where}: unknown entry {key!r}. {did_you_mean(name, known)}")
        values[name] = _of_entry(known[name], value, f"{where}: {key}")
    return values


def _of_entry(entry: Entry, value: Any, where: str) -> Any:
    """A nested group is built from its entries, or from the value of the first of them."""
    if entry.group is None or isinstance(value, entry.group) or (value is None and NoneType in entry.alternatives):
        return _fitting(value, entry.alternatives, where)
    nested = value if isinstance(value, Mapping) else {entries_of(entry.group)[0].name: value}
    return entry.group(**values_of(entry.group, nested, where))


_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _fitting(value: Any, allowed: tuple[Any, ...], where: str) -> Any:
    """``value`` in one of the types; YAML and flags give lists for tuples and numbers for strings."""
    if (value is None and NoneType in allowed) or isinstance(value, Options):
        return value
    kind = allowed[0]
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_fitting(item, get_args(kind)[:1], where) for item in items)
    if get_origin(kind) is Mapping:
        if isinstance(value, Mapping):
            return {str(key): plain(entry) for key, entry in value.items()}
        raise UsageError(f"{where}: {value!r} does not fit; expected entries with a name and a value.")
    if bool in allowed or isinstance(value, bool):
        if isinstance(truth(value), bool) and bool in allowed:
            return truth(value)
    elif int in allowed:
        with suppress(ValueError):
            if isinstance(value, str):
                return int(value, 0)  # 0x10 and 1_000, which YAML may hold
            if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
                return int(value)
    elif float in allowed:
        with suppress(OverflowError):
            if isinstance(value, int | float):
                return float(value)
    elif isinstance(value, str | int | float):
        return str(value)
    expected = " or ".join(_KINDS.get(entry, "text") for entry in allowed if entry is not NoneType)
    raise UsageError(f"{where}: {value!r} does not fit; expected {expected}.")
