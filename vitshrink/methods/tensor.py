"""Tensor decompositions of an attention: what its projections, heads and dimensions have in common."""

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vitshrink.errors import UsageError
from vitshrink.methods.attention import ATTENTION, AttentionWeights, Dimensions, Part, attention_method
from vitshrink.models.structures import Structure
from vitshrink.models.structures.following import Following
from vitshrink.models.structures.tensor import CP, PROJECTIONS, Train, Tucker
from vitshrink.models.structures.tensor_output import TensorOutputSpec
from vitshrink.statistics.algebra import full_svd, square_roots

FORMS = ("tucker", "cp", "tt")
STEPS = 8
"""Ranks on offer for the largest part: each is a decomposition of its own."""


def form_at(dimensions: Dimensions, rank: int, form: str, blocks: int = 1) -> Tucker | CP | Train:
    """The form whose rank of the width is ``rank``; the head dimension, or the heads, are cut in proportion."""
    heads, head, width, parts = dimensions.heads, dimensions.head, dimensions.width, PROJECTIONS * blocks
    if form == "cp":
        return CP(rank, blocks=blocks)
    if form == "tt":
        own = parts * heads
        return Train(parts, min(own, max(-(-own * rank // width), -(-rank // head))), rank, blocks=blocks)
    return Tucker(parts, heads, max(1, -(-head * rank // width)), rank, blocks=blocks)


def output_at(dimensions: Dimensions, rank: int, form: str) -> TensorOutputSpec:
    """The form of the output projection whose rank of the width is ``rank``."""
    heads, head, width = dimensions.heads, dimensions.head, dimensions.width
    dims = min(head, max(-(-head * rank // width), -(-rank // heads)))
    return TensorOutputSpec(form, heads, rank, *{"tucker": (dims, heads), "cp": (), "tt": (dims,)}[form])


def structures(
    dimensions: Dimensions, ranks: Mapping[str, int], form: str = "tucker", iterations: int = 5, blocks: int = 1
) -> dict[str, Structure]:
    found: dict[str, Structure] = {}
    if "qkv" in ranks:
        found[ATTENTION] = form_at(dimensions, ranks["qkv"], form, blocks)
    if "o" in ranks:
        found["output"] = output_at(dimensions, ranks["o"], form)
    return found


def steps(dimensions: Dimensions, form: str = "tucker", iterations: int = 5, blocks: int = 1) -> Sequence[int]:
    if form not in FORMS:
        raise UsageError(f"--option form={form}: unknown. Available: {', '.join(FORMS)}.")
    for name, number in (("iterations", iterations), ("blocks", blocks)):
        if number < 1:
            raise UsageError(f"--option {name}={number}: must be at least 1.")
    if form != "cp":
        return sorted({max(1, dimensions.width * step // STEPS) for step in range(1, STEPS + (form == "tucker"))})
    # a term costs more than a rank, but there may be more of them than channels
    heads, head, width = dimensions.heads, dimensions.head, dimensions.width
    parts = PROJECTIONS * blocks
    most = parts * heads * head * width // (parts + heads + head + width)
    outputs = heads * head * width // (1 + heads + head + width)
    found = {most * step // STEPS for step in range(1, STEPS + 1)}
    found |= {2 * outputs * step // STEPS for step in range(1, STEPS // 2 + 1)}
    return sorted(max(1, rank) for rank in found)


@attention_method(
    "tensor",
    parts={"qkv": ("query", "key", "value"), "o": ("output",)},
    structures=structures,
    ranks=steps,
    extra="tensor",
    stacked={"qkv": Following},
)
def tensor(
    attention: AttentionWeights,
    ranks: Sequence[int],
    parts: Sequence[str],
    *,
    form: str = "tucker",
    iterations: int = 5,
    blocks: int = 1,
) -> dict[str, Part]:
    """Tucker (HOOI), CP or tensor-train of the weights as tensors over heads and head dimensions, by tensorly.

    De Lathauwer et al. 2000 (HOOI), Carroll and Chang 1970 (CP), Oseledets 2011 (tensor-train). Queries, keys and
    values are one tensor (3, heads, head dimension, width), the output projection another (heads, head dimension,
    width): the former reads the width, the latter writes it. ``loss`` is the error of the outputs. It is also what is
    approximated where the metric is one of a single mode: C^½, the covariance of the inputs, weights the width that
    is read. The inputs of the output projection have their covariance over heads and dimensions together; its nearest
    Kronecker product (Van Loan and Pitsianis 1993) weights these two modes. Biases absorb what the mean of the inputs
    loses. Only the rank of the width is chosen, the others follow from it. Factors of two ranks are not nested: eight
    or so are tried.

    With ``blocks``, queries, keys and values of so many blocks in a row are one tensor (3 · blocks, heads, head
    dimension, width), whose factors are stored once. It has one metric, the mean of the blocks' covariances; ``loss``
    is the error of each block's outputs on its own inputs all the same.
    """
    found = {}
    if "qkv" in parts:
        found["qkv"] = _inputs(attention, ranks, form, iterations)
    if "o" in parts:
        found["o"] = _outputs(attention, ranks, form, iterations)
    return found


def _inputs(attention: AttentionWeights, ranks: Sequence[int], form: str, iterations: int) -> Part:
    stack, roles = (attention, *attention.following), ("query", "key", "value")
    weights = torch.cat([each.by_head(role)[None] for each in stack for role in roles])
    covariances = torch.stack([each.covariance("query") for each in stack])
    root, inverse = square_roots(covariances.mean(0))
    weighted = weights @ root

    def energy(matrices: Tensor) -> Tensor:
        own = matrices.view(len(stack), -1, matrices.shape[-1])
        return (own @ covariances * own).sum()

    found, errors = {}, {}
    for rank in ranks:
        shape = form_at(attention.dimensions, rank, form, len(stack))
        modes = ("parts", "weight" if form == "tt" else "heads", "dims", "inputs")
        factors = _decompose(weighted, form, modes, shape.ranks, iterations)
        found[rank] = factors | {"inputs": factors["inputs"].T @ inverse}
        errors[rank] = energy(weights - _product(found[rank], form))
    means = torch.stack([each.mean("query") for each in stack])
    bias = torch.cat([each.biases[role] for each in stack for role in roles])

    def tensors(rank: int) -> dict[str, dict[str, Tensor]]:
        lost = (weights - _product(found[rank], form)).view(len(stack), -1, means.shape[-1]) @ means[..., None]
        return {"query": {**found[rank], "bias": bias + lost.flatten()}}

    return Part(_losses(energy(weights), errors), tensors)


def _outputs(attention: AttentionWeights, ranks: Sequence[int], form: str, iterations: int) -> Part:
    weights = attention.by_head("output").mT  # (heads, d, m)
    matrix, covariance, mean = attention.weights["output"], attention.covariance("output"), attention.mean("output")
    between, within = nearest_kronecker(covariance, attention.dimensions.heads)
    (over_heads, heads_back), (over_dims, dims_back) = square_roots(between), square_roots(within)
    weighted = torch.einsum("gh,hdm,de->gem", over_heads, weights, over_dims)
    found, errors = {}, {}
    for rank in ranks:
        shape = output_at(attention.dimensions, rank, form)
        stored = shape.shapes(matrix.shape[1], matrix.shape[0])
        if sum(math.prod(each) for each in stored.values()) >= matrix.numel():
            continue
        train = form == "tt"  # from the dimensions over the heads to the width
        modes = ("dims", "weight", "outputs") if train else ("heads", "dims", "outputs")
        tensor = weighted.transpose(0, 1) if train else weighted
        factors = _decompose(tensor, form, modes, shape.ranks, iterations)
        factors["dims"] = dims_back @ factors["dims"]
        if train:  # the heads are within the middle core
            factors["weight"] = torch.einsum("hg,cgr->chr", heads_back, factors["weight"])
        else:
            factors["heads"] = heads_back @ factors["heads"]
        lost = matrix - _output_matrix(factors, form)
        found[rank], errors[rank] = (factors, lost @ mean), (lost @ covariance * lost).sum()

    def tensors(rank: int) -> dict[str, dict[str, Tensor]]:
        factors, shift = found[rank]
        return {"output": {**factors, "bias": attention.biases["output"] + shift}}

    return Part(_losses((matrix @ covariance * matrix).sum(), errors), tensors)


def nearest_kronecker(matrix: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Positive semidefinite A (heads, heads) and B (d, d) whose Kronecker product is nearest to ``matrix``.

    Van Loan and Pitsianis, "Approximation with Kronecker products", 1993.
    """
    blocks = matrix.reshape(heads, -1, heads, matrix.shape[0] // heads).permute(0, 2, 1, 3)
    U, S, Vh = full_svd(blocks.reshape(heads * heads, -1))
    sign = torch.sign(U[:, 0].view(heads, heads).diagonal().sum())
    A, B = sign * U[:, 0].view(heads, heads) * S[0].sqrt(), sign * Vh[0].view(blocks.shape[2:]) * S[0].sqrt()
    return (A + A.mT) / 2, (B + B.mT) / 2


def _losses(energy: Tensor, errors: Mapping[int, Tensor]) -> Tensor:
    """By rank, from 0; a rank that was not tried loses what the next lower one does."""
    loss = energy.expand(max(errors, default=0) + 1).clone()
    for rank in sorted(errors):
        loss[rank:] = torch.minimum(loss[rank], errors[rank])
    return loss


def _decompose(
    tensor: Tensor, form: str, names: Sequence[str], ranks: Sequence[int], iterations: int
) -> dict[str, Tensor]:
    """By tensorly: a factor (size, rank) for every mode under its name, and in ``weight`` what joins them.

    The cores of a tensor-train are named in their order; the first and the last are the factors of modes.
    """
    tensorly: Any = importlib.import_module("tensorly")
    decomposition: Any = importlib.import_module("tensorly.decomposition")
    with tensorly.backend_context("pytorch"):
        if form == "tt":
            first, *cores, last = decomposition.tensor_train(tensor, rank=[1, *ranks, 1])
            return dict(zip(names, (first[0], *cores, last[..., 0].T), strict=True))
        if form == "tucker":
            weight, factors = decomposition.tucker(tensor, rank=list(ranks), n_iter_max=iterations)
        else:
            terms, factors = decomposition.parafac(
                tensor, *ranks, n_iter_max=4 * iterations, init="random", random_state=0, normalize_factors=True
            )
            weight = terms.sqrt()  # half of each term with the last factor: none is large
            factors[-1] = factors[-1] * weight
    return {"weight": weight, **dict(zip(names, factors, strict=True))}


def _output_matrix(factors: Mapping[str, Tensor], form: str) -> Tensor:
    """(m, heads · d)"""
    names = ["weight", "dims", "outputs"] if form == "tt" else ["weight", "heads", "dims", "outputs"]
    pattern = {"tucker": "bcr,hb,dc,mr->mhd", "cp": "r,hr,dr,mr->mhd", "tt": "chr,dc,mr->mhd"}[form]
    return torch.einsum(pattern, *(factors[name] for name in names)).flatten(1)


def _product(factors: Mapping[str, Tensor], form: str) -> Tensor:
    """(projections, heads, d, n)"""
    if form == "tt":
        names, pattern = ["parts", "weight", "dims", "inputs"], "pa,ahb,bdr,rn->phdn"
    else:
        names = ["weight", "parts", "heads", "dims", "inputs"]
        pattern = "r,pr,hr,dr,rn->phdn" if form == "cp" else "abcr,pa,hb,dc,rn->phdn"
    return torch.einsum(pattern, *(factors[name] for name in names))
