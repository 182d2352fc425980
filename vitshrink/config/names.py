"""Names that others gave, of files, folders and classes: how they are shown, and where they cannot be used.

A name on a disk is bytes. Python marks those that are no text as surrogates, which no file in UTF-8 can hold, and a
name may hold what moves the cursor of a terminal. What leaves the program for a person or a document is escaped here,
in the way of ``backslashreplace``: ``caf\\xe9.png``.
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BYTES = re.compile("[\udc80-\udcff]+")
"""Bytes of a name that Python could not decode."""

_UNSHOWN = "\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff"
"""Control characters, ends of lines, what turns the direction of writing, and what is no character."""

_IN_TEXT = re.compile(f"[{_UNSHOWN}]")
_IN_LINE = re.compile(f"[{_UNSHOWN}\t\n]")

_NAMED = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}


def shown(name: object) -> str:
    """A name on one line, in characters that every file and terminal takes."""
    return _IN_LINE.sub(_escaped, _decoded(str(name)))


def shown_text(text: str) -> str:
    """A text that names stand in: the same, but its lines stay lines."""
    return _IN_TEXT.sub(_escaped, _decoded(text))


def shown_data(value: Any) -> Any:
    """Plain data for JSON with all its texts, keys too, as ``shown_text`` gives them."""
    if isinstance(value, str):
        return shown_text(value)
    if isinstance(value, Mapping):
        return {shown_text(str(key)): shown_data(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [shown_data(entry) for entry in value]
    return value


def quoted(word: str) -> str:
    """A word of a command line, as a shell such as bash reads it."""
    if shown(word) == word:
        return shlex.quote(word)
    plain = word.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + shown(_BYTES.sub(lambda match: "".join(f"\\x{byte:02x}" for byte in _bytes_of(match)), plain)) + "'"


def is_portable(path: Path) -> bool:
    """Whether every library finds the file: those in Rust and C++ take paths as UTF-8 alone, whatever Python does."""
    try:
        return os.fsencode(path) == str(path).encode()
    except UnicodeEncodeError:
        return False


def unportable(path: Path) -> str:
    """What to say of a path that is not portable."""
    if (encoding := sys.getfilesystemencoding()) == "utf-8":
        return (
            f"{path} cannot be used: safetensors and tokenizers cannot open a path that is not UTF-8. Use another name."
        )
    return (
        f"{path} cannot be used: safetensors and tokenizers read file names as UTF-8, but Python reads them as "
        f"{encoding} here. Use another name, or set PYTHONUTF8=1."
    )


def _decoded(text: str) -> str:
    """In a locale that is not UTF-8 even names that are UTF-8 come as bytes."""
    return _BYTES.sub(lambda match: _bytes_of(match).decode(errors="backslashreplace"), text)


def _bytes_of(match: re.Match[str]) -> bytes:
    return bytes(ord(each) - 0xDC00 for each in match[0])


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return _NAMED.get(match[0]) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
