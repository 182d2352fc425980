"""Walking trees of folders, through links."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path


def walk(
    root: Path, enters: Callable[[str], bool], on_link: Callable[[Path], object] = lambda _link: None
) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
    """Every folder at and below ``root``, with its entries in the order of their names.

    Folders whose names ``enters`` takes are entered, and are not among the entries. Linked folders come last, and none
    is entered twice: ``on_link`` is told of those that lead to a folder which was entered before, or which holds
    ``root``.

    Raises:
        OSError: a folder, which it names, cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    above = {_identity(parent) for parent in root.resolve().parents}
    folders, links = [root], list[Path]()
    while folders or links:
        links.sort()
        folder = folders.pop() if folders else links.pop(0)
        identity = _identity(folder)
        if identity in seen or identity in above:
            on_link(folder)
            continue
        seen.add(identity)
        others = []
        for entry in _entries(folder):
            if not enters(entry.name) or not is_folder(entry):
                others.append(entry)
            else:
                (links if entry.is_symlink() else folders).append(folder / entry.name)
        yield folder, others


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: Path) -> tuple[int, int]:
    """The same for all names of a folder."""
    found = folder.stat()
    return found.st_dev, found.st_ino
