"""Attention whose queries, keys and values come from a tensor that lies in the attention of an earlier block."""

from dataclasses import asdict, dataclass
from typing import Any, Self

from torch import Tensor, nn

from vitshrink.errors import CheckpointError
from vitshrink.models.structures.attention import StructuredAttention, become, layout_of
from vitshrink.models.structures.registry import structure, unreadable
from vitshrink.models.structures.tensor import TensorAttention, TensorProjection


class FollowingAttention(StructuredAttention):
    """Reads the factors of another attention, which alone has them among its parameters: they are stored once."""

    source: TensorAttention
    spec: "Following"

    def borrowed(self) -> TensorProjection:
        """Where the factors lie."""
        projection: TensorProjection = getattr(self.source, self.source.layout.query)
        return projection

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.borrowed()(x, self.spec.block)
        return self.heads(query), self.heads(key), self.heads(value)


@structure("tensor-following")
@dataclass(frozen=True)
class Following:
    """Name of the attention that has the tensor, relative to the base model, and which of its blocks this one is."""

    source: str
    block: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: Any) -> Self:
        known = isinstance(entry, dict) and set(entry) == {"source", "block"}
        if not known or type(entry["block"]) is not int or entry["block"] < 1 or not isinstance(entry["source"], str):
            raise unreadable(entry, "a source and the number of a block")
        return cls(**entry)

    def fits(self, module: nn.Module) -> bool:
        return layout_of(module) is not None

    def build(self, module: nn.Module) -> nn.Module:
        built = become(module, FollowingAttention, self)
        layout = layout_of(module, nn.Module)
        assert layout is not None
        for name in (layout.query, layout.key, layout.value):
            delattr(built, name)
        return built

    def finds_its_source(self, module: nn.Module, base: nn.Module) -> bool:
        return dict(base.named_modules()).get(self.source) is getattr(module, "source", None)

    def connect(self, module: nn.Module, base: nn.Module) -> None:
        """Raises CheckpointError where the source has no such block."""
        source = dict(base.named_modules()).get(self.source)
        found = getattr(source, source.layout.query) if isinstance(source, TensorAttention) else None
        if not isinstance(found, TensorProjection) or self.block >= found.blocks:
            raise CheckpointError(
                f"an attention uses block {self.block} of the tensor in {self.source!r}, which does not exist: "
                "the checkpoint is damaged."
            )
        # past nn.Module, which would make the source a part of this module, and its parameters ones of both
        object.__setattr__(module, "source", source)


def borrowed_parameters(module: nn.Module) -> list[nn.Parameter]:
    """What attentions inside ``module`` read of others, which may lie outside it."""
    following = [each for each in module.modules() if isinstance(each, FollowingAttention)]
    return [parameter for each in following for parameter in each.borrowed().parameters()]
