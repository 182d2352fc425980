"""Entities in the tags of words, counted as the script of CoNLL-2000 counts them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_PREFIXES = tuple("BIESLU")

Entity = tuple[int, int, str]
"""First word, the one after the last, and the kind."""


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities of a text, by the tags of its words: ``B-PER``, ``I-PER``, ``O``, and ``E-`` and ``S-`` of IOBES.

    As in the script of CoNLL, an ``I-`` that follows no entity of its kind begins one.
    """
    found: set[Entity] = set()
    start, kind, ended = 0, "", True
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, named = tag.partition("-")
        inside = prefix != "O" and bool(named)
        if kind and (not inside or named != kind or prefix in "BSU" or ended):
            found.add((start, index, kind))
            kind = ""
        if inside and not kind:
            start, kind = index, named
        ended = prefix in ("E", "L", "S", "U")
    return found


def kinds_of(names: Mapping[int, str]) -> list[str]:
    """The kinds of entities that a model tells apart; none where its tags are no entities."""
    kinds = {name[2:] for name in names.values() if name[0:1] in _PREFIXES and name[1:2] == "-" and len(name) > 2}
    return sorted(kinds) if "O" in names.values() else []


def counted(found: Sequence[set[Entity]], kinds: Sequence[str]) -> Tensor:
    """How many entities of each kind every text has, (texts, kinds)."""
    index = {kind: column for column, kind in enumerate(kinds)}
    counts = torch.zeros(len(found), len(kinds), dtype=torch.long)
    for row, each in enumerate(found):
        for entity in each:
            counts[row, index[entity[2]]] += 1
    return counts
