"""A linear layer that reads fewer inputs, because what feeds it has fewer outputs."""

from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from vitshrink.models.structures.attention import resized
from vitshrink.models.structures.registry import read_entry, structure


class NarrowLinear(nn.Linear):
    """``nn.Linear`` that says how many inputs it has."""

    spec: "Narrow"


@structure("narrow")
@dataclass(frozen=True)
class Narrow:
    """Number of inputs of an output projection whose values have smaller heads."""

    inputs: int

    def to_dict(self) -> dict[str, Any]:
        return {"inputs": self.inputs}

    @classmethod
    def from_dict(cls, entry: Any) -> Self:
        return cls(**read_entry(entry, ("inputs",)))

    def fits(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and self.inputs < module.in_features

    def build(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, nn.Linear)
        layer = resized(module, inputs=self.inputs, bias=module.bias is not None)
        layer.__class__ = NarrowLinear
        layer.spec = self  # type: ignore[assignment]
        return layer
