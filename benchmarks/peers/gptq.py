"""GPTQ (Frantar et al., arXiv 2210.17323), written from the paper: uniform bits, groups with asymmetric scales.

Columns are rounded one by one, and what is left of each error is moved to the columns that follow, by the inverse of
the layer's Hessian H = Σ x xᵀ over its inputs, damped by 1 % of its mean diagonal. Blocks are taken in order, and
within a block the layers in the order in which they run, each on what the rounded ones before it give. Columns with
the largest diagonal come first (``act_order``), with scales of groups that are fitted before (``static_groups``).
"""

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peers.packed import SCALE, Packed, fitted, rounded, stored
from peers.registry import Built, Material, Row, peer
from vitshrink.data import Batch
from vitshrink.models.targets import Target, blocks_of, find_targets, linear_of
from vitshrink.statistics.walk import HiddenBatch, hidden_batches

BITS = (2, 3, 4, 8)
GROUPS = (128, 32)
DAMPING = 0.01
LAZY = 128
"""Columns after which the rest of the matrix is corrected."""


@dataclass(frozen=True)
class Recipe:
    """How matrices are rounded."""

    bits: int
    group: int
    activation_order: bool = True


@dataclass
class Rounded:
    """The matrices of the blocks by recipe and seed, and the seconds they took; two rows share them."""

    found: dict[tuple[Recipe, int], tuple[dict[str, Packed], float]] = field(default_factory=dict)

    def matrices(self, recipe: Recipe, material: Material, seed: int) -> tuple[dict[str, Packed], float]:
        if (recipe, seed) not in self.found:
            started = time.perf_counter()
            matrices = quantize(material.source.model, material.calibrations[seed].batches, recipe)
            self.found = {(recipe, seed): (matrices, time.perf_counter() - started)}
        return self.found[recipe, seed]


@peer("gptq")
def gptq(_sizes: Sequence[str]) -> Iterator[Row]:
    shared = Rounded()
    for group in GROUPS:
        for bits in BITS:
            codes = f"{bits}-bit codes, float16 scales, {bits}-bit zeros in the blocks"
            name, recipe = f"GPTQ, groups of {group}", Recipe(bits, group)
            for rest in ("float16", "int8", "int4")[: 3 if bits <= 4 else 2]:
                shown = name if rest == "float16" else f"{name}, rest {rest}"
                yield Row(f"{shown}: {bits} bits", f"{codes}; rest {rest}", partial(_built, shared, recipe, rest))
            if bits < 8:
                build = partial(_built, shared, Recipe(bits, group, activation_order=False), "int8")
                yield Row(f"{name}, columns as they stand, rest int8: {bits} bits", f"{codes}; rest int8", build)


def _built(shared: Rounded, recipe: Recipe, rest: str, material: Material, seed: int, folder: Path) -> Built:
    matrices, seconds = shared.matrices(recipe, material, seed)
    started, model = time.perf_counter(), material.source.model
    if rest != "float16":
        matrices = others(model, matrices, int(rest.removeprefix("int"))) | matrices
    built, nbytes = stored(model, matrices, folder)
    return Built(built, nbytes, seconds + time.perf_counter() - started)


def others(model: PreTrainedModel, known: dict[str, Packed], bits: int) -> dict[str, Packed]:
    """Tables, patch projection and heads, rounded to the nearest of 8 bits a row, or fewer in groups of 32."""
    layers = (nn.Linear, nn.Conv2d, nn.Embedding)
    modules = [(name, each) for name, each in model.named_modules() if isinstance(each, layers)]
    weights = {f"{name}.weight": each.weight for name, each in modules if f"{name}.weight" not in known}
    matrices = {name: weight.detach().flatten(1) for name, weight in weights.items()}
    return {name: rounded(each, bits, each.shape[1] if bits == 8 else 32) for name, each in matrices.items()}


@torch.no_grad()
def quantize(model: PreTrainedModel, batches: Sequence[Batch], recipe: Recipe) -> dict[str, Packed]:
    """The weights of the layers of the blocks, by the names of the parameters. ``model`` stays as it is."""
    model = copy.deepcopy(model).eval()
    blocks, found = blocks_of(model), {}
    moving = hidden_batches(model, blocks[0], batches)
    for index, block in enumerate(blocks):
        targets = [target for target in find_targets(model) if target.block == index]
        for _group, together in groupby(targets, key=lambda target: target.input_group):
            layers = list(together)
            hessian = _hessian(block, linear_of(model, layers[0].name), moving)
            for target in layers:
                found[f"{target.name}.weight"] = _replaced(model, target, hessian, recipe)
        for batch in moving:
            batch.hidden = batch.through(block)
    return found


def _replaced(model: PreTrainedModel, target: Target, hessian: Tensor, recipe: Recipe) -> Packed:
    weight = linear_of(model, target.name).weight
    packed = quantize_matrix(weight, hessian, recipe)
    weight.copy_(packed.dense())
    return packed


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """The layer was called: the rest of the block need not run."""


def _hessian(block: nn.Module, layer: nn.Linear, moving: Sequence[HiddenBatch]) -> Tensor:
    """Mean of x xᵀ over the real tokens that enter ``layer``, (in, in), in float64."""
    total = torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64)
    count = 0

    def add(_module: nn.Module, arguments: tuple[Tensor, ...]) -> Any:
        nonlocal count
        x = arguments[0] if batch.mask is None else arguments[0][batch.mask]
        x = x.reshape(-1, x.shape[-1])
        total.add_((x.T @ x).double())
        count += len(x)
        raise _Reached

    handle = layer.register_forward_pre_hook(add)
    try:
        for batch in moving:
            try:
                batch.through(block)
            except _Reached:
                continue
    finally:
        handle.remove()
    return total / count


def quantize_matrix(weight: Tensor, hessian: Tensor, recipe: Recipe) -> Packed:
    """Codes of a matrix (m, n) for the Hessian (n, n) of its inputs."""
    bits, group, n = recipe.bits, recipe.group, weight.shape[1]
    W, H = weight.detach().float().clone(), hessian.clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W[:, dead] = 0
    scales, zeros = fitted(W, bits, group)
    order = torch.arange(n)
    if recipe.activation_order:
        order = H.diagonal().argsort(descending=True)
    W, H = W[:, order], H[order][:, order]
    H.diagonal().add_(DAMPING * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True).float()
    codes = torch.zeros(W.shape, dtype=torch.uint8)
    width = LAZY if recipe.activation_order else group
    for start in range(0, n, width):
        end = min(start + width, n)
        if not recipe.activation_order:  # the group begins here, and all before it has been made up for
            scales[:, start // group], zeros[:, start // group] = (
                each[:, 0] for each in fitted(W[:, start:end], bits, group)
            )
        errors = torch.empty(W.shape[0], end - start)
        for column in range(start, end):
            of_group = int(order[column]) // group
            scale, zero, w = scales[:, of_group], zeros[:, of_group], W[:, column]
            code = (w / scale + zero).round().clamp(0, 2**bits - 1)
            codes[:, order[column]] = code.to(torch.uint8)
            error = (w - (code - zero) * scale) / U[column, column]
            W[:, column:end] -= error[:, None] * U[column, column:end]
            errors[:, column - start] = error
        W[:, end:] -= errors @ U[start:end, end:]
    return Packed(bits, group, codes, scales.to(SCALE), zeros.to(torch.uint8))
