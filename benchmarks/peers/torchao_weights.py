"""torchao: integer weights of any width, in groups.

It keeps a code of any width in a byte of its own; here codes count as if they were packed, which a file could do.
"""

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peers.packed import SCALE, Packed, stored
from peers.registry import Built, Material, Row, peer

WIDTHS: tuple[tuple[int, int | None], ...] = ((8, None), (6, 32), (5, 32), (4, 64), (4, 32), (3, 32), (2, 32))
"""Bits, and weights that share a scale; None: a row."""


@peer("torchao", "torchao")
def torchao_rows(_sizes: Sequence[str]) -> Iterator[Row]:
    for bits, group in WIDTHS:
        groups = "a row" if group is None else f"groups of {group}"
        yield Row(
            f"torchao: {bits} bits, {groups}",
            f"{bits}-bit codes (counted packed) and float16 scales of all linear layers and embeddings; rest float16",
            partial(_rounded, bits, group),
            calibrated=False,
        )


def _rounded(bits: int, group: int | None, material: Material, _seed: int, folder: Path) -> Built:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    model = copy.deepcopy(material.source.model)
    granularity = PerAxis(0) if group is None else PerGroup(group)
    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity)
    quantize_(model, config, filter_fn=lambda module, _name: isinstance(module, nn.Linear | nn.Embedding))
    integers = {name: each for name, each in model.named_parameters() if hasattr(each, "qdata")}
    matrices = {name: _packed(weight, bits, group) for name, weight in integers.items()}
    built, nbytes = stored(material.source.model, matrices, folder)
    return Built(built, nbytes)


def _packed(weight: Any, bits: int, group: int | None) -> Packed:
    """Symmetric codes in [-2^(bits-1), 2^(bits-1)), moved up to begin at 0."""
    if weight.zero_point.any():
        raise ValueError("torchao gives zero points, which are not counted here")
    codes: Tensor = (weight.qdata.int() + 2 ** (bits - 1)).to(torch.uint8)
    scales = weight.scale.reshape(len(codes), -1).to(SCALE)
    return Packed(bits, group or codes.shape[1], codes, scales, None)
