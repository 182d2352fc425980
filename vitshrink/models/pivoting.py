"""The last step before a model is written: each low-rank layer in the form with the fewest numbers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.errors import NumericsError
from vitshrink.models.checkpoint import replace_layers
from vitshrink.models.gauge import best_window, pivots_first
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.targets import Target
from vitshrink.runtime import processes

UNUSED = 1e-12
"""Singular values of a product below this fraction of the largest are rounding."""

SURELY_USED = 1e-10
"""Squared singular values above this fraction of the largest are no rounding, and need no closer look."""


@torch.no_grad()
def fix_gauge(model: PreTrainedModel, targets: Sequence[Target]) -> None:
    """Store every low-rank target of ``model`` with pivots, in place; the outputs stay as they are.

    The inputs of an MLP's second layer are its hidden units, and those may be put in any order: they are sorted so that
    the pivots come first, along with the outputs of the first layer. Elsewhere the order of the channels is given, and
    the best block of neighboring ones is taken. Neither needs a gather when the model runs.

    Several processes share the layers; all of them get all.

    Raises:
        NumericsError: naming a layer whose row space no block of inputs spans.
    """
    fc1 = {target.block: target.name for target in targets if target.role == "fc1"}
    smaller = [target for target in targets if isinstance(model.get_submodule(target.name), LowRankLinear)]
    for start in range(0, len(smaller), processes.count()):
        group = smaller[start : start + processes.count()]
        with processes.together():
            found = [
                _pivoted(model, each, free=each.role == "fc2" and each.block in fc1) for each in processes.share(group)
            ]
        for number, target in enumerate(group):
            pivoted, order = processes.from_process(number, found[0] if number == processes.rank() else None)
            if order is not None:
                _permute_outputs(model.get_submodule(fc1[target.block]), order)
            replace_layers(model, {target.name: pivoted})  # at once: a later layer may permute this one


def _pivoted(model: PreTrainedModel, target: Target, *, free: bool) -> tuple[LowRankLinear, Tensor | None]:
    """A layer with pivots, and the order that its inputs are put in for that, where they are ``free``."""
    layer = model.get_submodule(target.name)
    assert isinstance(layer, LowRankLinear)
    up, down = _full_row_rank(*(factor.double() for factor in layer.factors()))
    try:
        order = pivots_first(down) if free else None
        if order is not None:
            down = down[:, order]
        pivot = best_window(down) if order is None else 0
        return LowRankLinear.from_factors(up, down, layer.bias, dtype=layer.weight.dtype, pivot=pivot), order
    except NumericsError as error:
        raise NumericsError(f"{target.name}: {error} Use --storage factors.") from error


def _full_row_rank(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with orthonormal rows in down (rank, in), even where the product is of a lower rank.

    Rows that the product does not use are random: those of a factorization may have no block that can be inverted.
    """
    Q, R = torch.linalg.qr(down.T)
    mixed = up @ R.T
    spread = torch.linalg.eigvalsh(mixed.T @ mixed)  # of squares, in which what is unused would drown in rounding
    if spread[0] > SURELY_USED * spread[-1]:
        return mixed, Q.T
    U, S, Vh = torch.linalg.svd(mixed, full_matrices=False)
    unused = UNUSED * S[0] >= S
    rows = Vh @ Q.T
    rows[unused] = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)).to(rows)[unused]
    Q, R = torch.linalg.qr(rows.T)
    return U * S.masked_fill(unused, 0) @ R.T, Q.T


def _permute_outputs(layer: nn.Module, order: Tensor) -> None:
    """Sort the outputs of a layer; in a low-rank one, pivoted or not, the output factor alone decides them."""
    for name in ("weight", "weight_scale", "bias"):
        if isinstance(rows := getattr(layer, name, None), Tensor):
            rows.copy_(rows[order].clone())
