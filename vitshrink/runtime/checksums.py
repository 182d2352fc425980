"""Checksums beside a published model, in the form that ``sha256sum --check`` reads."""

import hashlib
import os
import re
from pathlib import Path, PurePosixPath

from vitshrink.errors import OutputError

FILE_NAME = "SHA256SUMS"

RENDERED = ("README.md", "report.md", "report.html")
"""Texts that are made from ``report.json`` and may be made again or edited: they have no checksum."""

_LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)", re.DOTALL)

_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
"""As ``sha256sum`` writes what would end a line."""


def record(directory: Path) -> None:
    """Write the checksums of all files below ``directory``. Raises OSError."""
    _write(directory, {name: digest(directory / name) for name in _files(directory)})


def broken_files(directory: Path) -> dict[str, str]:
    """The files that are not as they were published, and what is wrong with them; none when all is well."""
    try:
        recorded = parse((directory / FILE_NAME).read_bytes())
    except FileNotFoundError:
        return {FILE_NAME: "is missing"}
    except (OSError, OutputError) as error:
        return {FILE_NAME: f"cannot be read ({error})"}
    broken = {}
    for name, wanted in recorded.items():
        try:
            if digest(directory / name) != wanted:
                broken[name] = "was changed"
        except FileNotFoundError:
            broken[name] = "is missing"
        except OSError as error:
            broken[name] = f"cannot be read ({error.strerror})"
    return broken | {name: "was added" for name in _files(directory) if name not in recorded}


def _files(directory: Path) -> list[str]:
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in names if name != FILE_NAME and PurePosixPath(name).name not in RENDERED)


def parse(content: bytes) -> dict[str, str]:
    """The checksums that a file of them holds, by names. Raises OutputError for what is none."""
    found = {}
    for line in os.fsdecode(content).removesuffix("\n").split("\n"):
        match = _LINE.fullmatch(line)
        name = "" if match is None else _unescaped(match[3]) if match[1] else match[3]
        if match is None or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise OutputError(f"the line {line[:100]!r} is not a checksum of a file in this directory")
        found[name] = match[2]
    return found


def _write(directory: Path, digests: dict[str, str]) -> None:
    """A line in which a name is escaped begins with a backslash."""
    lines = []
    for name, known in sorted(digests.items()):
        escaped = "".join(_ESCAPES.get(character, character) for character in name)
        lines.append(f"{'' if escaped == name else chr(92)}{known}  {escaped}\n")
    (directory / FILE_NAME).write_bytes(os.fsencode("".join(lines)))


def _unescaped(name: str) -> str:
    meant = {escape: character for character, escape in _ESCAPES.items()}
    return re.sub(r"\\.", lambda match: meant.get(match[0], match[0]), name)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
