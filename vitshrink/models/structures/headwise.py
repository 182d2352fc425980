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
    """Head dimensions of queries and keys (``qk``) and of values (``value``), and how many heads there are; None: the
    dense model's.

    Smaller queries and keys need no key bias, which the softmax cancels; smaller values none, because the rows of an
    attention map add up to one and the output bias takes it. Nor do the keys and values of fewer heads.
    """

    qk: int | None = None
    value: int | None = None
    heads: int | None = None

    def to_dict(self) -> dict[str, Any]:
        sizes = (("qk", self.qk), ("value", self.value), ("heads", self.heads))
        return {name: size for name, size in sizes if size is not None}

    @classmethod
    def from_dict(cls, entry: Any) -> Self:
        return cls(**read_entry(entry, (), optional=("qk", "value", "heads")))

    def fits(self, module: nn.Module) -> bool:
        return layout_of(module) is not None

    def build(self, module: nn.Module) -> nn.Module:
        dimension, layout, heads = head_dimension(module), layout_of(module), module.num_attention_heads
        assert layout is not None
        assert isinstance(heads, int)
        for name, size in (("qk", self.qk), ("value", self.value)):
            if size is not None and size >= dimension:
                raise CheckpointError(f"{name} {size} is not below the head dimension, {dimension}.")
        if self.heads is not None and self.heads >= heads:
            raise CheckpointError(f"{self.heads} heads are not fewer than the {heads} of the dense model.")
        built = become(module, HeadwiseAttention, self)
        kept = heads if self.heads is None else self.heads
        built.num_attention_heads = kept  # type: ignore[assignment]
        if self.qk is not None or self.heads is not None:
            outputs = kept * (dimension if self.qk is None else self.qk)
            query, key = linear(module, layout.query), linear(module, layout.key)
            setattr(built, layout.query, resized(query, outputs=outputs, bias=query.bias is not None))
            setattr(built, layout.key, resized(key, outputs=outputs, bias=False))
        if self.value is not None or self.heads is not None:
            outputs = kept * (dimension if self.value is None else self.value)
            setattr(built, layout.value, resized(linear(module, layout.value), outputs=outputs, bias=False))
        return built
