"""Smaller heads and fewer of them, at least loss at the model's output."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitshrink.methods.attention import AttentionWeights, Dimensions
from vitshrink.methods.narrowing import Elimination, eliminated, one_head, one_of_each, output_root, positive
from vitshrink.methods.qk_joint import matches
from vitshrink.statistics.algebra import eigh


@dataclass(frozen=True, eq=False)
class Values:
    """What heads carry: the values s (n,) that the output projection reads, and z = ``basis`` s, by a basis of each.

    Attributes:
        basis: (n, n), block by block.
        dimensions: inputs z, from the dearest to the cheapest; the first ``heads · r`` of them are ``r`` of each head.
        heads: inputs s, whole heads from the dearest to the cheapest.
    """

    basis: Tensor
    dimensions: Elimination
    heads: Elimination

    def kept(self, heads: int, dimensions: Dimensions) -> Tensor:
        """The numbers (heads,) of those that stay, ascending."""
        return (self.heads.order[: heads * dimensions.head : dimensions.head] // dimensions.head).sort().values

    def tensors(self, attention: AttentionWeights, heads: Tensor, size: int) -> dict[str, dict[str, Tensor]]:
        """For values of ``size`` dimensions of these heads, and the projection of what they carry.

        With z = E s what is carried, the projection is W C Eᵀ (E C Eᵀ)⁻¹. The rows of an attention map add up to one,
        so that the bias of the values and all means move into that of the output, exactly.
        """
        W, bias, mean = attention.weights["output"], attention.biases["output"], attention.mean("output")
        E = self._encoder(heads, size, attention.dimensions)
        C = positive(attention.covariance("output"))
        fitted = torch.linalg.solve(E @ C @ E.T, E @ C @ W.T).T
        shift = W @ mean - fitted @ (E @ (mean - attention.biases["value"]))
        return {
            "value": {"weight": E @ attention.weights["value"]},
            "output": {"weight": fitted, "bias": bias + shift},
        }

    def _encoder(self, heads: Tensor, size: int, dimensions: Dimensions) -> Tensor:
        """E (heads · size, n): all of a head as it is, or the dearest dimensions of it in the basis."""
        head, order = dimensions.head, self.dimensions.order
        if size == head:
            inputs = (heads[:, None] * head + torch.arange(head, device=heads.device)).flatten()
            return torch.eye(len(self.basis)).to(self.basis)[inputs]
        rows = [order[order // head == number][:size].sort().values for number in heads.tolist()]
        return self.basis[torch.cat(rows)]


@torch.no_grad()
def values(attention: AttentionWeights) -> Values:
    """Dimensions of values, and heads; what goes is predicted from what stays in all heads.

    In the basis of a head, that of the singular vectors of R W_h S_h^½ with S_h the covariance of its values,
    dimensions are uncorrelated and act in orthogonal directions: of a head alone, those of the largest values are best
    kept.
    """
    weight, stats = attention.weights["output"], attention.stats["output"]
    C, root, head = positive(stats.covariance(centered=True)), output_root(weight, stats), attention.dimensions.head
    basis, inverse = torch.zeros_like(C), torch.zeros_like(C)
    for start in range(0, len(C), head):
        own = slice(start, start + head)
        spread, vectors = eigh(C[own, own])
        half = vectors * spread.sqrt()
        acting = root @ weight[:, own] @ half
        _, V = eigh(acting.T @ acting)
        basis[own, own], inverse[own, own] = V.T @ (vectors / spread.sqrt()).T, half @ V
    return Values(
        basis,
        eliminated(weight @ inverse, basis @ C @ basis.T, root, one_of_each(head)),
        eliminated(weight, C, root, one_head(head)),
    )


@dataclass(frozen=True, eq=False)
class Matches:
    """Where queries meet keys: the first r rows of ``query[h]`` and ``key[h]`` make q̂ of q and k̂ of k.

    Attributes:
        query, key: (heads, d, d); keyᵀ query is the identity.
        loss: (heads, d), what the direction takes away of the loss in the metric of the curvature at the queries.
    """

    query: Tensor
    key: Tensor
    loss: Tensor

    def tensors(self, attention: AttentionWeights, heads: Tensor, size: int) -> dict[str, dict[str, Tensor]]:
        """For queries and keys of ``size`` dimensions of these heads; the softmax cancels the bias of the keys."""
        query, key = (attention.by_head(role)[heads] for role in ("query", "key"))
        bias = attention.bias_by_head("query")[heads]
        if size < attention.dimensions.head:
            P, Q = self.query[heads, :size], self.key[heads, :size]
            query, key, bias = P @ query, Q @ key, (P @ bias[..., None])[..., 0]
        return {
            "query": {"weight": query.flatten(0, 1), "bias": bias.flatten()},
            "key": {"weight": key.flatten(0, 1)},
        }


@torch.no_grad()
def matched(attention: AttentionWeights) -> Matches:
    """Directions of every head by what they add to its scores, as in ``qk-joint``."""
    query, key, _ = matches(attention)
    W, bias = attention.by_head("query"), attention.bias_by_head("query")
    root = output_root(attention.weights["query"], attention.stats["query"])
    ups = root.reshape(len(root), *query.shape[:2]).transpose(0, 1) @ key.transpose(1, 2)
    downs = query @ W
    mean = (downs @ attention.mean("query")) + (query @ bias[..., None])[..., 0]
    spread = ((downs @ attention.covariance("query")) * downs).sum(-1) + mean.square()
    return Matches(query, key, ups.square().sum(1) * spread)
