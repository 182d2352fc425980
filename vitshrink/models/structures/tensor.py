"""Attention whose input projections are one tensor, (projection, head, head dimension, width), kept as its factors.

Several blocks may be stacked into one such tensor: it lies in the attention of the first, and serves those that follow.
"""

from dataclasses import asdict, dataclass, field, fields
from math import prod
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitshrink.errors import CheckpointError
from vitshrink.models.structures.attention import StructuredAttention, become, head_dimension, layout_of, linear
from vitshrink.models.structures.registry import read_entry, structure

PROJECTIONS = 3
"""Queries, keys and values: what reads the same input."""


class TensorProjection(nn.Module):
    """The factors of (3 · blocks, heads, d, n); every form ends in ``inputs`` (r, n), which reads the input first.

    ``tucker``: core (p, h, e, r) in ``weight``, a factor for each mode. ``cp``: weights (r,), a factor for each mode.
    ``tt`` (tensor-train): cores (3 · blocks, p), ``weight`` (p, heads, e), (e, d, r). To itself a block has three
    rows of ``parts``, and its biases.
    """

    def __init__(self, spec: "TensorForm", heads: int, head: int, inputs: int, *, bias: bool, **options: Any) -> None:
        super().__init__()
        self.form, self.blocks, self.sizes = spec.form, spec.blocks, (PROJECTIONS * spec.blocks, heads, head, inputs)
        shapes = spec.shapes(self.sizes)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **options)))
        self.register_parameter("bias", nn.Parameter(torch.empty(prod(self.sizes[:3]), **options)) if bias else None)

    def forward(self, x: Tensor, block: int = 0) -> tuple[Tensor, ...]:
        """Queries, keys and values of one of the blocks for x (batch, tokens, n), each (batch, tokens, heads · d)."""
        z = F.linear(x, self._part("inputs"))
        tokens, core = z.shape[0] * z.shape[1], self._core(block)
        # what is exported takes batches of any size, so that it cannot depend on them
        cheaper = not torch.compiler.is_exporting() and self._stepwise(tokens) < self._at_once(tokens)
        y = self._contract(z, core) if cheaper else F.linear(z, self._matrix(core))
        if isinstance(self.bias, Tensor):
            y = y + self.bias.view(self.blocks, -1)[block]
        return y.chunk(PROJECTIONS, -1)

    def matrix(self, block: int = 0) -> Tensor:
        """All factors but the last, multiplied: (3 · heads · d, r)."""
        return self._matrix(self._core(block))

    def _part(self, name: str) -> Tensor:
        return self.get_parameter(name)

    def _core(self, block: int) -> Tensor:
        """What the three projections of a block make of ``weight``; the smallest product, and so the first."""
        weight, own = self._part("weight"), self._part("parts")[PROJECTIONS * block : PROJECTIONS * (block + 1)]
        return own * weight if self.form == "cp" else torch.tensordot(own, weight, 1)

    def _matrix(self, core: Tensor) -> Tensor:
        if self.form == "tt":
            found = torch.einsum("phb,bdr->phdr", core, self._part("dims"))
        elif self.form == "cp":
            rest = torch.einsum("hr,dr->hdr", self._part("heads"), self._part("dims"))
            found = torch.einsum("pr,hdr->phdr", core, rest)
        else:
            inner = torch.einsum("pbcr,dc->pbdr", core, self._part("dims"))
            found = torch.einsum("pbdr,hb->phdr", inner, self._part("heads"))
        return found.flatten(0, 2)

    def _at_once(self, tokens: int) -> int:
        """Multiplications of all tokens with the product of the factors, which is made for it."""
        rank = self._part("inputs").shape[0]
        return (tokens + rank) * PROJECTIONS * prod(self.sizes[1:3]) * rank

    def _stepwise(self, tokens: int) -> int:
        """Multiplications of all tokens with one factor after the other."""
        _, heads, head, _ = self.sizes
        rank = self._part("inputs").shape[0]
        if self.form == "tt":
            b = self._part("weight").shape[2]
            return tokens * (rank * b * head + b * head * heads * PROJECTIONS)
        if self.form == "cp":  # there is no step that all projections share
            return (tokens + 1) * rank * PROJECTIONS * heads * head
        _, b, c, _ = self._part("weight").shape
        return tokens * PROJECTIONS * (rank * b * c + b * c * head + b * head * heads)

    def _contract(self, z: Tensor, core: Tensor) -> Tensor:
        if self.form == "tt":
            y = torch.einsum("ntr,bdr->ntbd", z, self._part("dims"))
            return torch.einsum("ntbd,phb->ntphd", y, core).flatten(2)
        if self.form == "cp":
            return F.linear(z, self._matrix(core))
        y = torch.einsum("ntr,pbcr->ntpbc", z, core)
        y = torch.einsum("ntpbc,dc->ntpbd", y, self._part("dims"))
        return torch.einsum("ntpbd,hb->ntphd", y, self._part("heads")).flatten(2)


class TensorAttention(StructuredAttention):
    """Attention of a tensor projection, in the place of that of the queries."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = getattr(self, self.layout.query)(x)
        return self.heads(query), self.heads(key), self.heads(value)


@dataclass(frozen=True)
class TensorForm:
    """What the descriptions of the three forms have in common; see ``TensorProjection``.

    Attributes:
        blocks: how many attentions in a row the tensor serves: that in which it lies, and those that follow it.
    """

    form: ClassVar[str]
    blocks: int = field(default=1, kw_only=True)

    @property
    def ranks(self) -> tuple[int, ...]:
        """In the order of the modes that have them."""
        return tuple(getattr(self, each.name) for each in fields(self) if each.name != "blocks")

    def to_dict(self) -> dict[str, Any]:
        return {name: number for name, number in asdict(self).items() if name != "blocks" or number > 1}

    @classmethod
    def from_dict(cls, entry: Any) -> Self:
        ranks = [each.name for each in fields(cls) if each.name != "blocks"]
        return cls(**read_entry(entry, ranks, optional=("blocks",)))

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
    form: ClassVar[str] = "tucker"

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
    form: ClassVar[str] = "cp"

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
    form: ClassVar[str] = "tt"

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
