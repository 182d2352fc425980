"""The form in which low-rank layers are trained, and the way back to the form in which they are stored."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.models.checkpoint import compressed_layers, replace_layers
from vitshrink.models.pivoting import fix_gauge
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.targets import layers_in_blocks


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product from factors of equal Grams, upᵀ up = down downᵀ: (out, rank) and (rank, in), float64.

    Of all factorizations of a matrix these have the least norm, and a step in either factor moves the product about as
    far as the same step in the other: one learning rate then suits both.
    """
    Q_up, R_up = torch.linalg.qr(up.double())
    Q_down, R_down = torch.linalg.qr(down.double().T)
    U, S, Vh = torch.linalg.svd(R_up @ R_down.T)
    root = S.sqrt()
    return Q_up @ U * root, root[:, None] * (Vh @ Q_down.T)


@contextmanager
def whole_factors(model: PreTrainedModel) -> Iterator[None]:
    """Inside, ``model`` is unpacked; it is packed again where training ends without an error.

    Raises:
        NumericsError: naming a layer that no choice of pivots can store.
    """
    pivots = unpack(model)
    yield
    if pivots:
        pack(model, pivots)


@torch.no_grad()
def unpack(model: PreTrainedModel) -> dict[str, int]:
    """Give every plain low-rank layer of ``model`` two whole, balanced factors, in place; the outputs stay as they are.

    Returns:
        the pivots of the layers that had some, for ``pack``.
    """
    pivots = {}
    plain = {}
    for name, layer in compressed_layers(model).items():
        if not isinstance(layer, LowRankLinear):
            continue  # of another structure: trained as it is stored
        if layer.spec.pivot is not None:
            pivots[name] = layer.spec.pivot
        plain[name] = LowRankLinear.from_factors(*balanced(*layer.factors()), layer.bias, dtype=layer.weight.dtype)
    replace_layers(model, plain)
    return pivots


def pack(model: PreTrainedModel, pivots: Mapping[str, int]) -> None:
    """Store the layers that had pivots with pivots again, in place and without loss; new ones where those fit better.

    Raises:
        NumericsError: naming a layer that no choice of pivots can store.
    """
    found = layers_in_blocks(model, LowRankLinear)
    fix_gauge(model, [target for target in found if target.name in pivots or target.role == "fc1"])
