"""What is unusual about a job: named functions, found by the part of a job that they change."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Outcome = Literal["works", "refused", "either"]
"""What has to come of a job with it: a result, an error that is meant, or one of both."""

Change = TypeVar("Change", bound=Callable[[Any], None])


@dataclass(frozen=True)
class Oddity:
    name: str
    part: type
    """What it changes: a ``Checkpoint``, ``Table``, ``Images`` or ``Place``."""
    change: Callable[[Any], None]
    slot: str
    """Of a slot a job has at most one: a file has one encoding."""
    outcome: Outcome
    only: tuple[str, ...]
    """Parts of the names of the architectures that it is for; empty for all."""
    commands: tuple[str, ...]
    """Beginnings of the names of the commands that it is for; empty for all."""

    def suits(self, architecture: str, command: str) -> bool:
        return (not self.only or any(part in architecture for part in self.only)) and (
            not self.commands or command.startswith(self.commands)
        )


ODDITIES: dict[str, Oddity] = {}
"""All of them by name, in the order of their files."""


def oddity(
    part: type,
    *,
    slot: str = "",
    outcome: Outcome = "either",
    only: tuple[str, ...] = (),
    commands: tuple[str, ...] = (),
) -> Callable[[Change], Change]:
    """Enter a function under its name."""

    def enter(change: Change) -> Change:
        name = change.__name__.strip("_").replace("_", "-")
        if name in ODDITIES:
            raise ValueError(f"two oddities are called {name}")
        ODDITIES[name] = Oddity(name, part, change, slot or name, outcome, only, commands)
        return change

    return enter
