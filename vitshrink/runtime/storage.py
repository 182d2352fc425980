"""Directories by URL: in object stores, and whatever else fsspec reaches.

An object of a store appears whole or not at all; a directory does not. What belongs together is written under a
temporary name first, read back, moved, and then made visible by one last object, the marker, which lists the others
with their checksums. A directory without it is not there.
"""

import hashlib
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from vitshrink.errors import DependencyError, OutputError, UsageError
from vitshrink.runtime import checksums

MARKER = checksums.FILE_NAME

PART = 2**20
"""Bytes that are read at once."""


def is_url(location: object) -> bool:
    """Whether a location is a URL, and no path."""
    return "://" in str(location)


def below(location: str | Path, *names: str) -> str:
    """What lies below a directory, which a path or a URL names."""
    return "/".join((str(location).rstrip("/"), *names)) if is_url(location) else str(Path(location, *names))


@cache
def scratch(purpose: str) -> Path:
    """A directory of this process on this machine, which is gone when it ends."""
    holder = tempfile.TemporaryDirectory(prefix=f"vitshrink-{purpose}-")
    _HELD.append(holder)
    return Path(holder.name)


_HELD: list[Any] = []


@dataclass(frozen=True)
class Place:
    """A directory by its URL."""

    url: str
    files: Any
    """The file system of fsspec."""
    path: str
    """Within that."""

    @classmethod
    def of(cls, url: str) -> "Place":
        """Raises UsageError for a URL of no known kind, DependencyError for one that needs a package."""
        import fsspec

        try:
            files, path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise DependencyError(f"{url}: {error}") from error
        except Exception as error:  # every file system has errors of its own
            raise UsageError(f"{url} cannot be used: {_reason(error)}.") from error
        if set(path) & set("*?["):
            raise UsageError(f"{url}: a URL with *, ? or [ means several files; give one directory.")
        return cls(url.rstrip("/"), files, path.rstrip("/"))

    def __truediv__(self, name: str) -> "Place":
        """A directory below."""
        return Place(f"{self.url}/{name}", self.files, f"{self.path}/{name}")

    def __str__(self) -> str:
        return self.url

    def exists(self) -> bool:
        """Whether there is a file or a directory."""
        with _explaining(self.url):
            self.files.invalidate_cache()
            return bool(self.files.exists(self.path))

    def is_file(self) -> bool:
        """Whether it is a file, and no directory."""
        with _explaining(self.url):
            self.files.invalidate_cache()
            return bool(self.files.isfile(self.path))

    def parent(self) -> "Place":
        """The directory that it lies in."""
        return Place(self.url.rpartition("/")[0], self.files, self.path.rpartition("/")[0])

    def names(self) -> dict[str, int]:
        """The files below, by their names from here, with their bytes."""
        with _explaining(self.url):
            self.files.invalidate_cache()
            found: Mapping[str, Mapping[str, Any]] = self.files.find(self.path, detail=True)
        listed = {name.removeprefix(self.path).lstrip("/"): int(each["size"] or 0) for name, each in found.items()}
        parts = {name: name.split("/") for name in listed}
        return {
            name: size
            for name, size in listed.items()
            if parts[name][-1][:1] not in ("", ".") and ".." not in parts[name]
        }

    def read(self, name: str) -> bytes | None:
        """What a file holds; None where there is none."""
        with _explaining(f"{self.url}/{name}"):
            try:
                return bytes(self.files.cat_file(f"{self.path}/{name}"))
            except FileNotFoundError:
                return None

    def fetch(self, name: str, target: Path) -> bool:
        """Copy a file here, whole or not at all; False where there is none."""
        target.parent.mkdir(parents=True, exist_ok=True)
        half = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            with _explaining(f"{self.url}/{name}"):
                try:
                    self.files.get_file(f"{self.path}/{name}", str(half))
                except FileNotFoundError:
                    return False
            half.replace(target)
            return True
        finally:
            half.unlink(missing_ok=True)

    def put(self, source: Path, name: str) -> None:
        """Copy a file there, whole or not at all."""
        folder, _, last = f"{self.path}/{name}".rpartition("/")
        half = f"{folder}/.{last}.{secrets.token_hex(4)}"
        with _explaining(f"{self.url}/{name}"):
            self.files.makedirs(folder, exist_ok=True)
            try:
                self.files.put_file(str(source), half)
                self._move(half, f"{folder}/{last}")
            except BaseException:
                with suppress(Exception):
                    self.files.rm_file(half)
                raise

    def remove(self, name: str = "") -> None:
        """Remove a file, or all that is here; nothing where there is none."""
        path = f"{self.path}/{name}" if name else self.path
        with _explaining(self.url), suppress(FileNotFoundError):
            self.files.invalidate_cache()
            self.files.rm(path, recursive=not name)

    def missing(self) -> str | None:
        """What is missing of a published directory, as its marker lists it; None where nothing is."""
        text = self.read(MARKER)
        if text is None:
            return f"{self.url} contains nothing complete, because {MARKER} is missing."
        listed, there = checksums.parse(text), self.names()
        absent = [name for name in listed if name not in there]
        return f"{self.url}/{absent[0]} is missing." if absent else None

    def download(self, target: Path) -> None:
        """A copy of a published directory. Raises OutputError where it is not complete, or not what was published."""
        if (problem := self.missing()) is not None:
            raise OutputError(problem)
        for name in self.names():
            self.fetch(name, target / name)
        broken = checksums.broken_files(target)
        if broken:
            name, what = next(iter(broken.items()))
            raise OutputError(f"{self.url}/{name} {what}.")

    def publish(self, source: Path, first: str) -> None:
        """Have what is in a local directory, with the checksums of its files, appear here: whole or not at all.

        The file ``first`` tells who wrote it where a kill leaves the others behind.

        Raises OutputError where it cannot be written, or is read back otherwise. What was here before is replaced.
        """
        new = self.sibling(f"vitshrink-{secrets.token_hex(8)}")
        files = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
        try:
            for name in files:
                new.put(source / name, name)
                if new._digest(name) != checksums.digest(source / name):
                    raise OutputError(f"{new.url}/{name} differs after it was written and read back.")
            self.remove(MARKER)  # from here on nobody takes what is here for complete
            for name in self.names():
                self.remove(name)
            with _explaining(self.url):
                for name in sorted(files, key=lambda name: (name == MARKER, name != first)):
                    self.files.makedirs(f"{self.path}/{name}".rpartition("/")[0], exist_ok=True)
                    self._move(f"{new.path}/{name}", f"{self.path}/{name}")
        finally:
            with suppress(OutputError):
                new.remove()

    def sibling(self, suffix: str) -> "Place":
        """A hidden directory beside this one."""
        name = self.path.rpartition("/")[2]
        hidden = f".{name}.{suffix}"
        return Place(f"{self.url.removesuffix(name)}{hidden}", self.files, f"{self.path.removesuffix(name)}{hidden}")

    def identity(self) -> dict[str, str]:
        """What the store says of every file, which changes with its contents."""
        with _explaining(self.url):
            if self.is_file():
                return {"": str(self.files.ukey(self.path))}
            return {name: str(self.files.ukey(f"{self.path}/{name}")) for name in sorted(self.names())}

    def _move(self, old: str, new: str) -> None:
        from fsspec.implementations.local import LocalFileSystem

        if isinstance(self.files, LocalFileSystem):  # where a copy would be seen while it grows
            self.files.mv(old, new)
        else:
            self.files.cp_file(old, new)
            self.files.rm_file(old)

    def _digest(self, name: str) -> str:
        found = hashlib.sha256()
        with _explaining(f"{self.url}/{name}"), self.files.open(f"{self.path}/{name}", "rb") as file:
            while part := file.read(PART):
                found.update(part)
        return found.hexdigest()


@dataclass
class Mirror:
    """A local directory of files that never change, kept also at a place, and taken from there where it is not here."""

    here: Path
    there: Place
    _sent: dict[str, tuple[int, int]] = field(default_factory=dict)

    def pull(self) -> None:
        """Take what is there, where nothing is here."""
        if not self.here.is_dir():
            for name in self.there.names() if self.there.exists() else ():
                self.there.fetch(name, self.here / name)

    def push(self) -> None:
        """Make what is there the same as what is here."""
        mine = {path.relative_to(self.here).as_posix(): path for path in self.here.rglob("*") if path.is_file()}
        for name, path in mine.items():
            written = (path.stat().st_mtime_ns, path.stat().st_size)
            if self._sent.get(name) != written:
                self.there.put(path, name)
                self._sent[name] = written
        for name in self.there.names().keys() - mine.keys():
            self.there.remove(name)
            self._sent.pop(name, None)

    def remove(self) -> None:
        """Remove what is there."""
        if self.there.exists():
            self.there.remove()


@contextmanager
def _explaining(url: str) -> Iterator[None]:
    """Turn what a file system says, which may be anything, into an OutputError."""
    try:
        yield
    except (OutputError, FileNotFoundError):
        raise
    except Exception as error:
        raise OutputError(f"cannot reach {url}: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
