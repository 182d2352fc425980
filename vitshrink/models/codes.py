"""A matrix of integers with a step for each row and each column, and the integers as a stream of compressed bytes.

A weight is its integer times the step of its row and that of its column. Of what a fixed width leaves unused nothing is
stored: the integers are compressed by Huffman's code, so that a matrix takes its entropy, any number of bits a weight.
Columns are stored in the order of their steps, by which alike ones stand together.
"""

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vitshrink.errors import CheckpointError

STEPS = torch.float16
"""Type of the steps in the file."""

_NARROW, _WIDE = 1, 2
"""First byte of a stream: its integers have one byte, or two, of which the upper ones follow the lower ones. They are
stored without a sign: 0, -1, 1, -2, 2 … as 0, 1, 2, 3, 4 …"""


@dataclass(frozen=True, eq=False)
class Codes:
    """Integers (rows, columns), int8 or int16, with the steps of columns, (columns,), float32."""

    integers: Tensor
    columns: Tensor

    def scaled(self, rows: Tensor) -> Tensor:
        """The matrix with these steps of rows (rows,): float32, (rows, columns)."""
        return self.integers.float() * self.columns * rows.float()[:, None]


def encode(codes: Codes) -> Tensor:
    """The stream of bytes, (length,), uint8, on the CPU."""
    steps = codes.columns.to("cpu", STEPS)
    signed = codes.integers.cpu()[:, _order(steps)].T.numpy().astype(np.int32)
    values = np.where(signed < 0, -2 * signed - 1, 2 * signed)  # so that small ones have no upper byte
    planes = [values & 255, values >> 8][: _NARROW if values.max(initial=0) < 256 else _WIDE]
    packed = b"".join(_smallest(plane.astype(np.uint8).tobytes()) for plane in planes)
    stream = bytes([len(planes)]) + steps.numpy().astype("<f2").tobytes() + packed
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8)


def decode(stream: Tensor, shape: tuple[int, int]) -> Codes:
    """The inverse of ``encode``, on the device of the stream. Raises CheckpointError for a damaged stream."""
    rows, columns = shape
    data = stream.cpu().contiguous().numpy().tobytes()
    start = 1 + 2 * columns
    if len(data) <= start or data[0] not in (_NARROW, _WIDE):
        raise CheckpointError("a stream of integers is damaged, or was written by a newer vitshrink.")
    steps = torch.from_numpy(np.frombuffer(data[1:start], "<f2").astype(np.float16))
    planes, rest = [], data[start:]
    for _ in range(data[0]):
        plane, rest = _inflated(rest, rows * columns)
        planes.append(np.frombuffer(plane, np.uint8).reshape(columns, rows))
    if rest:
        raise CheckpointError("a stream of integers is longer than its matrix: it is damaged.")
    raw = planes[0].astype(np.int32) if len(planes) == 1 else planes[0] | planes[1].astype(np.int32) << 8
    signed = np.where(raw & 1, -(raw >> 1) - 1, raw >> 1)
    narrow = np.abs(signed).max(initial=0) < 128
    values = torch.from_numpy(signed.astype(np.int8 if narrow else np.int16))
    integers = torch.empty_like(values)
    integers[_order(steps)] = values
    return Codes(integers.T.contiguous().to(stream.device), steps.float().to(stream.device))


def _order(steps: Tensor) -> Tensor:
    return steps.float().argsort(stable=True)


def _smallest(plane: bytes) -> bytes:
    return min((_deflated(plane, strategy) for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE)), key=len)


def _deflated(plane: bytes, strategy: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
    return packer.compress(plane) + packer.flush()


def _inflated(data: bytes, length: int) -> tuple[bytes, bytes]:
    """The first ``length`` bytes that ``data`` holds compressed, and what stands behind them."""
    unpacker = zlib.decompressobj(-15)
    try:
        plane = unpacker.decompress(data, length)
        plane += unpacker.decompress(unpacker.unconsumed_tail, 1) if not unpacker.eof else b""
    except zlib.error as error:
        raise CheckpointError(f"a stream of integers is damaged ({error}).") from error
    if len(plane) != length or not unpacker.eof:
        raise CheckpointError(f"a stream of integers is damaged: it does not hold {length:,} of them.")
    return plane, unpacker.unused_data


Memory = Literal["float", "integers", "stream"]
"""How a matrix is held: decoded (fastest), as integers (a quarter of float32), or as it is stored (least memory)."""
