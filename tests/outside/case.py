"""A case: a model, a command and some oddities; drawn by a number, or read from its text."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import tiny

from . import (  # noqa: F401 - they enter their oddities
    checkpoint_configs,
    checkpoint_files,
    checkpoint_tensors,
    image_files,
    image_folders,
    paths,
    surroundings,
    table_forms,
    table_labels,
    table_rows,
)
from .checkpoint import Checkpoint
from .commands import COMMANDS
from .images import Images
from .oddity import ODDITIES, Oddity
from .place import Place
from .table import Table


@dataclass(frozen=True)
class Case:
    architecture: str
    command: str
    oddities: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.architecture, self.command, *self.oddities))

    @classmethod
    def parse(cls, text: str) -> "Case":
        """From ``ARCHITECTURE COMMAND ODDITY …``, or the number of a drawn one. Raises ValueError."""
        if text.isdecimal():
            return draw(int(text))
        architecture, command, *oddities = text.split()
        for name, known in ((architecture, tiny.PLAIN), (command, COMMANDS)):
            if name not in known:
                raise ValueError(f"{name!r} is none of {', '.join(known)}")
        unknown = [name for name in oddities if name not in ODDITIES]
        if unknown:
            raise ValueError(f"no oddity is called {unknown[0]!r}")
        return cls(architecture, command, tuple(oddities))

    def changes(self, part: type) -> list[Oddity]:
        return [ODDITIES[name] for name in self.oddities if ODDITIES[name].part is part]

    @property
    def startup(self) -> tuple[tuple[str, str], ...]:
        """What the interpreter of this case has to be started with."""
        place = Place(Path())
        for change in self.changes(Place):
            change.change(place)
        return tuple(sorted(place.startup.items()))

    @property
    def must(self) -> str:
        """``works``, ``refused`` or ``either``."""
        outcomes = {COMMANDS[self.command].outcome, *(ODDITIES[name].outcome for name in self.oddities)}
        if "refused" in outcomes:
            return "refused"
        return "works" if outcomes == {"works"} else "either"

    def without(self, name: str) -> "Case":
        return replace(self, oddities=tuple(other for other in self.oddities if other != name))


def fits(oddity: Oddity, architecture: str, command: str) -> bool:
    """Whether a job can have an oddity."""
    if oddity.part is Checkpoint and command == "methods":
        return False
    if oddity.part in (Table, Images):
        reads = Table if architecture in tiny.TEXT_MODELS else Images
        if oddity.part is not reads or not COMMANDS[command].reads:
            return False
    return oddity.suits(architecture, command)


def draw(number: int) -> Case:
    """The case of a number: one to four oddities at random.

    A new command or oddity changes the cases that it comes into, and no others.
    """
    architecture = _shuffled(tiny.PLAIN, number)[0]
    command = _shuffled([name for name, each in COMMANDS.items() if each.suits(architecture)], number)[0]
    count = Random(number).choice((1, 2, 2, 2, 3, 4))
    chosen: dict[str, str] = {}
    for name in _shuffled([name for name, each in ODDITIES.items() if fits(each, architecture, command)], number):
        if len(chosen) < count:
            chosen.setdefault(ODDITIES[name].slot, name)
    return Case(architecture, command, tuple(chosen.values()))


def _shuffled(names: Iterable[str], number: int) -> list[str]:
    """In an order by chance, in which the places of two do not depend on the others."""
    return sorted(names, key=lambda name: Random(f"{number} {name}").random())


def plain() -> list[Case]:
    """Every command with every model, and nothing odd."""
    return [
        Case(architecture, name)
        for name, command in COMMANDS.items()
        for architecture in tiny.PLAIN
        if command.suits(architecture)
    ]


def singles(seed: int = 0) -> list[Case]:
    """Every oddity alone: with a compression, an evaluation and another command, of models that it suits."""
    chance = Random(seed)
    cases = []
    for oddity in ODDITIES.values():
        pairs = [
            (architecture, name)
            for name, command in COMMANDS.items()
            for architecture in tiny.PLAIN
            if command.suits(architecture) and fits(oddity, architecture, name)
        ]
        for kind in ("compress", "eval", ""):
            found = [pair for pair in pairs if pair[1].startswith(kind)]
            if found:
                cases.append(Case(*chance.choice(found), (oddity.name,)))
    return list(dict.fromkeys(cases))
