"""What a data generator has made, as far as the command line and the judgment need it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Data:
    path: Path
    flags: list[str]
    """Flags that name the columns, as ``eval`` has them."""
    good: int
    bad: int
    labeled: bool
    """Whether there are labels."""
    right: bool
    """Whether the labels are what the model answers, so that its accuracy is 1."""
    counted: bool
    """Whether the numbers are known: where they are, a report has to say the same."""
