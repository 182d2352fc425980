"""What a finished job follows from: its recipe, and the contents of all that it reads."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from vitshrink._version import __version__
from vitshrink.config.fields import entries_of, plain_values
from vitshrink.config.options import CompressConfig, DataConfig
from vitshrink.data import hub_source, open_samples
from vitshrink.data.sources import divide
from vitshrink.errors import VitshrinkError
from vitshrink.models.hub import revision
from vitshrink.runtime.checksums import digest
from vitshrink.runtime.storage import Place, is_url
from vitshrink.runtime.trees import walk

APART = "@"
"""Between what is known without the network and the commits of what lies on the Hub."""


def fingerprints(configs: Sequence[CompressConfig]) -> list[str]:
    """For each config the SHA-256 of all that its result depends on, as far as it is known without running the job.

    Local models and class maps count with the contents of their files, samples and their labels as the job itself will
    read them. What lies on the Hub counts with its commit, after an ``APART``, where that can be found out. A job whose
    data cannot be read now is like no other: it will say itself what is wrong.
    """
    known, found = _Known(), []
    for config in configs:
        try:
            found.append(_fingerprint(config, known))
        except Exception:
            found.append(secrets.token_hex(32))
    return found


def recipe_key(config: CompressConfig) -> str:
    """SHA-256 of the version of vitshrink and of what the config itself says of the result."""
    return _sha256({"vitshrink": __version__, "recipe": _recipe(config)})


def is_same(earlier: str, now: str) -> bool:
    """Whether two fingerprints are of the same job; commits count where both of them are known."""
    (local, _, commits), (other, _, others) = earlier.partition(APART), now.partition(APART)
    return local == other and (commits == others or not commits or not others)


class _Known:
    """What was looked at already: the jobs of a sweep mostly read the same."""

    def __init__(self) -> None:
        self.contents = cache(_contents)
        self.samples = cache(_samples)
        self.revision = cache(revision)


def _fingerprint(config: CompressConfig, known: _Known) -> str:
    read: dict[str, Any] = {}
    commits: dict[str, str | None] = {}
    for entry in entries_of(type(config)):
        name = getattr(config, entry.name)
        if entry.option.reads and name is not None:
            read[entry.name] = known.contents(name)
            if read[entry.name] is None:
                commits[entry.name] = known.revision(name, "model", offline=config.offline)
    for part, (data, most) in config.data_sets().items():
        if (there := hub_source(data.source)) is not None:
            read[part] = None if there[1] is None else asdict(replace(there[1], folder=Path()))
            commits[part] = known.revision(there[0], "dataset", offline=config.offline)
        elif is_url(data.source):
            places = (divide(data.source, data.split)[0], data.texts, data.labels)
            read[part] = [known.contents(place) for place in places if place is not None]
        else:
            read[part] = known.samples(data, most, config.seed, offline=config.offline)
    local = _sha256({"vitshrink": __version__, "recipe": _recipe(config), "read": read})
    return local + (APART + _sha256(commits)[:16] if commits and None not in commits.values() else "")


def _recipe(config: CompressConfig) -> dict[str, Any]:
    return plain_values(config, lambda option: option.changes != "nothing")


def _samples(data: DataConfig, most: int | None, seed: int, *, offline: bool) -> Mapping[str, str]:
    """What the samples are that a job may choose, opened as it opens them, as images or texts or both.

    Which kind the model reads need not be known. Raises what stands against the last kind where none can be opened.
    """
    apart = ("source", "texts", "texts_flag", "templates")
    options = {entry.name: getattr(data, entry.name) for entry in fields(data) if entry.name not in apart}
    found: dict[str, str] = {}
    problem: VitshrinkError | None = None
    if data.texts is not None:
        found["texts"] = open_samples(data.texts, "text", offline=offline).at_most(most, seed).identity()
    for kind in ("image", "text"):
        try:
            samples = open_samples(data.source, kind, offline=offline, **options)
        except VitshrinkError as error:
            problem = error
        else:
            found[kind] = samples.at_most(most, seed).identity()
    if problem is not None and not found:
        raise problem
    if data.texts is not None:  # beside the images, for a dual encoder
        found["texts"] = open_samples(data.texts, "text", offline=offline).identity()
    return found


def _contents(name: str) -> str | None:
    """Digest of the contents of what lies at or below a path; None where there is nothing of that name."""
    if is_url(name):
        return _sha256(Place.of(name).identity())
    path = Path(name).expanduser()
    if not os.path.exists(path):  # which takes a name that can be none, where Path.exists() does not
        return None
    return _sha256({name: digest(file) for name, file in sorted(_walk(path))})


def _walk(path: Path) -> Iterator[tuple[str, Path]]:
    """Files by their names below ``path``, through links, without hidden ones."""
    if path.is_file():
        yield "", path
        return
    for folder, entries in walk(path, lambda name: not name.startswith(".")):
        yield from ((os.path.relpath(entry, path), folder / entry.name) for entry in entries if entry.name[0] != ".")


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
