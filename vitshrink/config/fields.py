"""A field of a group of options, and all that is derived from it: its flag, its bounds, what its value changes."""

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, get_args, get_origin

from vitshrink.config.names import is_portable, unportable
from vitshrink.errors import UsageError

SIZE, METHOD, DATA, TOKENS = "Size", "Layers and method", "Data", "Images and tokens"
RECOVERY, TRAINING, TECHNIQUES, RUN = "Recovery", "Training", "Techniques", "Run"
GATES = "Gates"

Changes = Literal["models", "report", "nothing"]
"""How far the value of a field reaches: into the compressed models, into what is said of them, or nowhere."""

_OPTION = "option"


@dataclass(frozen=True)
class Option:
    """What is known of a field beside its name, type and default."""

    help: str = ""
    panel: str | None = None
    flags: tuple[str, ...] = ()
    """Its flags, where they are not ``--`` and the name."""
    positional: bool = False
    hidden: bool = False
    changes: Changes = "models"
    reads: bool = False
    """Whether it names files, or a model on the Hub, which are read. Data sets are known by ``data_sets``."""
    writes: bool = False
    """Whether it names a directory that is written."""
    in_memory: bool = True
    """Whether it means something where ``vitshrink.compress`` takes and gives objects."""
    choices: tuple[Any, ...] = ()
    suggested: tuple[str, ...] = ()
    """Values to show and complete, where others know better what is wrong with another one."""
    why: str = "unknown."
    """What to say of a value that is no choice."""
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    wanted: str | None = None
    """What to say of a value out of these bounds."""
    inlined: bool = False
    """Whether the fields of this nested group are flags of the command itself."""

    def allows(self, number: float) -> bool:
        """Whether a number is finite and within the bounds."""
        return (
            (isinstance(number, int) or math.isfinite(number))
            and (self.low is None or number >= self.low)
            and (self.above is None or number > self.above)
            and (self.high is None or number <= self.high)
            and (self.below is None or number < self.below)
        )

    @property
    def bounds(self) -> str:
        """What a number has to be, as a sentence says it."""
        if self.wanted is not None:
            return self.wanted
        if (self.low, self.high) == (0, 1):
            return "is a share: give a number from 0 to 1."
        if self.above is not None:
            return f"must be above {self.above}."
        if self.low is None:
            return "give a number."
        return "must not be negative." if self.low == 0 else f"must be at least {self.low}."


def option(default: Any, help: str = "", **known: Any) -> Any:  # noqa: A002
    """A field with a default and what an ``Option`` says of it."""
    return field(default=default, metadata={_OPTION: Option(help, **known)})


def required(help: str = "", **known: Any) -> Any:  # noqa: A002
    """A field without a default."""
    return field(metadata={_OPTION: Option(help, **known)})


def entries(help: str = "", **known: Any) -> Any:  # noqa: A002
    """A field that holds names and values, by default none."""
    return field(default_factory=dict, metadata={_OPTION: Option(help, **known)})


@dataclass(frozen=True)
class Entry:
    """One field as the rest of the program sees it."""

    name: str
    kind: Any
    default: Any
    """``MISSING`` where there is none."""
    option: Option

    @classmethod
    def of(cls, found: Field[Any], reworded: Mapping[str, Mapping[str, Any]]) -> "Entry":
        known = replace(found.metadata.get(_OPTION, Option()), **reworded.get(found.name, {}))
        choices = next((get_args(each) for each in _alternatives(found.type) if get_origin(each) is Literal), ())
        default = found.default if found.default_factory is MISSING else found.default_factory()
        return cls(found.name, found.type, default, replace(known, choices=known.choices or choices))

    @property
    def flag(self) -> str:
        return next((flag for flag in self.option.flags if flag.startswith("--")), flag_of(self.name))

    @property
    def alternatives(self) -> tuple[Any, ...]:
        """The types that a value may have: more than one in a union."""
        return _alternatives(self.kind)

    @property
    def group(self) -> "type[Options] | None":
        """The nested group of options that the field holds, where it holds one."""
        return next((each for each in self.alternatives if isinstance(each, type) and issubclass(each, Options)), None)

    def takes(self, kind: type) -> bool:
        """Whether a value may be None (``NoneType``), a ``list``, or a ``dict`` of entries of its own."""
        if kind is dict:
            return self.group is not None or any(get_origin(each) is Mapping for each in self.alternatives)
        if kind is list:
            return any(get_origin(each) is tuple for each in self.alternatives)
        return kind in self.alternatives


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is UnionType else (kind,)


def flag_of(name: str) -> str:
    """The flag of an entry: ``--target-params`` for ``target_params``."""
    return "--" + name.replace("_", "-")


def did_you_mean(name: object, available: Iterable[Any]) -> str:
    """``Did you mean …? Available: …``, for an error about a wrong name."""
    names = list(map(str, available))
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    return (f"Did you mean {near[0]!r}? " if near else "") + f"Available: {', '.join(names)}."


@dataclass(frozen=True)
class Options:
    """A group of options: frozen, and checked where it is built.

    A job inherits its groups, so that all its options are its attributes, and a function may ask for one group. Bounds
    and choices are checked field by field; what fields mean together, each group says in a method ``check``.
    """

    reworded: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """What this job says otherwise of fields that it inherits: help, panel."""

    def __post_init__(self) -> None:
        checks: list[Callable[[Any], None]] = [
            vars(group)["check"] for group in reversed(type(self).__mro__) if "check" in vars(group)
        ]
        for entry in entries_of(type(self)):
            self.check_value(entry)
        for check in checks:
            check(self)

    def given(self, names: Collection[str]) -> list[str]:
        """The flags of those of these fields that have another value than their default."""
        return [
            entry.flag
            for entry in entries_of(type(self))
            if entry.name in names and getattr(self, entry.name) != entry.default
        ]

    def check_value(self, entry: Entry) -> None:
        """Raises UsageError for a value that is no choice or out of bounds."""
        value, known = getattr(self, entry.name), entry.option
        for each in value if isinstance(value, tuple) else (value,):
            if each is None:
                continue
            if known.choices and each not in known.choices:
                raise UsageError(f"{self.naming(entry, each)} {_no_choice(each, known)}")
            if isinstance(each, int | float) and not isinstance(each, bool) and not known.allows(each):
                raise UsageError(f"{self.naming(entry, each)} {known.bounds}")
            if known.writes and not is_portable(Path(each)):
                raise UsageError(f"{entry.flag}: {unportable(Path(each))}")

    def naming(self, entry: Entry, value: Any) -> str:
        """How an error about a value begins."""
        return f"{entry.flag} {value}:"


def _no_choice(value: Any, known: Option) -> str:
    if all(isinstance(each, str) for each in known.choices):
        return f"{known.why} {did_you_mean(value, known.choices)}"
    return f"choose one of {', '.join(map(str, known.choices))}."


_ENTRIES: dict[type, tuple[Entry, ...]] = {}


def entries_of(cls: type[Options]) -> tuple[Entry, ...]:
    """The fields of a group or a job, in their order: the groups that a class inherits count from the last one on."""
    if cls not in _ENTRIES:
        _ENTRIES[cls] = tuple(Entry.of(found, cls.reworded) for found in fields(cls))
    return _ENTRIES[cls]


def names_of(cls: type[Options], wanted: Callable[[Option], bool]) -> tuple[str, ...]:
    """The names of the fields for which something is true."""
    return tuple(entry.name for entry in entries_of(cls) if wanted(entry.option))


def plain_values(options: Options, wanted: Callable[[Option], bool] = lambda _: True) -> dict[str, Any]:
    """The values by name as plain data, those of nested groups too, where something is true of the field."""
    return {
        entry.name: _plain(getattr(options, entry.name), wanted)
        for entry in entries_of(type(options))
        if wanted(entry.option)
    }


def _plain(value: Any, wanted: Callable[[Option], bool]) -> Any:
    if isinstance(value, Options):
        return plain_values(value, wanted)
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
