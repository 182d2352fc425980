"""Files of a foreign directory, looked at before anything reads them: inside it, regular, and without code."""

import json
from pathlib import Path
from typing import Any

from vitshrink.errors import CheckpointError

AGAIN = "The file is damaged or incomplete: download or copy it again."
"""What to do about most damage."""

_CODE_KEYS = ("auto_map", "custom_pipelines", "transformers_weights", "fusion_config", "kernel_config")
_MAX_JSON_BYTES = 64 * 2**20


def read_json(path: Path) -> Any:
    """A JSON file. Raises CheckpointError naming the file when it is unreadable, too large or not JSON."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} is larger than {_MAX_JSON_BYTES // 2**20} MB: it is not a configuration file."
            )
        return json.loads(path.read_bytes(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CheckpointError(f"{path} is not valid JSON ({first_line(error)}). {AGAIN}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}.") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return entries


def refuse_code(config: Any, path: Path) -> None:
    """Raises CheckpointError where a configuration makes transformers run code of the checkpoint."""
    if isinstance(config, dict):
        for key in _CODE_KEYS:
            if config.get(key):
                raise CheckpointError(
                    f"{path} has an entry {key!r}, which makes transformers run code or open files that the "
                    "checkpoint chooses; vitshrink never does that. If the weights belong to a standard "
                    "architecture, remove the entry in a copy."
                )


def check_regular(path: Path, directory: Path) -> None:
    """A file of the directory or a link within it. Raises CheckpointError for anything else."""
    target = check_inside(path, directory)
    if not target.is_file():
        raise CheckpointError(f"{path} is not a file{' (a dangling link)' if path.is_symlink() else ''}.")


def check_inside(path: Path, directory: Path) -> Path:
    """Where a file or folder of the directory really is; the Hub cache links snapshots to the blobs beside them.

    Raises CheckpointError for a link that leads out of it.
    """
    root = directory.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is a link that leads nowhere ({first_line(error)}).") from error
    if not target.is_relative_to(root):
        raise CheckpointError(
            f"{path} is a link out of the checkpoint, to {target}: refused. If it is intended, put a copy of the "
            f"{'folder' if target.is_dir() else 'file'} in its place."
        )
    return target


def listing(directory: Path, most: int = 8) -> str:
    names = sorted(entry.name for entry in directory.iterdir())
    return (", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")) or "nothing"


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), error.__class__.__name__)
