"""Tensor decompositions of an attention: what its projections, heads and dimensions have in common."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vitshrink.errors import UsageError
from vitshrink.methods.attention import ATTENTION, AttentionWeights, Dimensions, Part, attention_method
from vitshrink.stats import square_roots
from vitshrink.structures import Structure
from vitshrink.structures.tensor import CP, PROJECTIONS, Train, Tucker

FORMS = ("tucker", "cp", "tt")
STEPS = 8
"""Ranks on offer, up to this many: each is a decomposition of its own."""


def form_at(dimensions: Dimensions, rank: int, form: str) -> Tucker | CP | Train:
    """The form whose rank of the width is ``rank``; the head dimension, or the heads, are cut in proportion."""
    heads, head, width = dimensions.heads, dimensions.head, dimensions.width
    if form == "cp":
        return CP(rank)
    if form == "tt":
        own = PROJECTIONS * heads
        return Train(PROJECTIONS, min(own, max(-(-own * rank // width), -(-rank // head))), rank)
    return Tucker(PROJECTIONS, heads, max(1, -(-head * rank // width)), rank)


def structures(
    dimensions: Dimensions, ranks: Mapping[str, int], form: str = "tucker", iterations: int = 5
) -> dict[str, Structure]:
    return {ATTENTION: form_at(dimensions, ranks["qkv"], form)}


def steps(dimensions: Dimensions, form: str = "tucker", iterations: int = 5) -> Sequence[int]:
    if form not in FORMS:
        raise UsageError(f"--option form={form}: unknown. Available: {', '.join(FORMS)}.")
    outputs = PROJECTIONS * dimensions.heads * dimensions.head
    most = dimensions.width
    if form == "cp":  # a term costs more than a rank, but there may be more of them than channels
        most = outputs * dimensions.width // (PROJECTIONS + dimensions.heads + dimensions.head + dimensions.width)
    return sorted({max(1, most * step // STEPS) for step in range(1, STEPS + (form == "tucker"))})


@attention_method(
    "tensor", parts={"qkv": ("query", "key", "value")}, structures=structures, ranks=steps, extra="tensor"
)
def tensor(
    attention: AttentionWeights,
    ranks: Sequence[int],
    parts: Sequence[str],
    *,
    form: str = "tucker",
    iterations: int = 5,
) -> dict[str, Part]:
    """Tucker (HOOI), CP or tensor-train of the weights as a tensor (q/k/v, heads, head dimension, width), by tensorly.

    De Lathauwer et al. 2000 (HOOI), Carroll and Chang 1970 (CP), Oseledets 2011 (tensor-train). The width is weighted
    by C^½, C the covariance of the inputs, so that ``loss`` is the error of the projections' outputs; the other modes
    are not the input's, and have no such metric. The biases absorb what the mean of the inputs loses. Only the rank of
    the width is chosen, the others follow from it. Factors of two ranks are not nested: up to eight are tried.
    """
    weights = torch.stack([attention.by_head(role) for role in ("query", "key", "value")])
    root, inverse = square_roots(attention.covariance("query"))
    weighted = weights @ root
    found = {rank: _decompose(weighted, form_at(attention.dimensions, rank, form), iterations) for rank in ranks}
    energy = weighted.square().sum()
    loss = torch.full((max(ranks) + 1,), float(energy), dtype=weighted.dtype, device=weighted.device)
    for rank in sorted(found):
        error = (weighted - _product(found[rank], form)).square().sum()
        loss[rank:] = torch.minimum(loss[rank], error)
    mean = attention.mean("query")
    bias = torch.cat([attention.biases[role] for role in ("query", "key", "value")])

    def tensors(rank: int) -> dict[str, dict[str, Tensor]]:
        factors = {**found[rank], "inputs": found[rank]["inputs"] @ inverse}
        lost = (weights - _product(factors, form)) @ mean
        return {"query": {**factors, "bias": bias + lost.flatten()}}

    return {"qkv": Part(loss, tensors)}


def _decompose(weighted: Tensor, shape: Tucker | CP | Train, iterations: int) -> dict[str, Tensor]:
    """Factors as ``TensorProjection`` names them."""
    tensorly: Any = importlib.import_module("tensorly")
    decomposition: Any = importlib.import_module("tensorly.decomposition")
    names = ("parts", "heads", "dims", "inputs")
    with tensorly.backend_context("pytorch"):
        if isinstance(shape, Tucker):
            ranks = [shape.parts, shape.heads, shape.dims, shape.inputs]
            core, factors = decomposition.tucker(weighted, rank=ranks, n_iter_max=iterations)
            named = dict(zip(names, factors, strict=True))
            return {**named, "weight": core, "inputs": named["inputs"].T}
        if isinstance(shape, CP):
            weights, factors = decomposition.parafac(
                weighted, shape.rank, n_iter_max=4 * iterations, init="random", random_state=0, normalize_factors=True
            )
            share = weights.sqrt()  # half of each term with the inputs: no factor is large
            named = dict(zip(names, factors, strict=True))
            return {**named, "weight": share, "inputs": (named["inputs"] * share).T}
        first, second, third, last = decomposition.tensor_train(
            weighted, rank=[1, shape.parts, shape.heads, shape.inputs, 1]
        )
        return {"parts": first[0], "weight": second, "dims": third, "inputs": last[..., 0]}


def _product(factors: Mapping[str, Tensor], form: str) -> Tensor:
    """(projections, heads, d, n)"""
    if form == "tt":
        names, pattern = ["parts", "weight", "dims", "inputs"], "pa,ahb,bdr,rn->phdn"
    else:
        names = ["weight", "parts", "heads", "dims", "inputs"]
        pattern = "r,pr,hr,dr,rn->phdn" if form == "cp" else "abcr,pa,hb,dc,rn->phdn"
    return torch.einsum(pattern, *(factors[name] for name in names))
