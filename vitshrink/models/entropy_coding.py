"""Integers of known deviations as a stream of bytes, by asymmetric numeral systems.

Range variant (Duda 2013, arXiv 1311.2540) of many lanes side by side: a step takes the next integer of every lane, so
that it is a few operations on vectors. States have 32 bits, and exchange 16 at a time with the words that all lanes
share. A coder runs backwards: the first integer to be decoded is encoded last. ``entropy_decoding`` reads.

A lane would waste 16 bits, which its state must have before anything is encoded: they are a load that the decoder finds
in the end. Of the final states only the bits that they have are stored.
"""

from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vitshrink.models.normal_tables import CLASSES, ESCAPE, GRID, PRECISION, TOTAL, WIDER, shifts, tables

Numbers = NDArray[np.int64]

LOWEST = 1 << 16
"""No state between two steps is less."""

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
            self.put(values[escaped], wider(classes[escaped]))

    def stream(self, load: NDArray[np.uint16]) -> bytes:
        """Everything, and a load, (lanes,)."""
        states = load.astype(np.uint32) + np.uint32(LOWEST)
        words: list[NDArray[np.uint16]] = []
        for symbols, classes in reversed(self._segments):
            _encode(states, symbols, classes, words)
        coded = np.concatenate([np.empty(0, np.uint16), *reversed(words)]).astype("<u2").tobytes()
        return len(coded).to_bytes(4, "little") + _stored(states) + coded + b"".join(self._bits)


def _encode(
    states: NDArray[np.uint32], symbols: NDArray[np.uint8], classes: NDArray[np.uint8], words: list[NDArray[np.uint16]]
) -> None:
    """Change the states (lanes,) and append words, last step first."""
    index = in_lanes(classes.astype(np.int64) << 8 | symbols, len(states))
    frequencies, starts = tables().frequencies.ravel(), tables().starts.ravel()
    for each in index[::-1]:
        frequency = frequencies[each]
        full = states >= frequency << np.uint32(32 - PRECISION)
        spilled = states[full]
        words.append(spilled.astype(np.uint16))
        states[full] = spilled >> np.uint32(16)
        states += states // frequency * (TOTAL - frequency) + starts[each]


def in_lanes(values: NDArray[Number], lanes: int) -> NDArray[Number]:
    """(steps, lanes), with zeros, the most frequent symbol of class 0, behind the last."""
    steps = -(-len(values) // lanes)
    made = np.zeros(steps * lanes, values.dtype)
    made[: len(values)] = values
    return made.reshape(steps, lanes)


def wider(classes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """In which integers follow that these classes have no frequency for."""
    found: NDArray[np.uint8] = np.minimum(classes + np.uint8(WIDER), np.uint8(CLASSES - 1))
    return found


def _stored(states: NDArray[np.uint32]) -> bytes:
    """Of all states: as half a byte, how many bits stand between the highest one and the lowest 16; these; those."""
    upper = (states >> np.uint32(16)).astype(np.int64)
    width = np.frexp(upper.astype(np.float64))[1] - 1
    lengths = packed(width, np.full(len(states), 4))
    return lengths + packed(upper - (1 << width), width) + states.astype("<u2").tobytes()


def packed(values: Numbers, widths: Numbers) -> bytes:
    """The lowest bits of values (count,), as many as ``widths`` (count,) says: all lowest ones, all next ones …"""
    planes = [(values[widths > bit] >> bit & 1).astype(np.uint8) for bit in range(widths.max(initial=0))]
    return np.packbits(np.concatenate(planes)).tobytes() if planes else b""
