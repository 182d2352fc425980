"""One of several choices, by name."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

from vitshrink.errors import UsageError

Entry = TypeVar("Entry")


def choose(name: str, table: Mapping[str, Entry], kind: str) -> Entry:
    """An entry of a table of choices. Raises UsageError that names the nearest and all available ones."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"unknown {kind} {name!r}.{hint} Available: {', '.join(sorted(table))}.")
