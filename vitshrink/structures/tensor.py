"""Attention whose input projections are one tensor, (projection, head, head dimension, width), kept as its factors."""

from dataclasses import dataclass
from math import prod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitshrink.errors import CheckpointError
from vitshrink.structures.attention import (
    StructuredAttention,
    become,
    head_dimension,
    layout_of,
    linear,
    read_numbers,
)
from vitshrink.structures.registry import structure

PROJECTIONS = 3
"""Queries, keys and values: what reads the same input."""


class TensorProjection(nn.Module):
    """The factors of (3, heads, d, n); every form ends in ``inputs`` (r, n), which reads the input first.

    ``tucker``: core (p, h, e, r) in ``weight``, a factor for each mode. ``cp``: weights (r,), a factor for each mode.
    ``tt`` (tensor-train): cores (3, p), ``weight`` (p, heads, e), (e, d, r).
    """

    def __init__(self, spec: "TensorForm", heads: int, head: int, inputs: int, *, bias: bool, **options: Any) -> None:
        super().__init__()
        self.form, self.sizes = spec.form, (PROJECTIONS, heads, head, inputs)
        shapes = spec.shapes(self.sizes)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **options)))
        self.register_parameter("bias", nn.Parameter(torch.empty(prod(self.sizes[:3]), **options)) if bias else None)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of x (batch, tokens, n), each (batch, tokens, heads · d)."""
        z = F.linear(x, self.get_parameter("inputs"))
        tokens = z.shape[0] * z.shape[1]
        # what is exported takes batches of any size, so that it cannot depend on them
        cheaper = not torch.compiler.is_exporting() and self._stepwise(tokens) < self._at_once(tokens)
        y = self._contract(z) if cheaper else F.linear(z, self.matrix())
        if isinstance(self.bias, Tensor):
            y = y + self.bias
        return y.chunk(PROJECTIONS, -1)

    def matrix(self) -> Tensor:
        """All factors but the last, multiplied: (3 · heads · d, r)."""
        weight = self.get_parameter("weight")
        if self.form == "tt":
            found = torch.einsum("pa,ahb,bdr->phdr", self._part("parts"), weight, self._part("dims"))
        elif self.form == "cp":
            rest = torch.einsum("hr,dr->hdr", self._part("heads"), self._part("dims"))
            found = torch.einsum("pr,hdr->phdr", self._part("parts") * weight, rest)
        else:
            inner = torch.einsum("abcr,dc->abdr", weight, self._part("dims"))
            found = torch.einsum("pa,abdr,hb->phdr", self._part("parts"), inner, self._part("heads"))
        return found.flatten(0, 2)

    def _part(self, name: str) -> Tensor:
        return self.get_parameter(name)

    def _at_once(self, tokens: int) -> int:
        """Multiplications of all tokens with the product of the factors, which is made for it."""
        rank = self._part("inputs").shape[0]
        return (tokens + rank) * prod(self.sizes[:3]) * rank

    def _stepwise(self, tokens: int) -> int:
        """Multiplications of all tokens with one factor after the other."""
        parts, heads, head, _ = self.sizes
        rank = self._part("inputs").shape[0]
        if self.form == "tt":
            a, _, b = self.get_parameter("weight").shape
            return tokens * (rank * b * head + b * head * a * heads + a * parts * heads * head)
        if self.form == "cp":
            return (tokens + 1) * rank * prod(self.sizes[:3])  # there is no step that all projections share
        a, b, c, _ = self.get_parameter("weight").shape
        return tokens * (rank * a * b * c + a * b * c * head + a * b * head * heads + a * heads * head * parts)

    def _contract(self, z: Tensor) -> Tensor:
        weight = self.get_parameter("weight")
        if self.form == "tt":
            y = torch.einsum("ntr,bdr->ntbd", z, self._part("dims"))
            y = torch.einsum("ntbd,ahb->ntahd", y, weight)
        elif self.form == "cp":
            return F.linear(z, self.matrix())
        else:
            y = torch.einsum("ntr,abcr->ntabc", z, weight)
            y = torch.einsum("ntabc,dc->ntabd", y, self._part("dims"))
            y = torch.einsum("ntabd,hb->ntahd", y, self._part("heads"))
        return torch.einsum("ntahd,pa->ntphd", y, self._part("parts")).flatten(2)


class TensorAttention(StructuredAttention):
    """Attention of a tensor projection, in the place of that of the queries."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = getattr(self, self.layout.query)(x)
        return self.heads(query), self.heads(key), self.heads(value)


class TensorForm:
    """What the descriptions of the three forms have in common; see ``TensorProjection``."""

    form: str

    def shapes(self, sizes: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        """The parameters, by name."""
        raise NotImplementedError

    def fits(self, module: nn.Module) -> bool:
        layout = layout_of(module)
        if layout is None:
            return False
        query, key, value = (linear(module, name) for name in (layout.query, layout.key, layout.value))
        return query.weight.shape == key.weight.shape == value.weight.shape

    def build(self, module: nn.Module) -> nn.Module:
        layout, heads = layout_of(module), module.num_attention_heads
        assert layout is not None
        assert isinstance(heads, int)
        query = linear(module, layout.query)
        options: Any = {"device": query.weight.device, "dtype": query.weight.dtype}
        projection = TensorProjection(
            self, heads, head_dimension(module), query.in_features, bias=query.bias is not None, **options
        )
        built = become(module, TensorAttention, self)
        setattr(built, layout.query, projection)
        delattr(built, layout.key)
        delattr(built, layout.value)
        return built


def _within(form: str, ranks: dict[str, tuple[int, int]]) -> None:
    for name, (rank, size) in ranks.items():
        if rank > size:
            raise CheckpointError(f"{form}: the rank of {name}, {rank}, is above its size, {size}.")


@structure("tensor-tucker")
@dataclass(frozen=True)
class Tucker(TensorForm):
    """Ranks of the modes."""

    parts: int
    heads: int
    dims: int
    inputs: int
    form = "tucker"

    def to_dict(self) -> dict[str, Any]:
        return {"parts": self.parts, "heads": self.heads, "dims": self.dims, "inputs": self.inputs}

    @classmethod
    def from_dict(cls, entry: Any) -> Self:
        return cls(**read_numbers(entry, {"parts", "heads", "dims", "inputs"}))

    def shapes(self, sizes: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        ranks = (self.parts, self.heads, self.dims, self.inputs)
        names = ("parts", "heads", "dims", "inputs")
        _within("tucker", {name: (rank, size) for name, rank, size in zip(names, ranks, sizes, strict=True)})
        factors = {name: (size, rank) for name, rank, size in zip(names[:3], ranks[:3], sizes[:3], strict=True)}
        return {"weight": ranks, **factors, "inputs": (self.inputs, sizes[3])}


@structure("tensor-cp")
@dataclass(frozen=True)
class CP(TensorForm):
    """Number of rank-one terms."""

    rank: int
    form = "cp"

    def to_dict(self) -> dict[str, Any]:
        return {"rank": self.rank}

    @classmethod
    def from_dict(cls, entry: Any) -> Self:
        return cls(**read_numbers(entry, {"rank"}))

    def shapes(self, sizes: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        factors = {name: (size, self.rank) for name, size in zip(("parts", "heads", "dims"), sizes[:3], strict=True)}
        return {"weight": (self.rank,), **factors, "inputs": (self.rank, sizes[3])}


@structure("tensor-train")
@dataclass(frozen=True)
class Train(TensorForm):
    """Ranks between the modes."""

    parts: int
    heads: int
    inputs: int
    form = "tt"

    def to_dict(self) -> dict[str, Any]:
        return {"parts": self.parts, "heads": self.heads, "inputs": self.inputs}

    @classmethod
    def from_dict(cls, entry: Any) -> Self:
        return cls(**read_numbers(entry, {"parts", "heads", "inputs"}))

    def shapes(self, sizes: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        parts, heads, head, width = sizes
        ranks = {"parts": (self.parts, parts), "heads": (self.heads, self.parts * heads)}
        _within("tensor-train", ranks | {"inputs": (self.inputs, min(self.heads * head, width))})
        return {
            "weight": (self.parts, heads, self.heads),
            "parts": (parts, self.parts),
            "dims": (self.heads, head, self.inputs),
            "inputs": (self.inputs, width),
        }
