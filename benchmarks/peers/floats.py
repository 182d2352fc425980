"""The model as it is, in two floating-point types."""

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from peers.packed import written
from peers.registry import Built, Material, Row, peer


@peer("floats")
def floats(_sizes: Sequence[str]) -> Iterator[Row]:
    for dtype, name in ((torch.float32, "float32"), (torch.float16, "float16")):
        yield Row(name, name, partial(_cast, dtype), calibrated=False)


def _cast(dtype: torch.dtype, material: Material, _seed: int, folder: Path) -> Built:
    model = copy.deepcopy(material.source.model).to(dtype=dtype)
    nbytes = written(dict(model.named_parameters()), folder)
    return Built(model.float(), nbytes)
