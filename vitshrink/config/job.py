"""A job: groups of options together, built from flags or YAML, and written as either."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from vitshrink.config.fields import Entry, Options, entries_of, plain_values
from vitshrink.config.names import quoted
from vitshrink.config.reading import values_of, written_option
from vitshrink.config.written import write_yaml
from vitshrink.errors import UsageError

OWN = ("calibration", "calibration_texts", "eval", "eval_texts", "eval_labels", "data", "workers", "device")
"""Entries that each of several machines may have for itself: where it finds samples, and what it has to work with."""


@dataclass(frozen=True)
class JobOptions(Options):
    """Everything that one command needs to know; the field names are the flags and the keys of a recipe."""

    command_name: ClassVar[str]
    what: ClassVar[Mapping[str, str]] = {}
    """What the entries are that a job cannot do without."""
    example: ClassVar[str] = ""
    old_names: ClassVar[Mapping[str, str]] = {}
    """Present names of entries by the old ones."""

    @classmethod
    def from_mapping(cls, entries: Mapping[str, Any], where: str = "the recipe") -> Self:
        """Build from flags or YAML keys. Raises UsageError that names the entry, and the nearest one."""
        values = values_of(cls, _nested(cls, entries), where)
        for needed, what in cls.what.items():
            if not values.get(needed):
                raise UsageError(f"{where}: {needed!r}, {what}, is missing, as in `{cls.example}`.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every entry as plain data, so that a later version with other defaults does the same."""
        return plain_values(self)

    def common(self) -> dict[str, Any]:
        """The values that all processes of a job have to be told alike."""
        found = plain_values(self, lambda each: not (each.reads or each.writes or each.changes == "nothing"))
        return {
            name: {k: v for k, v in value.items() if k not in OWN} if isinstance(value, dict) else value
            for name, value in found.items()
            if name not in OWN
        }

    def shared_with(self, other: type["JobOptions"]) -> dict[str, Any]:
        """The values of what another job is told as well."""
        own = {entry.name for entry in entries_of(type(self))}
        return {entry.name: getattr(self, entry.name) for entry in entries_of(other) if entry.name in own}

    def to_yaml(self) -> str:
        """The recipe: what ``--config`` reads."""
        return write_yaml(self.to_dict())

    def command(self) -> str:
        """The command line that does the same: what differs from the defaults, as flags."""
        entries = entries_of(type(self))
        paths = (str(getattr(self, entry.name)) for entry in entries if entry.option.positional)
        words = ["vitshrink", self.command_name, *map(_positional, paths)]
        for entry in entries:
            value = getattr(self, entry.name)
            usual = value in (entry.default, (), {}) and not self.always_said(entry)
            if not (entry.option.positional or usual):
                words += _words(entry, value)
        return " ".join(map(quoted, words))

    def always_said(self, _entry: Entry) -> bool:
        """Whether a value belongs on the command line though it is the default."""
        return False


def _nested(cls: type[Options], entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries, those of an inlined group, which may stand beside the others, in the group."""
    found = dict(entries)
    for entry in entries_of(cls):
        if entry.group is None or not entry.option.inlined:
            continue
        found = {str(key).replace("-", "_"): value for key, value in found.items()}
        inner = [each.name for each in entries_of(entry.group)]
        given = found.get(entry.name) or {}
        given = dict(given) if isinstance(given, Mapping) else {inner[0]: given}
        own = {each.name for each in entries_of(cls)}
        found[entry.name] = given | {name: found.pop(name) for name in inner if name in found and name not in own}
    return found


def _positional(path: str) -> str:
    """A path that is not taken for a flag."""
    return f"./{path}" if path.startswith("-") else path


def _words(entry: Entry, value: Any) -> Iterator[str]:
    """The flag of an entry and its value, as often as there are values."""
    if isinstance(value, Options):
        yield from _inner_words(entry, value)
    elif isinstance(value, bool):
        yield entry.flag if value else f"--no-{entry.flag[2:]}"
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from (entry.flag, f"{key}={written_option(each)}")
    else:
        for each in value if isinstance(value, tuple) else (value,):
            yield from (entry.flag, str(each))


def _inner_words(entry: Entry, value: Options) -> Iterator[str]:
    first, *others = entries_of(type(value))
    if entry.option.inlined:
        others = [first, *others]
    else:
        yield from (entry.flag, str(getattr(value, first.name)))
    for each in others:
        setting = getattr(value, each.name)
        if setting == each.default:
            continue
        if entry.option.inlined:
            yield from _words(each, setting)
        else:
            yield from (f"{entry.flag}-option", f"{each.name}={written_option(setting)}")
