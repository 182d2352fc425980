"""Files of text, plain or compressed, in the encoding that they say they have."""

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from vitshrink.errors import DataError

_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def text_suffix(path: Path) -> str:
    """The suffix that says what is in a file of text, in lower case: ``.csv`` for ``Train.CSV.gz``."""
    suffix = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if suffix in _OPEN else suffix


def read_text(path: Path, errors: Literal["strict", "surrogateescape"] = "strict") -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 where its first bytes say so; ends of lines as they are.

    ``errors`` says what becomes of bytes that are no UTF-8: ``surrogateescape`` keeps them, as in names of files.

    Raises:
        DataError: unreadable, another encoding, or bytes that are no text; names the line.
    """
    suffix = path.suffix.lower()
    try:
        with _OPEN.get(suffix, open)(path, "rb") as file:
            content: bytes = file.read()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding, errors if encoding.startswith("utf-8") else "strict")
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        line = content[: error.start].decode(encoding, errors="replace").count("\n") + 1
        raise DataError(
            f"{path}, line {line}: not {name} ({error.reason}). Save the file as UTF-8, for example with "
            "`iconv -f WINDOWS-1252 -t UTF-8`."
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(
            f"{path}, line {line}: contains a NUL byte, which is not text. Remove it, or save the file as UTF-8 "
            "if it is UTF-16 without a byte order mark."
        )
    return text
