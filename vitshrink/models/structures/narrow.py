"""A linear layer with fewer inputs, because what feeds it has fewer outputs, or with fewer outputs."""

from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from vitshrink.models.structures.attention import resized
from vitshrink.models.structures.registry import read_entry, structure, unreadable


class NarrowLinear(nn.Linear):
    """``nn.Linear`` that says how many inputs or outputs it has."""

    spec: "Narrow"


@structure("narrow")
@dataclass(frozen=True)
class Narrow:
    """Number of inputs, of an output projection whose values have smaller heads, or of outputs; None: the dense one's.

    An MLP with fewer neurons has both: outputs of its first layer, inputs of its second.
    """

    inputs: int | None = None
    outputs: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {name: size for name, size in (("inputs", self.inputs), ("outputs", self.outputs)) if size is not None}

    @classmethod
    def from_dict(cls, entry: Any) -> Self:
        numbers = read_entry(entry, (), optional=("inputs", "outputs"))
        if not numbers:
            raise unreadable(entry, "a number of inputs or outputs")
        return cls(**numbers)

    def fits(self, module: nn.Module) -> bool:
        return (
            isinstance(module, nn.Linear)
            and (self.inputs is None or self.inputs < module.in_features)
            and (self.outputs is None or self.outputs < module.out_features)
        )

    def build(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, nn.Linear)
        layer = resized(module, inputs=self.inputs, outputs=self.outputs, bias=module.bias is not None)
        layer.__class__ = NarrowLinear
        layer.spec = self  # type: ignore[assignment]
        return layer
