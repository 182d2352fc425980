"""What a finished job follows from: its recipe, and the files that it reads."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from vitshrink import __version__
from vitshrink.config import CompressConfig

ASIDE = ("output", "overwrite", "cache", "dry_run", "offline", "save_every")
"""Entries that do not show in the result."""

READ = ("model", "calibration", "eval", "class_map")
"""Entries that name files or folders, where they are no Hub ids or recipes."""


def fingerprints(configs: Sequence[CompressConfig]) -> list[str]:
    """For each config the SHA-256 of all that its result depends on, as far as it is known without running the job.

    Local files count by name, size and time of change. What lies on the Hub counts by its id alone.
    """
    known: dict[str, str | None] = {}

    def files(source: str) -> str | None:
        if source not in known:
            known[source] = _digest(Path(source).expanduser())
        return known[source]

    found = []
    for config in configs:
        recipe = {entry.name: getattr(config, entry.name) for entry in fields(config) if entry.name not in ASIDE}
        read = {name: files(str(recipe[name])) for name in READ if recipe.get(name) is not None}
        if config.finetune_data is not None:
            read["finetune"] = files(config.finetune_data.source)
        text = json.dumps({"vitshrink": __version__, "recipe": recipe, "read": read}, sort_keys=True, default=str)
        found.append(hashlib.sha256(text.encode()).hexdigest())
    return found


def _digest(path: Path) -> str | None:
    """Digest of what lies at or below a path; None where there is nothing of that name."""
    if not path.exists():
        return None
    digest = hashlib.sha256()
    for name, stat in sorted(_walk(path)):
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _walk(path: Path) -> Iterator[tuple[str, os.stat_result]]:
    if path.is_file():
        yield path.name, path.stat()
    for directory, _, names in os.walk(path):
        for name in names:
            file = Path(directory, name)
            if file.is_file():
                yield str(file.relative_to(path)), file.stat()
