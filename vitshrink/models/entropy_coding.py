"""Integers of known deviations as a stream of bytes, by asymmetric numeral systems.

Range variant (Duda 2013, arXiv 1311.2540) of many lanes side by side: a step takes the next integer of every lane, so
that it is a few operations on vectors. States have 32 bits, and exchange 16 at a time with the words that all lanes
share. A coder runs backwards: the first integer to be decoded is encoded last.

A lane would waste 16 bits, which its state must have before anything is encoded: they are a load that the decoder finds
in the end. Of the final states only the bits that they have are stored.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from vitshrink.errors import CheckpointError
from vitshrink.models.normal_tables import CLASSES, ESCAPE, GRID, PRECISION, TABLES, TOTAL, WIDER, shifts, tables

Numbers = NDArray[np.int64]

_LOWEST = 1 << 16
"""No state between two steps is less."""

_SHORT = 16
"""Steps of what is read before the rest."""

_BLOCK = 1 << 16
"""Integers that are decoded in one go: so many that what is known of them stays in a cache."""

Number = TypeVar("Number", bound=np.generic)


@dataclass(eq=False)
class Writer:
    """Takes integers in the order in which a reader gives them back."""

    lanes: int
    _segments: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = field(default_factory=list)
    _bits: list[bytes] = field(default_factory=list)

    def put(self, values: NDArray[Any], classes: NDArray[np.uint8]) -> None:
        """Integers of 16 bits, (count,), and their classes, (count,), which are best those of their deviations."""
        shift = shifts(classes).astype(np.int64)
        moved = values.astype(np.int64) + (1 << shift >> 1)
        upper = moved >> shift
        symbols, narrow = upper.astype(np.uint8), (classes - GRID * shift).astype(np.uint8)
        escaped = (np.abs(upper) >= ESCAPE) | (tables().frequencies[narrow, symbols] == 0)
        symbols[escaped] = ESCAPE
        self._segments.append((symbols, narrow))
        self._bits.append(packed(moved - (upper << shift), np.where(escaped, 0, shift)))
        if escaped.any():
            self.put(values[escaped], _wider(classes[escaped]))

    def stream(self, load: NDArray[np.uint16]) -> bytes:
        """Everything, and a load, (lanes,)."""
        states = load.astype(np.uint32) + np.uint32(_LOWEST)
        words: list[NDArray[np.uint16]] = []
        for symbols, classes in reversed(self._segments):
            _encode(states, symbols, classes, words)
        coded = np.concatenate([np.empty(0, np.uint16), *reversed(words)]).astype("<u2").tobytes()
        return len(coded).to_bytes(4, "little") + _stored(states) + coded + b"".join(self._bits)


@dataclass(eq=False)
class Source:
    """Bytes that are taken one part after the other. Raises CheckpointError where they end too early."""

    data: bytes
    position: int = 0

    def take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise CheckpointError("a stream of integers is damaged: it is too short.")
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
            raise CheckpointError("a stream of integers is damaged: it has half a word.")
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
                raise CheckpointError("a stream of integers is damaged: one of them has more than 16 bits.")
            others = yield from self.take(_wider(classes[escaped]))
            values = values.astype(np.result_type(values, others), copy=False)
            values[escaped] = others
        return values

    def load(self) -> NDArray[np.uint16]:
        """What the lanes were loaded with, (lanes,), after all integers were taken."""
        if self.position != len(self.words) or (self.states >= 2 * _LOWEST).any():
            raise CheckpointError("a stream of integers is damaged: it does not end with its matrix.")
        return (self.states - np.uint32(_LOWEST)).astype(np.uint16)


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
        wanted = short or dict(waiting)  # so that the long ones meet
        for number in wanted:
            del waiting[number]
        for number, symbols in zip(wanted, _read(list(wanted.values())), strict=True):
            reader = wanted[number].reader
            if reader.position > len(reader.words):
                found[number] = CheckpointError("a stream of integers is damaged: it is too short.")
            else:
                go_on(number, symbols)
    return found


def _read(wanted: Sequence[Wanted]) -> list[Symbols]:
    """The symbols of each; readers go on by as much, and behind the end of their words where those are too few.

    Lanes of all readers lie side by side, those with most steps first, so that at each step those that still go on do.
    """
    order = sorted(range(len(wanted)), key=lambda number: -wanted[number].steps)
    ordered = [wanted[number] for number in order]
    lanes = _Lanes.of([each.reader for each in ordered])
    classes = [_in_lanes(each.classes, each.reader.lanes) for each in ordered]
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
    lanes.put_back([each.reader for each in ordered])
    found: list[Symbols] = [made[0]] * len(wanted)
    for number, symbols in zip(order, made, strict=True):
        found[number] = symbols.ravel()[: len(wanted[number].classes)]
    return found


@dataclass(frozen=True, eq=False)
class _Lanes:
    """The lanes of several readers side by side.

    Attributes:
        states: (lanes,), uint32.
        words: of all readers.
        next: of each reader, the place of its next word among them.
        bounds: where its lanes begin, and in the end where the last one's end.
    """

    states: NDArray[np.uint32]
    words: NDArray[np.uint32]
    next: Numbers
    bounds: Numbers

    @classmethod
    def of(cls, readers: Sequence[Reader]) -> Self:
        starts = np.cumsum([0, *(len(each.words) for each in readers)])
        return cls(
            np.concatenate([each.states for each in readers]),
            np.concatenate([*(each.words for each in readers), np.zeros(1, np.uint16)]).astype(np.uint32),
            starts[:-1] + [each.position for each in readers],
            np.cumsum([0, *(each.lanes for each in readers)]),
        )

    def put_back(self, readers: Sequence[Reader]) -> None:
        starts = np.cumsum([0, *(len(each.words) for each in readers)])
        for number, reader in enumerate(readers):
            reader.states = self.states[self.bounds[number] : self.bounds[number + 1]].copy()
            reader.position = int(self.next[number] - starts[number])

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
            np.less(x, _LOWEST, out=low)
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


def _encode(
    states: NDArray[np.uint32], symbols: NDArray[np.uint8], classes: NDArray[np.uint8], words: list[NDArray[np.uint16]]
) -> None:
    """Change the states (lanes,) and append words, last step first."""
    index = _in_lanes(classes.astype(np.int64) << 8 | symbols, len(states))
    frequencies, starts = tables().frequencies.ravel(), tables().starts.ravel()
    for each in index[::-1]:
        frequency = frequencies[each]
        full = states >= frequency << np.uint32(32 - PRECISION)
        spilled = states[full]
        words.append(spilled.astype(np.uint16))
        states[full] = spilled >> np.uint32(16)
        states += states // frequency * (TOTAL - frequency) + starts[each]


def _in_lanes(values: NDArray[Number], lanes: int) -> NDArray[Number]:
    """(steps, lanes), with zeros, the most frequent symbol of class 0, behind the last."""
    steps = -(-len(values) // lanes)
    made = np.zeros(steps * lanes, values.dtype)
    made[: len(values)] = values
    return made.reshape(steps, lanes)


def _wider(classes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    wider: NDArray[np.uint8] = np.minimum(classes + np.uint8(WIDER), np.uint8(CLASSES - 1))
    return wider


def _stored(states: NDArray[np.uint32]) -> bytes:
    """Of all states: as half a byte, how many bits stand between the highest one and the lowest 16; these; those."""
    upper = (states >> np.uint32(16)).astype(np.int64)
    width = np.frexp(upper.astype(np.float64))[1] - 1
    lengths = packed(width, np.full(len(states), 4))
    return lengths + packed(upper - (1 << width), width) + states.astype("<u2").tobytes()


def _restored(source: Source, lanes: int) -> NDArray[np.uint32]:
    width = unpacked(source, np.full(lanes, 4))
    upper = unpacked(source, width) + (1 << width)
    lower = np.frombuffer(source.take(2 * lanes), "<u2")
    states: NDArray[np.uint32] = (upper << 16 | lower).astype(np.uint32)
    return states


def packed(values: Numbers, widths: Numbers) -> bytes:
    """The lowest bits of values (count,), as many as ``widths`` (count,) says: all lowest ones, all next ones …"""
    planes = [(values[widths > bit] >> bit & 1).astype(np.uint8) for bit in range(widths.max(initial=0))]
    return np.packbits(np.concatenate(planes)).tobytes() if planes else b""


def unpacked(source: Source, widths: Numbers) -> Numbers:
    """The inverse of ``packed``. Raises CheckpointError where the source ends."""
    places = np.arange(widths.max(initial=0))
    known = widths > places[:, None]
    total = int(widths.sum())
    planes = np.zeros(known.shape, np.int64)
    planes[known] = np.unpackbits(np.frombuffer(source.take(-(-total // 8)), np.uint8), count=total)
    values: Numbers = (1 << places) @ planes
    return values
