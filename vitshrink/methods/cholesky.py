"""Symmetric attention: the form of every head becomes positive semidefinite, and one projection serves both sides."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vitshrink.methods.attention import ATTENTION, AttentionWeights, Dimensions, Part, attention_method
from vitshrink.models.structures import Structure
from vitshrink.models.structures.symmetric import Symmetric
from vitshrink.statistics.algebra import eigh, square_roots


def structures(_dimensions: Dimensions, ranks: Mapping[str, int]) -> dict[str, Structure]:
    return {ATTENTION: Symmetric(ranks["qk"])}


def up_to_head_dimension(dimensions: Dimensions) -> Sequence[int]:
    return range(1, dimensions.head + 1)


@attention_method("cholesky", parts={"qk": ("query", "key")}, structures=structures, ranks=up_to_head_dimension)
def cholesky(attention: AttentionWeights, ranks: Sequence[int], parts: Sequence[str]) -> dict[str, Part]:
    """Nearest symmetric positive semidefinite form L Lᵀ of W_qᵀW_k in every head, in the metric of the activations.

    With C the covariance of the inputs, the nearest form of rank r to C^½ W_qᵀW_k C^½ in the Frobenius norm has the r
    largest positive eigenvalues of its symmetric part (Higham 1988, Linear Algebra Appl. 103); these are those of a
    (2d, 2d) matrix in the coordinates of the head's queries and keys. Lᵀ (r, n) is then rotated until its first r
    columns are triangular, by a QR decomposition: the pivoted Cholesky factor without the squared condition number. Of
    the biases, that of the keys cancels in the softmax; what a key scores by itself, (W_q μ + b_q)ᵀ k, is fitted by
    least squares within the shared projection, and its error is part of ``loss``.
    """
    W_q, W_k = attention.by_head("query"), attention.by_head("key")
    biases, C, mean = attention.bias_by_head("query"), attention.covariance("query"), attention.mean("query")
    factors, shifts, kept, total = [], [], [], C.new_zeros(())
    d = attention.dimensions.head
    for q, k, b in zip(W_q, W_k, biases, strict=True):
        both = torch.cat([q, k])
        T, T_inverse = square_roots(both @ C @ both.T)
        values, V = eigh(T[:, :d] @ T[d:])  # eigh takes the symmetric part, and cuts off what is negative
        values, V = values[:d], V[:, :d]
        average = q @ mean + b
        own = V.T @ T[:, d:] @ average * (values > 1e-12 * values[0])
        factors.append(values.sqrt()[:, None] * (V.T @ T_inverse @ both))
        shifts.append(own / values.sqrt().clamp_min(1e-150))
        kept.append(values.square() + own.square())
        B = k @ C @ k.T
        total = total + (q @ C @ q.T * B).sum() + average @ B @ average
    L, c = torch.stack(factors), torch.stack(shifts)

    def tensors(rank: int) -> dict[str, dict[str, Tensor]]:
        rotation, _ = torch.linalg.qr(L[:, :rank, :rank])
        rotated = rotation.mT @ L[:, :rank]
        rows, columns = torch.triu_indices(rank, rank, device=L.device)
        bias = (rotation.mT @ c[:, :rank, None])[..., 0] - rotated @ mean
        return {
            "query": {
                "weight": rotated[:, :, rank:].flatten(0, 1),
                "core": rotated[:, rows, columns],
                "bias": bias.flatten(),
            }
        }

    energies = torch.stack(kept).sum(0)
    loss = total - torch.cat([energies.new_zeros(1), energies.cumsum(0)])
    return {"qk": Part(loss.clamp_min(0), tensors)}
