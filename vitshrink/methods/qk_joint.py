"""Queries and keys together: what an attention map is made of, with fewer dimensions in every head."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vitshrink.methods.attention import ATTENTION, AttentionWeights, Dimensions, Part, attention_method, tail
from vitshrink.models.structures import Structure
from vitshrink.models.structures.headwise import Headwise
from vitshrink.statistics.algebra import square_roots


def structures(_dimensions: Dimensions, ranks: Mapping[str, int]) -> dict[str, Structure]:
    return {ATTENTION: Headwise(qk=ranks["qk"])}


@attention_method("qk-joint", parts={"qk": ("query", "key")}, structures=structures)
def qk_joint(attention: AttentionWeights, ranks: Sequence[int], parts: Sequence[str]) -> dict[str, Part]:
    """Best rank-r factors of W_qᵀW_k in every head, in the metric of the activations: smaller heads, no extra product.

    What counts of a score qᵢᵀkⱼ is how it differs from key to key: the softmax cancels the rest, the key bias with it.
    So the error is E(qᵢᵀ(kⱼ − k̄) − q̂ᵢᵀ(k̂ⱼ − k̄̂))² over independent tokens i and j, and with A = E[q qᵀ] (query bias
    included) and B = Cov(k) the optimum of rank r is the truncated SVD A^½ B^½ = U Σ Vᵀ, (d, d) (Eckart and Young,
    1936): q̂ = Σ^½ Uᵀ A^-½ q, k̂ = Σ^½ Vᵀ B^-½ k. Both biases are handled exactly. The scale of the softmax stays.
    """
    W_q, W_k, bias = attention.by_head("query"), attention.by_head("key"), attention.bias_by_head("query")
    to_query, to_key, energies = matches(attention)

    def tensors(rank: int) -> dict[str, dict[str, Tensor]]:
        P, Q = to_query[:, :rank], to_key[:, :rank]
        return {
            "query": {"weight": (P @ W_q).flatten(0, 1), "bias": (P @ bias[..., None]).flatten()},
            "key": {"weight": (Q @ W_k).flatten(0, 1)},
        }

    return {"qk": Part(tail(energies.sum(0)), tensors)}


def matches(attention: AttentionWeights) -> tuple[Tensor, Tensor, Tensor]:
    """P and Q (heads, d, d), of which the first r rows make q̂ of q and k̂ of k, and the energies (heads, d) they add."""
    W_q, W_k = attention.by_head("query"), attention.by_head("key")
    bias, C, mean = attention.bias_by_head("query"), attention.covariance("query"), attention.mean("query")
    queries, keys, values = [], [], []
    for q, k, b in zip(W_q, W_k, bias, strict=True):
        average = q @ mean + b
        A, A_inverse = square_roots(q @ C @ q.T + torch.outer(average, average))
        B, B_inverse = square_roots(k @ C @ k.T)
        U, S, Vh = torch.linalg.svd(A @ B)
        root = S.sqrt()[:, None]
        queries.append(root * U.T @ A_inverse)
        keys.append(root * Vh @ B_inverse)
        values.append(S.square())
    return torch.stack(queries), torch.stack(keys), torch.stack(values)
