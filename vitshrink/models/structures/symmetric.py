"""Symmetric attention: one projection serves queries and keys."""

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitshrink.errors import CheckpointError
from vitshrink.models.structures.attention import StructuredAttention, become, head_dimension, layout_of, linear
from vitshrink.models.structures.registry import read_entry, structure


class SharedProjection(nn.Module):
    """The factors Lᵀ (r, n) of all heads, upper triangular in their first r columns: r(n−r) + r(r+1)/2 numbers a head.

    A rotation of a head changes no product of its queries and keys, so that nothing is lost by the triangular form.
    """

    def __init__(self, inputs: int, heads: int, rank: int, *, bias: bool, **options: Any) -> None:
        super().__init__()
        self.inputs, self.heads, self.rank = inputs, heads, rank
        self.weight = nn.Parameter(torch.empty(heads * rank, inputs - rank, **options))
        self.core = nn.Parameter(torch.empty(heads, rank * (rank + 1) // 2, **options))
        self.bias = nn.Parameter(torch.empty(heads * rank, **options)) if bias else None

    def matrix(self) -> Tensor:
        """All of Lᵀ, (heads · r, n)."""
        rows, columns = torch.triu_indices(self.rank, self.rank, device=self.core.device)
        triangle = self.core.new_zeros(self.heads, self.rank, self.rank)
        triangle[:, rows, columns] = self.core
        return torch.cat([triangle.flatten(0, 1), self.weight], 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of x (batch, tokens, n), each (batch, tokens, heads · r); only queries have a bias."""
        key = F.linear(x, self.matrix())
        return (key if self.bias is None else key + self.bias), key

    def extra_repr(self) -> str:
        return f"{self.inputs}, heads={self.heads}, rank={self.rank}, bias={self.bias is not None}"


class SymmetricAttention(StructuredAttention):
    """Attention of a shared projection, in the place of that of the queries, and the values of the dense model."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key = getattr(self, self.layout.query)(x)
        return self.heads(query), self.heads(key), self.heads(getattr(self, self.layout.value)(x))


@structure("symmetric")
@dataclass(frozen=True)
class Symmetric:
    """Rank of the positive semidefinite form of every head."""

    rank: int

    def to_dict(self) -> dict[str, Any]:
        return {"rank": self.rank}

    @classmethod
    def from_dict(cls, entry: Any) -> Self:
        return cls(**read_entry(entry, ("rank",)))

    def fits(self, module: nn.Module) -> bool:
        return layout_of(module) is not None

    def build(self, module: nn.Module) -> nn.Module:
        dimension, layout, heads = head_dimension(module), layout_of(module), module.num_attention_heads
        assert layout is not None
        assert isinstance(heads, int)
        if self.rank > dimension:
            raise CheckpointError(f"rank {self.rank} is above the head dimension, {dimension}.")
        query = linear(module, layout.query)
        built = become(module, SymmetricAttention, self)
        options: Any = {"device": query.weight.device, "dtype": query.weight.dtype}
        projection = SharedProjection(query.in_features, heads, self.rank, bias=query.bias is not None, **options)
        setattr(built, layout.query, projection)
        delattr(built, layout.key)
        return built
