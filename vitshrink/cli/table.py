"""A table for the terminal, whatever it holds."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Table:
    """Rows of text under headings; how they are laid out depends on where they are shown."""

    headings: Sequence[str]
    caption: str | None = None
    left: int = 1
    """So many columns hold text and start at the left; the others hold figures and end at the right."""
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        self.rows.append(cells)
