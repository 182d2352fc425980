"""A sweep as it is written down: axes, exceptions and bounds, and the jobs that follow from them."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any

from vitshrink.compression.choices import Choices
from vitshrink.config.fields import entries_of
from vitshrink.config.options import (
    FIDELITIES,
    CompressConfig,
    flag_of,
    parse_duration,
    read_recipe,
    renamed,
    warn_of_old_name,
)
from vitshrink.config.written import plain
from vitshrink.data import recipe_defaults
from vitshrink.errors import DataError, UsageError
from vitshrink.evaluation.gates import Gates
from vitshrink.jobs.sweep.resources import Resources
from vitshrink.jobs.sweep.shards import Shard
from vitshrink.runtime.storage import Place, below, is_url, scratch

MOST_JOBS = 1000

KEYS = ("output", "matrix", "include", "exclude", "defaults", "gates", "resources", "time_limit")

CACHE = "cache"
"""Below the output: what all jobs share."""
OWN = ("output", "overwrite", "dry_run")
"""Entries of a job that the sweep sets itself."""


@dataclass(frozen=True)
class JobPlan:
    """One job: its name, which is that of its directory, its value on every axis, its config and its bounds."""

    name: str
    labels: Mapping[str, str]
    config: CompressConfig
    gates: Gates
    resources: Resources = field(default_factory=Resources)


@dataclass(frozen=True)
class SweepPlan:
    """All jobs of a sweep, in the order of the matrix."""

    output: Path
    """Where the results are put together: the output itself, or a directory of this process where that is a URL."""
    jobs: Sequence[JobPlan]
    time_limit: float | None = None
    """Seconds that each job may take."""
    shard: Shard | None = None
    """Which part of the jobs these are; None for all."""
    store: Place | None = None
    """The output where that is a URL: what is in ``output`` is copied there."""

    @property
    def shown(self) -> str:
        """The output as a user knows it."""
        return str(self.store or self.output)

    @property
    def results(self) -> Path:
        """Where the results of all these jobs are written."""
        shard = self.shard
        return self.output if shard is None else self.output / f"shard-{shard.number}-of-{shard.count}"

    def part(self, shard: Shard | None) -> "SweepPlan":
        """The jobs of one shard; None is all of them."""
        return self if shard is None else replace(self, jobs=shard.of(self.jobs), shard=shard)


@dataclass
class Combination:
    """A value for every axis; ``entries`` are those of the job that they stand for."""

    labels: dict[str, str]
    entries: dict[str, Any]
    own: frozenset[str] = field(default_factory=frozenset)
    """Entries that come from the axes, which ``include`` may add to but not change."""


def read_sweep(
    path: Path,
    *,
    output: str | Path | None = None,
    gates: Mapping[str, Any] | None = None,
    time_limit: str | None = None,
    warn: Callable[[str], None] = warn_of_old_name,
) -> SweepPlan:
    """Read a sweep from YAML; what is given beside it goes before what the file says.

    ``matrix`` holds the axes. A value is that of the entry of a recipe with the axis's name, or several entries at
    once: ``{name: pets, calibration: pets/train, eval: pets/val}``. ``exclude`` lists combinations to leave out,
    ``include`` entries to add to the combinations that they fit, or else jobs of their own: as in the matrices of
    continuous integration. ``defaults`` are entries of every job, ``gates`` bounds on every result, ``resources`` what
    every job needs of a machine.

    Raises:
        UsageError: anything that makes no sense, before any job is run.
    """
    entries = read_recipe(path)
    unknown = [key for key in entries if key not in KEYS]
    if unknown:
        raise UsageError(f"{path}: unknown entry {unknown[0]!r}. Available: {', '.join(KEYS)}.")
    target = output or entries.get("output")
    if not isinstance(target, str | Path) or not str(target).strip():
        raise UsageError(f"{path}: the output directory is missing: write 'output: results', or pass --output.")
    defaults = _mapping(entries.get("defaults"), f"{path}: defaults")
    common = {
        "gates": {**_mapping(entries.get("gates"), f"{path}: gates"), **(gates or {})},
        "resources": _mapping(entries.get("resources"), f"{path}: resources"),
    }
    combinations = _combinations(entries, path)
    once = cache(warn)
    jobs = [_job(combination, defaults, common, str(target), path, once) for combination in combinations]
    names = [job.name for job in jobs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(
            f"{path}: two jobs have the name {twice!r}: write one of their values as entries with a name, such "
            f"as model: [{{name: first, model: a/vit}}, {{name: second, model: b/vit}}]."
        )
    limit = time_limit if time_limit is not None else entries.get("time_limit")
    seconds = None if limit is None else parse_duration(str(limit), f"{path}: time_limit")
    if is_url(target):
        return SweepPlan(scratch("sweep"), jobs, seconds, store=Place.of(str(target)))
    return SweepPlan(Path(target), jobs, seconds)


def _combinations(entries: Mapping[str, Any], path: Path) -> list[Combination]:
    axes = _mapping(entries.get("matrix"), f"{path}: matrix")
    values = [_axis(str(name), listed, path) for name, listed in axes.items()]
    number = math.prod(map(len, values)) if values else 0
    _require_few(number, path)
    combinations = [_combine(chosen, path) for chosen in itertools.product(*values)] if values else []
    for excluded in _mappings(entries.get("exclude"), f"{path}: exclude"):
        _require_known(excluded, combinations, f"{path}: exclude")
        combinations = [each for each in combinations if not _matches(each, excluded)]
    original, alone = list(combinations), []
    for included in _mappings(entries.get("include"), f"{path}: include"):
        fitting = [each for each in original if _accepts(each, included)]
        for combination in fitting:
            combination.entries |= _entries_of(included, combination.labels)
        if not fitting:
            alone.append(_value("job", included, path))
    _require_few(len(combinations) + len(alone), path)
    if not combinations and not alone:
        raise UsageError(f"{path}: there is no job: list values under 'matrix', or jobs under 'include'.")
    return [*combinations, *alone]


def _require_few(number: int, path: Path) -> None:
    if number > MOST_JOBS:
        raise UsageError(f"{path}: {number:,} jobs; a sweep can have at most {MOST_JOBS:,}.")


def _axis(name: str, listed: Any, path: Path) -> list[Combination]:
    values = listed if isinstance(listed, list) else [listed]
    if not values:
        raise UsageError(f"{path}: matrix: {name} has no value.")
    return [_value(name, value, path) for value in values]


def _value(axis: str, value: Any, path: Path) -> Combination:
    axis = axis.replace("-", "_")
    if not isinstance(value, Mapping):
        for kind in (NoneType, list):
            if isinstance(value, kind) and not _takes(axis, kind):
                raise UsageError(f"{path}: matrix: {axis}: {value!r} is not a value; write a name or a number.")
        return Combination({axis: _label(axis, value)}, {axis: value}, frozenset({axis}))
    entries = _plain({key: entry for key, entry in value.items() if key != "name"})
    if axis not in entries and _takes(axis, dict):
        entries = {axis: entries}
    if "name" in value:
        label = str(value["name"])
    elif axis in entries:
        label = _label(axis, entries[axis])
    else:
        label = "-".join(_label(key, entry) for key, entry in entries.items() if not isinstance(entry, Mapping | list))
    return Combination({axis: label}, entries, frozenset(entries))


def _takes(axis: str, kind: type) -> bool:
    """Whether the axis is an entry of a job that may be None (``NoneType``), a ``list``, or a ``dict`` of entries."""
    return any(entry.name == axis and entry.takes(kind) for entry in entries_of(CompressConfig))


def _label(key: str, value: Any) -> str:
    if value is None:
        return f"{key}-none"
    if isinstance(value, list):
        return "-".join([key, *map(str, value)])
    if isinstance(value, Mapping):
        return "-".join([key, *(f"{name}-{entry}" for name, entry in value.items())])
    value = plain(value)
    text = str(value).rstrip("/").rpartition("/")[2] if isinstance(value, str) else f"{value}"
    return text if isinstance(value, str) else f"{key}-{text}"


def _combine(chosen: Sequence[Combination], path: Path) -> Combination:
    labels: dict[str, str] = {}
    entries: dict[str, Any] = {}
    for value in chosen:
        both = entries.keys() & value.entries.keys()
        if both:
            raise UsageError(f"{path}: matrix: two axes set {min(both)!r}.")
        labels |= value.labels
        entries |= value.entries
    return Combination(labels, entries, frozenset(entries))


def _matches(combination: Combination, wanted: Mapping[str, Any]) -> bool:
    """Whether a combination has all these values, of axes by name, or of entries."""
    return all(
        combination.labels.get(key) == str(value) or (key in combination.entries and combination.entries[key] == value)
        for key, value in _plain(wanted).items()
    )


def _accepts(combination: Combination, included: Mapping[str, Any]) -> bool:
    """Whether an entry of ``include`` changes no value of an axis, and so belongs to the combination too."""
    plain = _plain({key: value for key, value in included.items() if key != "name"})
    axes = {key: value for key, value in plain.items() if key in combination.labels or key in combination.own}
    return "name" not in included and _matches(combination, axes)


def _entries_of(included: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    return {key: value for key, value in _plain(included).items() if key not in labels}


def _plain(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key).replace("-", "_"): value for key, value in entries.items()}


def _require_known(wanted: Mapping[str, Any], combinations: Sequence[Combination], where: str) -> None:
    """A misspelled exception would silently leave nothing out."""
    known = sorted({key for each in combinations for key in (*each.labels, *each.entries)})
    for key in _plain(wanted):
        if combinations and key not in known:
            raise UsageError(f"{where}: {key!r} is not an axis of the matrix. Axes: {', '.join(known)}.")
    if combinations and not any(_matches(each, wanted) for each in combinations):
        raise UsageError(f"{where}: no combination matches {dict(wanted)!r}: check the values.")


def _job(
    combination: Combination,
    defaults: Mapping[str, Any],
    common: Mapping[str, Mapping[str, Any]],
    output: str,
    path: Path,
    warn: Callable[[str], None],
) -> JobPlan:
    name = re.sub(r"[^\w.=+-]+", "_", "-".join(filter(None, combination.labels.values()))).strip("._-") or "job"
    where = f"{path}: job {name}"
    if len(name.encode()) > 200:
        raise UsageError(f"{where}: the name is too long for a directory: write values as entries with a 'name'.")
    entries = renamed(_plain(defaults) | combination.entries, str(path), warn)
    own = {name: {**common[name], **_mapping(entries.pop(name, None), f"{where}: {name}")} for name in common}
    for key in OWN:
        if key in entries:
            raise UsageError(f"{where}: the sweep sets {key!r} itself: remove it.")
    own_entries = {"output": below(output, name, "model"), "overwrite": True}
    config = CompressConfig.from_mapping(
        {"cache": below(output, CACHE), **_defaults_of_data(entries), **entries, **own_entries}, where
    )
    if len(config.keep) > 1:
        raise UsageError(f"{where}: write several sizes as an axis, as in 'matrix: {{keep: [0.7, 0.5]}}'.")
    _require_sense(config, where)
    gates = Gates.from_mapping(own["gates"], f"{where}: gates")
    _require_figures(gates, config, where)
    return JobPlan(
        name, combination.labels, config, gates, Resources.from_mapping(own["resources"], f"{where}: resources")
    )


def _defaults_of_data(entries: Mapping[str, Any]) -> dict[str, int]:
    """Those of a data recipe; one that cannot be read is a matter of its job alone, which says so."""
    with suppress(DataError):
        return recipe_defaults(entries.get("calibration"))
    return {}


def _require_sense(config: CompressConfig, where: str) -> None:
    """What a job would refuse at its start is refused before any job; whatever else is wrong, the job itself says."""
    try:
        Choices.of(config)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    except Exception:
        return


def _require_figures(gates: Gates, config: CompressConfig, where: str) -> None:
    """Raises UsageError for a bound that nothing will be measured for; before any job is run."""
    for name in ("min_accuracy", "max_drop"):
        if getattr(gates, name) is not None and config.eval is None:
            raise UsageError(f"{where}: {flag_of(name)} needs labeled samples: set 'eval'.")
    for name in FIDELITIES:
        unmeasured = config.eval is None and (config.calibration is None or config.holdout == 0)
        if getattr(gates, name) is not None and unmeasured:
            raise UsageError(f"{where}: {flag_of(name)} needs samples: set 'eval', or 'calibration' with a 'holdout'.")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{where} must hold entries such as 'method: whitened', not {value!r}.")
    return value


def _mappings(value: Any, where: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, dict) and each for each in value):
        raise UsageError(f"{where} must list entries such as '- {{method: svd, keep: 0.5}}'.")
    return value
