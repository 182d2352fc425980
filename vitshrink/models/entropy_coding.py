"""Integers of known deviations as a stream of bytes, by asymmetric numeral systems.

Range variant (Duda 2013, arXiv 1311.2540) of many lanes side by side: a step takes the next integer of every lane, so
that it is a few operations on vectors. States have 32 bits, and exchange 16 at a time with the words that all lanes
share. A coder runs backwards: the first integer to be decoded is encoded last.

A lane would waste 16 bits, which its state must have before anything is encoded: they are a load that the decoder finds
in the end. Of the final states only the bits that they have are stored.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitshrink.errors import CheckpointError
from vitshrink.models.normal_tables import CLASSES, ESCAPE, GRID, PRECISION, TOTAL, WIDER, shifts, tables

Numbers = NDArray[np.int64]

_LOWEST = 1 << 16
"""No state between two steps is less."""


@dataclass(eq=False)
class Writer:
    """Takes integers in the order in which a reader gives them back."""

    lanes: int
    _segments: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = field(default_factory=list)
    _bits: list[bytes] = field(default_factory=list)

    def put(self, values: NDArray[Any], classes: NDArray[Any]) -> None:
        """Integers of 16 bits, (count,), and their classes, (count,), which are best those of their deviations."""
        shift = shifts(classes)
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


class Reader:
    """The integers of a stream, call by call as they were put. Raises CheckpointError where it is damaged."""

    def __init__(self, source: Source, lanes: int) -> None:
        count = int.from_bytes(source.take(4), "little")
        self._states = _restored(source, lanes)
        self._words = np.frombuffer(source.take(count), "<u2").astype(np.uint64) if count % 2 == 0 else None
        self._position = 0
        self._bits = source

    def take(self, classes: NDArray[Any]) -> Numbers:
        """The next integers, (count,), of these classes."""
        shift = shifts(classes)
        values = self._symbols((classes - GRID * shift).astype(np.int64)).astype(np.int64)
        escaped = values == ESCAPE
        kept = np.where(escaped, 0, shift)
        values = (values << kept) + unpacked(self._bits, kept) - (1 << kept >> 1)
        if escaped.any():
            if classes[escaped].max() >= CLASSES - 1:
                raise CheckpointError("a stream of integers is damaged: one of them has more than 16 bits.")
            values[escaped] = self.take(_wider(classes[escaped]))
        return values

    def load(self) -> NDArray[np.uint16]:
        """What the lanes were loaded with, (lanes,), after all integers were taken."""
        if self._words is None or self._position != len(self._words) or (self._states >= 2 * _LOWEST).any():
            raise CheckpointError("a stream of integers is damaged: it does not end with its matrix.")
        return (self._states - np.uint64(_LOWEST)).astype(np.uint16)

    def _symbols(self, classes: Numbers) -> NDArray[np.int8]:
        x, words, position = self._states, self._words, self._position
        if words is None:
            raise CheckpointError("a stream of integers is damaged: it has half a word.")
        slots = tables().slots
        found = _in_lanes(classes, len(x)) << PRECISION
        slot, entry, low = np.empty_like(x), np.empty((len(x), 2), np.uint64), np.empty(len(x), bool)
        frequency, distance = entry[:, 0], entry[:, 1]
        for index in found:
            np.bitwise_and(x, TOTAL - 1, out=slot)
            np.add(index, slot.view(np.int64), out=index)
            slots.take(index, axis=0, out=entry, mode="clip")
            np.right_shift(x, PRECISION, out=x)
            np.multiply(x, frequency, out=x)
            np.add(x, distance, out=x)
            np.less(x, _LOWEST, out=low)
            refilled = x[low]
            stop = position + len(refilled)
            if stop > len(words):
                raise CheckpointError("a stream of integers is damaged: it is too short.")
            refilled <<= np.uint64(16)
            refilled |= words[position:stop]
            x[low], position = refilled, stop
        self._position = position
        symbols: NDArray[np.int8] = tables().symbols[found.ravel()[: len(classes)]]
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


def _in_lanes(values: Numbers, lanes: int) -> Numbers:
    """(steps, lanes), with zeros, the most frequent symbol of class 0, behind the last."""
    steps = -(-len(values) // lanes)
    made = np.zeros(steps * lanes, np.int64)
    made[: len(values)] = values
    return made.reshape(steps, lanes)


def _wider(classes: NDArray[Any]) -> NDArray[Any]:
    return np.minimum(classes.astype(np.int64) + WIDER, CLASSES - 1)


def _stored(states: NDArray[np.uint32]) -> bytes:
    """Of all states: as half a byte, how many bits stand between the highest one and the lowest 16; these; those."""
    upper = (states >> np.uint32(16)).astype(np.int64)
    width = np.frexp(upper.astype(np.float64))[1] - 1
    lengths = packed(width, np.full(len(states), 4))
    return lengths + packed(upper - (1 << width), width) + states.astype("<u2").tobytes()


def _restored(source: Source, lanes: int) -> NDArray[np.uint64]:
    width = unpacked(source, np.full(lanes, 4))
    upper = unpacked(source, width) + (1 << width)
    lower = np.frombuffer(source.take(2 * lanes), "<u2")
    states: NDArray[np.uint64] = (upper << 16 | lower).astype(np.uint64)
    return states


def packed(values: Numbers, widths: Numbers) -> bytes:
    """The lowest bits of values (count,), as many as ``widths`` (count,) says: all lowest ones, all next ones …"""
    planes = [(values[widths > bit] >> bit & 1).astype(np.uint8) for bit in range(widths.max(initial=0))]
    return np.packbits(np.concatenate(planes)).tobytes() if planes else b""


def unpacked(source: Source, widths: Numbers) -> Numbers:
    """The inverse of ``packed``. Raises CheckpointError where the source ends."""
    total = int(widths.sum())
    bits = np.unpackbits(np.frombuffer(source.take(-(-total // 8)), np.uint8), count=total)
    values, start = np.zeros(len(widths), np.int64), 0
    for bit in range(widths.max(initial=0)):
        chosen = widths > bit
        stop = start + int(chosen.sum())
        values[chosen] |= bits[start:stop].astype(np.int64) << bit
        start = stop
    return values
