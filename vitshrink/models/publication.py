"""An output directory that appears complete or not at all.

Everything is written to a staging directory beside the target, which is renamed when it is done. The staging
directory is locked while its process lives: a second run for the same target meets the lock and stops, and a
directory without a lock is what a killed run left and is removed. No result depends on the locks.
"""

import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vitshrink.config.names import is_portable, unportable
from vitshrink.errors import CheckpointError, OutputError, explanation
from vitshrink.models.files import read_json
from vitshrink.models.format import QUANT_METHOD
from vitshrink.models.source import CONFIG
from vitshrink.runtime import checksums, processes
from vitshrink.runtime.locks import require_locks, try_lock
from vitshrink.runtime.storage import MARKER, Place, is_url

REPORT = "report.json"
EXPORT = "export.json"
COMPARISON = ("comparison.html", "comparison.md")
"""What lies beside several models in one directory."""


@contextmanager
def publish(
    target: Path, *, parts: Collection[str] = (), overwrite: bool = False, protect: Path | None = None
) -> Iterator[Path]:
    """Yield a staging directory; when the body ends without an exception, it becomes ``target``.

    It holds one model, or one in each of the directories ``parts``, which are made: they appear together.

    With ``overwrite``, a directory that vitshrink wrote before is replaced; one that holds other models than
    ``parts`` is not. Anything else that exists is refused, except an empty directory, and so is what is, holds or lies
    in ``protect``, the source model. After an exception, an interruption included, the staging directory is gone and
    the target is as it was.

    Raises:
        OutputError: the target may not or cannot be written, another process is writing it, or the system is Windows.
    """
    require_locks()
    target = _absolute(target)
    if not is_portable(target):
        raise OutputError(unportable(target))
    with _explaining(target):
        _check_target(target, parts, overwrite=overwrite, protect=protect)
        created = _make_parents(target.parent)
    try:
        with _staging(target) as staging:
            models = [staging / part for part in parts] or [staging]
            with _explaining(target):
                for model in models:
                    model.mkdir(exist_ok=True)
            yield staging
            with _explaining(target):
                for model in models:
                    checksums.record(model)
                _settle(staging)
                _check_target(target, parts, overwrite=overwrite, protect=protect)
                _swap(staging, target)
    except BaseException:
        for parent in created:
            with suppress(OSError):
                parent.rmdir()  # fails if something else was put there in the meantime
        raise


@contextmanager
def publish_by_main(target: Path, bytes_needed: int, *, parts: Collection[str] = (), **options: Any) -> Iterator[Path]:
    """``publish`` in the first process of a job; what the others, which may be on other machines, write is thrown away.

    Raises:
        OutputError: as ``publish``, or there is too little space.
        OtherProcessError: the first process may not, or cannot, publish.
    """
    with ExitStack() as outputs:
        with processes.together():
            if processes.is_main():
                check_space(target, bytes_needed)
                staging = outputs.enter_context(publish(target, parts=parts, **options))
            else:
                staging = Path(outputs.enter_context(TemporaryDirectory(prefix="vitshrink-")))
                for part in parts:
                    (staging / part).mkdir()
        yield staging
        with processes.together():
            outputs.close()


def free_place(url: str, *, overwrite: bool) -> Place:
    """The place of an output that is a URL. Raises OutputError where it may not be written, and as ``Place.of``."""
    place = Place.of(url)
    names = place.names() if place.exists() else {}
    if names and not overwrite:
        raise OutputError(f"{url} exists and is not empty: choose another output, or pass --overwrite.")
    if names and not names.keys() & {REPORT, MARKER}:
        raise OutputError(f"vitshrink did not write {url}, so it is kept: choose another output.")
    return place


def check_space(directory: Path, bytes_needed: int) -> None:
    """Raises OutputError when there is too little space for ``directory``, which need not exist yet."""
    directory = _absolute(directory)
    existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < bytes_needed:
        raise OutputError(
            f"{existing} has {free / 1000000.0:.1f} MB free, but about {bytes_needed / 1000000.0:.1f} MB are "
            "needed: free some space, or choose another output."
        )


def check_writable(directory: str | Path | None, flag: str) -> None:
    """Raises OutputError, before any work, for a folder that cannot be made or written to; None is no folder."""
    if directory is None:
        return
    if is_url(directory):
        Place.of(str(directory))
        return
    path = Path(directory).expanduser().absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"{flag} {directory}: {existing} is not a writable folder; choose another.")


@contextmanager
def _explaining(target: Path) -> Iterator[None]:
    """Turn what the operating system refuses into an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {target}: {explanation(error)}.") from error


def _absolute(target: Path) -> Path:
    # The last part stays as it is: a link there must be seen as one.
    target = Path(target).expanduser()
    return target.resolve() if target.name in ("", "..") else target.parent.resolve() / target.name


def _check_target(target: Path, parts: Collection[str], *, overwrite: bool, protect: Path | None) -> None:
    if target.is_symlink():
        raise OutputError(f"{target} is a link: give the directory itself.")
    if protect is not None:
        source = protect.resolve()
        if target.is_relative_to(source) or source.is_relative_to(target):
            raise OutputError(f"{target} is, contains or is inside the source model {protect}: choose another output.")
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{target} is a file: choose another output.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{target} exists and is not empty: choose another output, or pass --overwrite.")
    others = sorted({path.name for path in target.iterdir()} - {*parts, *COMPARISON}) if parts else []
    if others:
        raise OutputError(
            f"{target} contains {', '.join(others[:3])}{' …' if len(others) > 3 else ''}. This job does not "
            "write these, but its sizes replace the whole directory: choose another output."
        )
    if not all(_is_ours(target / part) for part in parts or ("",) if (target / part).exists()):
        raise OutputError(f"vitshrink did not write {target}, so it is kept: choose another output.")


def _is_ours(directory: Path) -> bool:
    """Whether vitshrink wrote a directory: its config names the format, or a report an entry "vitshrink"."""
    with suppress(CheckpointError, KeyError, TypeError):
        return bool(read_json(directory / CONFIG)["quantization_config"]["quant_method"] == QUANT_METHOD)
    for record in (REPORT, EXPORT):
        with suppress(CheckpointError, KeyError, TypeError):
            return bool(read_json(directory / record)["vitshrink"])
    return False


def _make_parents(parent: Path) -> list[Path]:
    """Make the missing parents; return those made, innermost first."""
    missing = [directory for directory in (parent, *parent.parents) if not directory.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    return missing


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    token = f"{time.time_ns():x}{secrets.token_hex(2)}"
    newborn = target.parent / f".{target.name}.new-{token}"
    staging = target.parent / f".{target.name}.vitshrink-{os.getpid()}-{token}"
    with _explaining(target):
        newborn.mkdir()
        lock = os.open(newborn, os.O_RDONLY)
    try:
        with _explaining(target):
            try_lock(lock)
            newborn.rename(staging)  # it gets the name by which others find it only now that it is locked
            _clear_leftovers(target, staging)
        yield staging
    finally:
        for directory in (newborn, staging):
            shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _clear_leftovers(target: Path, own: Path) -> None:
    """Remove what killed runs left, put back what they had moved aside; stop where another run is alive."""
    name = re.compile(rf"\.{re.escape(target.name)}\.(vitshrink-(\d+|old)|new)-[0-9a-f]+")
    for other in sorted(target.parent.iterdir()):
        if other == own or not name.fullmatch(other.name) or other.is_symlink() or not other.is_dir():
            continue
        try:
            newborn = other.name.startswith(f".{target.name}.new-")
            if newborn and time.time() - other.stat().st_mtime < 60:
                continue  # its run is just about to lock it
            lock = os.open(other, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its run ended just now
        try:
            free = try_lock(lock)
            if free is False and _older(other, own):
                raise OutputError(
                    f"another vitshrink run writes to {target} (in {other.name}): wait until it ends, or choose "
                    "another output."
                )
            if free and other.name.startswith(_aside(target)) and not target.exists():
                other.rename(target)
            elif free:
                shutil.rmtree(other)
        finally:
            os.close(lock)


def _older(other: Path, own: Path) -> bool:
    """By the times in their names: of two runs that start at once and see each other, exactly one goes on."""
    return other.name.rpartition("-")[2] < own.name.rpartition("-")[2]


def _aside(target: Path) -> str:
    return f".{target.name}.vitshrink-old-"


def _settle(staging: Path) -> None:
    """Give every file the mode that the umask asks for, and have it written to the disk."""
    mode = staging.stat().st_mode & 0o777  # mkdir applied the umask
    for path in (*staging.rglob("*"), staging):
        # safetensors creates files that only their owner can read
        path.chmod(mode if path.is_dir() else mode & 0o666)
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(staging: Path, target: Path) -> None:
    """Rename the staging directory to the target; a directory that is there is moved aside, then removed."""
    old = target.parent / f"{_aside(target)}{secrets.token_hex(4)}"
    replaced = target.exists() and any(target.iterdir())
    try:
        if replaced:
            target.rename(old)
        staging.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    _sync(target.parent)
    if replaced:
        shutil.rmtree(old, ignore_errors=True)
