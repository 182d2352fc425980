"""Integers out of the streams that ``entropy_coding`` writes, of many streams at a time.

A step costs a few microseconds however few lanes it has, and small matrices have few: those of all streams go on side
by side. A decoder is a generator that asks for the next symbols of its stream, and is told them.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from vitshrink.errors import CheckpointError
from vitshrink.models.entropy_coding import LOWEST, Numbers, in_lanes, wider
from vitshrink.models.normal_tables import CLASSES, ESCAPE, GRID, PRECISION, TABLES, TOTAL, shifts, tables

_SHORT = 16
"""Steps of what is read before the rest, so that the long ones meet."""

_BLOCK = 1 << 16
"""Integers that are decoded in one go: so many that what is known of them stays in a cache."""


@dataclass(eq=False)
class Source:
    """Bytes that are taken one part after the other. Raises CheckpointError where they end too early."""

    data: bytes
    position: int = 0

    def take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise CheckpointError("the integers of this checkpoint are damaged: the data are too short.")
        return self.data[start : self.position]


Symbols = NDArray[np.int8]

Found = TypeVar("Found")


@dataclass(frozen=True, eq=False)
class Wanted:
    """The next symbols of a stream, of these classes with a table (count,), uint8."""

    reader: "Reader"
    classes: NDArray[np.uint8]

    @property
    def steps(self) -> int:
        return -(-len(self.classes) // self.reader.lanes)


Decoder = Generator[Wanted, Symbols, Found]
"""Asks for symbols, until it has what it is to return; many are served at once, see ``decoded``."""


class Reader:
    """The integers of a stream, call by call as they were put. Raises CheckpointError where it is damaged."""

    def __init__(self, source: Source, lanes: int) -> None:
        count = int.from_bytes(source.take(4), "little")
        self.lanes = lanes
        self.states = _restored(source, lanes)
        stream = source.take(count)
        if count % 2:
            raise CheckpointError("the integers of this checkpoint are damaged: the data end inside a word.")
        self.words = np.frombuffer(stream, "<u2")
        self.position = 0
        self._bits = source

    def take(self, classes: NDArray[np.uint8]) -> Decoder[NDArray[np.signedinteger[Any]]]:
        """The next integers, (count,), of these classes; of 8 bits where they fit."""
        shift = shifts(classes) if classes.max(initial=0) >= TABLES else None
        symbols = yield Wanted(self, classes if shift is None else classes - GRID * shift)
        escaped = (symbols == ESCAPE).nonzero()[0]
        values: NDArray[np.signedinteger[Any]] = symbols
        if shift is not None:
            values = symbols.astype(np.int32)
            shift[escaped] = 0
            (wide,) = shift.nonzero()
            kept = shift[wide].astype(np.int64)
            values[wide] = (values[wide] << kept) + unpacked(self._bits, kept) - (1 << kept >> 1)
        if len(escaped):
            if classes[escaped].max() >= CLASSES - 1:
                raise CheckpointError("the integers of this checkpoint are damaged: one of them has more than 16 bits.")
            others = yield from self.take(wider(classes[escaped]))
            values = values.astype(np.result_type(values, others), copy=False)
            values[escaped] = others
        return values

    def load(self) -> NDArray[np.uint16]:
        """What the lanes were loaded with, (lanes,), after all integers were taken."""
        if self.position != len(self.words) or (self.states >= 2 * LOWEST).any():
            raise CheckpointError("the integers of this checkpoint are damaged: the data do not end with the matrix.")
        return (self.states - np.uint32(LOWEST)).astype(np.uint16)


def decoded(decoders: Sequence[Decoder[Found]]) -> list[Found | CheckpointError]:
    """What decoders find, or why they find nothing: all go on side by side, as the lanes of one do."""
    found: list[Any] = [None] * len(decoders)
    waiting: dict[int, Wanted] = {}

    def go_on(number: int, symbols: Symbols | None) -> None:
        try:
            waiting[number] = decoders[number].send(symbols)  # type: ignore[arg-type] # None starts it
        except StopIteration as end:
            found[number] = end.value
        except CheckpointError as error:
            found[number] = error

    for number in range(len(decoders)):
        go_on(number, None)
    while waiting:
        short = {number: each for number, each in waiting.items() if each.steps <= _SHORT}
        wanted = short or dict(waiting)
        for number in wanted:
            del waiting[number]
        for number, symbols in zip(wanted, _read(list(wanted.values())), strict=True):
            reader = wanted[number].reader
            if reader.position > len(reader.words):
                found[number] = CheckpointError("the integers of this checkpoint are damaged: the data are too short.")
            else:
                go_on(number, symbols)
    return found


def _read(wanted: Sequence[Wanted]) -> list[Symbols]:
    """The symbols of each; readers go on by as much, and behind the end of their words where those are too few.

    Lanes of all readers lie side by side, those with most steps first, so that at each step those that still go on do.
    """
    order = sorted(range(len(wanted)), key=lambda number: -wanted[number].steps)
    ordered = [wanted[number] for number in order]
    lanes = _Lanes.of(ordered)
    classes = [in_lanes(each.classes, each.reader.lanes) for each in ordered]
    made = [np.empty(each.shape, np.int8) for each in classes]
    step = 0
    while step < len(classes[0]):
        active = sum(each.steps > step for each in ordered)
        stop = min(step + max(1, _BLOCK // int(lanes.bounds[active])), ordered[active - 1].steps)
        block = np.concatenate([each[step:stop] for each in classes[:active]], axis=1)
        symbols = lanes.go_on(block, active)
        for number in range(active):
            made[number][step:stop] = symbols[:, lanes.bounds[number] : lanes.bounds[number + 1]]
        step = stop
    lanes.put_back(ordered)
    found: list[Symbols] = [made[0]] * len(wanted)
    for number, symbols in zip(order, made, strict=True):
        found[number] = symbols.ravel()[: len(wanted[number].classes)]
    return found


@dataclass(frozen=True, eq=False)
class _Lanes:
    """The lanes of several readers side by side.

    Attributes:
        states: (lanes,), uint32.
        words: of all readers, (words,), uint16.
        starts, next: of each reader, the places of its first and of its next word among them.
        bounds: where its lanes begin, and in the end where the last one's end.
    """

    states: NDArray[np.uint32]
    words: NDArray[np.uint16]
    starts: Numbers
    next: Numbers
    bounds: Numbers

    @classmethod
    def of(cls, wanted: Sequence[Wanted]) -> Self:
        readers = [each.reader for each in wanted]
        words = [  # one a symbol at most
            reader.words[reader.position : reader.position + each.steps * reader.lanes]
            for reader, each in zip(readers, wanted, strict=True)
        ]
        starts = np.cumsum([0, *map(len, words)])
        return cls(
            np.concatenate([reader.states for reader in readers]),
            np.concatenate([*words, np.zeros(1, np.uint16)]),
            starts[:-1],
            starts[:-1].copy(),
            np.cumsum([0, *(reader.lanes for reader in readers)]),
        )

    def put_back(self, wanted: Sequence[Wanted]) -> None:
        """Let the readers go on from here."""
        for number, each in enumerate(wanted):
            each.reader.states = self.states[self.bounds[number] : self.bounds[number + 1]].copy()
            each.reader.position += int(self.next[number] - self.starts[number])

    def go_on(self, classes: NDArray[np.uint8], active: int) -> Symbols:
        """The next symbols (steps, lanes), of these classes, in the lanes of the first ``active`` readers."""
        slots, bounds = tables().slots, self.bounds[: active + 1]
        x, places = self.states[: bounds[-1]], self.next[:active]
        index = classes.astype(np.int64) << PRECISION
        found = np.empty(classes.shape, np.uint32)
        slot, low = np.empty_like(x), np.empty(len(x), bool)
        for entry, each in zip(found, index, strict=True):
            np.bitwise_and(x, TOTAL - 1, out=slot)
            np.add(each, slot, out=each)
            slots.take(each, out=entry, mode="wrap")  # the fastest: no index is out of bounds
            np.right_shift(x, PRECISION, out=x)
            np.right_shift(entry, PRECISION, out=slot)
            np.bitwise_and(slot, TOTAL - 1, out=slot)
            np.multiply(x, slot, out=x)
            np.bitwise_and(entry, TOTAL - 1, out=slot)
            np.add(x, slot, out=x)
            np.less(x, LOWEST, out=low)
            empty = low.nonzero()[0]
            ends = empty.searchsorted(bounds)
            counts = ends[1:] - ends[:-1]
            place = (places - ends[:-1]).repeat(counts)
            place += np.arange(len(empty))
            refilled = x.take(empty)
            refilled <<= np.uint32(16)
            refilled |= self.words.take(place, mode="clip")
            x[empty] = refilled
            places += counts
        symbols: Symbols = (found >> np.uint32(24)).astype(np.uint8).view(np.int8)
        return symbols


def _restored(source: Source, lanes: int) -> NDArray[np.uint32]:
    width = unpacked(source, np.full(lanes, 4))
    upper = unpacked(source, width) + (1 << width)
    lower = np.frombuffer(source.take(2 * lanes), "<u2")
    states: NDArray[np.uint32] = (upper << 16 | lower).astype(np.uint32)
    return states


def unpacked(source: Source, widths: Numbers) -> Numbers:
    """The inverse of ``packed``. Raises CheckpointError where the source ends."""
    places = np.arange(widths.max(initial=0))
    known = widths > places[:, None]
    total = int(widths.sum())
    planes = np.zeros(known.shape, np.int64)
    planes[known] = np.unpackbits(np.frombuffer(source.take(-(-total // 8)), np.uint8), count=total)
    values: Numbers = (1 << places) @ planes
    return values
