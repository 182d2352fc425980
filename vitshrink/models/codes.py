"""A matrix of integers with a step for each row and each column, and the integers as a stream of compressed bytes.

A weight is its integer times the step of its row and that of its column. An integer takes as many bits as a normal
variable says whose deviation is the product of one of the row and one of the column: any number of bits a weight.
A stream is a checksum; the upper bytes of the steps of columns, the deviations of columns and those of rows, all on a
logarithmic grid; the integers. Deviations of columns go down as their steps go up: their products are stored.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitshrink.errors import CheckpointError
from vitshrink.models.entropy_coding import Writer
from vitshrink.models.entropy_decoding import Decoder, Reader, Source, decoded
from vitshrink.models.normal_tables import CLASSES, FIRST, GRID
from vitshrink.models.scales import fitted

STEPS = torch.float16
"""Type of the steps in the file."""

_SUM = 4
"""Bytes of the checksum."""

_AT_ONCE = 1 << 20
"""Integers that are coded in one go."""

_LARGEST = 32768

_FAR = 1 << 14
"""Farther than any class."""


@dataclass(frozen=True, eq=False)
class Codes:
    """Integers (rows, columns), int8 or int16, with the steps of columns, (columns,), float32."""

    integers: Tensor
    columns: Tensor

    def to(self, device: torch.device) -> "Codes":
        return Codes(self.integers.to(device), self.columns.to(device))

    def scaled(self, rows: Tensor) -> Tensor:
        """The matrix with these steps of rows (rows,): float32, (rows, columns)."""
        return self.integers.float() * self.columns * rows.float()[:, None]


def encode(codes: Codes) -> Tensor:
    """The stream of bytes, (length,), uint8, on the CPU."""
    integers = codes.integers.cpu().numpy()
    steps = codes.columns.to("cpu", STEPS).numpy().astype("<f2").view("<u2")
    high, low = (steps >> 8).astype(np.int64), (steps & 255).astype(np.uint8)
    rows, columns = fitted(integers)
    writer = Writer(_lanes(*integers.shape))
    header = b""
    for side in (high, columns + high, rows):
        middle = int(np.median(side))
        number = _class_of(side - middle)
        header += struct.pack("<hB", middle, number)
        writer.put(side - middle, np.full(len(side), number, np.uint8))
    for part in _parts(*integers.shape):
        writer.put(integers[part].ravel(), _classes(rows[part], columns).ravel())
    load = np.zeros(2 * writer.lanes, np.uint8)
    loaded = min(len(low), len(load))
    load[:loaded] = low[:loaded]
    stream = header + low[loaded:].tobytes() + writer.stream(load.view("<u2").astype(np.uint16))
    return torch.frombuffer(bytearray(_sum(stream, integers.shape) + stream), dtype=torch.uint8)


def decode(stream: Tensor, shape: tuple[int, int]) -> Codes:
    """The inverse of ``encode``, on the device of the stream. Raises CheckpointError for a damaged stream."""
    (found,) = decode_each([(stream, shape)])
    if isinstance(found, CheckpointError):
        raise found
    return found


def decode_each(streams: Sequence[tuple[Tensor, tuple[int, int]]]) -> list[Codes | CheckpointError]:
    """The inverse of ``encode`` for streams and the shapes of their matrices, or what is wrong with them.

    Small matrices are decoded many times faster together than one by one.
    """
    return decoded([_decoder(stream, shape) for stream, shape in streams])


def _decoder(stream: Tensor, shape: tuple[int, int]) -> Decoder[Codes]:
    data = stream.cpu().contiguous().numpy().tobytes()
    if len(data) <= _SUM or data[:_SUM] != _sum(data[_SUM:], shape):
        raise CheckpointError(
            "the integers of this checkpoint are damaged, or another version of vitshrink wrote them."
        )
    source, lanes = Source(data, _SUM), _lanes(*shape)
    sides = [struct.unpack("<hB", source.take(3)) for _ in range(3)]
    if any(number >= CLASSES for _, number in sides):
        raise CheckpointError("the integers of this checkpoint are damaged: unknown class.")
    rest = np.frombuffer(source.take(max(0, shape[1] - 2 * lanes)), np.uint8)
    reader = Reader(source, lanes)
    found = []
    for count, (middle, number) in zip((shape[1], shape[1], shape[0]), sides, strict=True):
        found.append(middle + (yield from reader.take(np.full(count, number, np.uint8))).astype(np.int64))
    high, columns, rows = found
    parts = []
    for part in _parts(*shape):
        values = yield from reader.take(_classes(rows[part], columns - high).ravel())
        parts.append(_fitting(values).reshape(-1, shape[1]))
    low = np.concatenate([reader.load().astype("<u2").view(np.uint8)[: shape[1]], rest])
    if source.position != len(data):
        raise CheckpointError("the integers of this checkpoint are damaged: there are more than the matrix has.")
    steps = torch.from_numpy((high << 8 | low).astype("<u2").view("<f2").astype(np.float16))
    integers = torch.from_numpy(np.concatenate(parts))
    return Codes(integers, steps.float()).to(stream.device)


def _lanes(rows: int, columns: int) -> int:
    """So many that a stream is decoded in few steps, and so few that they cost no more than a few thousandths of it.

    Two bytes for each lane, up to half as many as columns, come at no cost, see ``entropy_coding``.
    """
    numbers = rows * columns
    return min(1 + numbers // 384, -(-columns // 2)) + numbers // 4096


def _parts(rows: int, columns: int) -> list[slice]:
    """Rows that are coded at once: a million integers, for the sake of memory."""
    size = max(1, _AT_ONCE // columns)
    return [slice(start, start + size) for start in range(0, rows, size)]


def _classes(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.uint8]:
    near = [np.clip(side, -_FAR, _FAR).astype(np.int16) for side in (rows, columns)]  # a quarter of the time
    classes: NDArray[np.uint8] = np.clip(near[0][:, None] + near[1], 0, CLASSES - 1).astype(np.uint8)
    return classes


def _class_of(values: NDArray[np.int64]) -> int:
    """Of integers that have one deviation."""
    square = max(0.03, float(np.mean(np.square(values))) - 1 / 12)
    return int(np.clip(round(GRID * np.log2(square) / 2) - FIRST, 0, CLASSES - 1))


def _fitting(values: NDArray[np.signedinteger[Any]]) -> NDArray[np.int8 | np.int16]:
    """As few bytes as they take. Raises CheckpointError for too many."""
    most = int(max(values.max(initial=0), -values.min(initial=0).astype(np.int64)))
    if most > _LARGEST:
        raise CheckpointError("the integers of this checkpoint are damaged: one of them has more than 16 bits.")
    return values.astype(np.int8 if most < 128 else np.int16, copy=False)


def _sum(stream: bytes, shape: tuple[int, ...]) -> bytes:
    """Of the stream and of what it is read with."""
    return zlib.crc32(stream, zlib.crc32(struct.pack("<2q", *shape))).to_bytes(_SUM, "little")
