"""Attention with smaller heads: fewer dimensions in which queries meet keys, and in which values are carried."""

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from vitshrink.errors import CheckpointError
from vitshrink.models.structures.attention import (
    StructuredAttention,
    become,
    head_dimension,
    layout_of,
    linear,
    resized,
)
from vitshrink.models.structures.registry import read_entry, structure


class HeadwiseAttention(StructuredAttention):
    """The three projections of the dense attention, some of them with fewer outputs."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (
            self.heads(getattr(self, name)(x)) for name in (self.layout.query, self.layout.key, self.layout.value)
        )
        return query, key, value


@structure("headwise")
@dataclass(frozen=True)
class Headwise:
    """Head dimensions of queries and keys (``qk``) and of values (``value``); None: the dense model's.

    Smaller queries and keys need no key bias, which the softmax cancels; smaller values none, because the rows of an
    attention map add up to one and the output bias takes it.
    """

    qk: int | None = None
    value: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {name: rank for name, rank in (("qk", self.qk), ("value", self.value)) if rank is not None}

    @classmethod
    def from_dict(cls, entry: Any) -> Self:
        numbers = read_entry(entry, (), optional=("qk", "value"))
        return cls(numbers.get("qk"), numbers.get("value"))

    def fits(self, module: nn.Module) -> bool:
        return layout_of(module) is not None

    def build(self, module: nn.Module) -> nn.Module:
        dimension = head_dimension(module)
        for name, rank in self.to_dict().items():
            if rank >= dimension:
                raise CheckpointError(f"{name} {rank} is not below the head dimension, {dimension}.")
        built = become(module, HeadwiseAttention, self)
        layout, heads = layout_of(module), module.num_attention_heads
        assert layout is not None
        assert isinstance(heads, int)
        if self.qk is not None:
            query, key = linear(module, layout.query), linear(module, layout.key)
            setattr(built, layout.query, resized(query, outputs=heads * self.qk, bias=query.bias is not None))
            setattr(built, layout.key, resized(key, outputs=heads * self.qk, bias=False))
        if self.value is not None:
            setattr(built, layout.value, resized(linear(module, layout.value), outputs=heads * self.value, bias=False))
        return built
