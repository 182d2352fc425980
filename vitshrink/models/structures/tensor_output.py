"""Output projection of an attention as one tensor, (head, head dimension, width), kept as its factors."""

from dataclasses import dataclass
from math import prod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitshrink.errors import CheckpointError
from vitshrink.models.structures.registry import read_entry, structure

RANKS = {"tucker": ("heads", "dims", "outputs"), "cp": ("outputs",), "tt": ("dims", "outputs")}
"""The ranks that each form has. A tensor-train runs from the head dimension over the heads to the width."""


class TensorOutput(nn.Module):
    """The factors of (heads, d, m); every form ends in ``outputs`` (m, r), which writes the output last.

    ``tucker``: core (h, e, r) in ``weight``, a factor for each mode. ``cp``: weights (r,), a factor for each mode.
    ``tt`` (tensor-train): cores (d, e), ``weight`` (e, heads, r), ``outputs``.
    """

    def __init__(self, spec: "TensorOutputSpec", width: int, outputs: int, *, bias: bool, **options: Any) -> None:
        super().__init__()
        self.spec, self.in_features, self.out_features = spec, width, outputs
        for name, shape in spec.shapes(width, outputs).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **options)))
        self.register_parameter("bias", nn.Parameter(torch.empty(outputs, **options)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, heads · d) to (…, m)."""
        tokens = prod(x.shape[:-1])
        # what is exported takes batches of any size, so that it cannot depend on them
        cheaper = not torch.compiler.is_exporting() and self._stepwise(tokens) < self._at_once(tokens)
        z = self._contract(x) if cheaper else F.linear(x, self.matrix())
        bias = self.bias if isinstance(self.bias, Tensor) else None
        return F.linear(z, self._part("outputs"), bias)

    def matrix(self) -> Tensor:
        """All factors but the last, multiplied: (r, heads · d)."""
        weight = self._part("weight")
        if self.spec.form == "tucker":
            found = torch.einsum("bcr,hb,dc->rhd", weight, self._part("heads"), self._part("dims"))
        elif self.spec.form == "cp":
            found = torch.einsum("r,hr,dr->rhd", weight, self._part("heads"), self._part("dims"))
        else:
            found = torch.einsum("chr,dc->rhd", weight, self._part("dims"))
        return found.flatten(1)

    def _part(self, name: str) -> Tensor:
        return self.get_parameter(name)

    def _at_once(self, tokens: int) -> int:
        """Multiplications of all tokens with the product of the factors, which is made for it."""
        return (tokens + self.spec.dims) * self.in_features * self.spec.outputs

    def _stepwise(self, tokens: int) -> int:
        """Multiplications of all tokens with one factor after the other."""
        if self.spec.form == "cp":  # there is no step that all terms share
            return self._at_once(tokens) + 1
        heads, inner = self.spec.size, self.spec.dims
        own = self.spec.heads if self.spec.form == "tucker" else heads
        mixing = heads * own * inner if self.spec.form == "tucker" else 0
        return tokens * (self.in_features * inner + mixing + own * inner * self.spec.outputs)

    def _contract(self, x: Tensor) -> Tensor:
        y = torch.unflatten(x, -1, (self.spec.size, -1)) @ self._part("dims")
        if self.spec.form == "tucker":
            y = torch.einsum("...hc,hb->...bc", y, self._part("heads"))
            return torch.einsum("...bc,bcr->...r", y, self._part("weight"))
        return torch.einsum("...hc,chr->...r", y, self._part("weight"))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.spec}, bias={self.bias is not None}"


@structure("tensor-output")
@dataclass(frozen=True)
class TensorOutputSpec:
    """The form, the heads that there are (``size``), and the ranks of the modes; those that a form lacks are 1."""

    form: str
    size: int
    outputs: int
    dims: int = 1
    heads: int = 1

    @property
    def ranks(self) -> tuple[int, ...]:
        """In the order of the modes that have them."""
        return tuple(getattr(self, name) for name in RANKS[self.form])

    def to_dict(self) -> dict[str, Any]:
        return {"form": self.form, "size": self.size} | {name: getattr(self, name) for name in RANKS[self.form]}

    @classmethod
    def from_dict(cls, entry: Any) -> Self:
        form = entry.get("form") if isinstance(entry, dict) else None
        ranks = RANKS.get(str(form), ())
        return cls(**read_entry(entry, ("size", *ranks), choices={"form": tuple(RANKS)}))

    def shapes(self, width: int, outputs: int) -> dict[str, tuple[int, ...]]:
        """The parameters, by name. Raises CheckpointError for ranks above the sizes of their modes."""
        if width % self.size:
            raise CheckpointError(f"tensor-output: {width} inputs are not those of {self.size} heads.")
        head = width // self.size
        sizes = {"heads": self.size, "dims": head, "outputs": min(outputs, self.size * head)}
        for name in RANKS[self.form] if self.form != "cp" else ():
            if getattr(self, name) > sizes[name]:
                raise CheckpointError(
                    f"tensor-output: the rank of {name}, {getattr(self, name)}, is above its size, {sizes[name]}."
                )
        last = {"outputs": (outputs, self.outputs)}
        if self.form == "tucker":
            core = (self.heads, self.dims, self.outputs)
            return {"weight": core, "heads": (self.size, self.heads), "dims": (head, self.dims), **last}
        if self.form == "cp":
            return {"weight": (self.outputs,), "heads": (self.size, self.outputs), "dims": (head, self.outputs), **last}
        return {"weight": (self.dims, self.size, self.outputs), "dims": (head, self.dims), **last}

    def fits(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and module.in_features % self.size == 0

    def build(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, nn.Linear)
        options: Any = {"device": module.weight.device, "dtype": module.weight.dtype}
        return TensorOutput(self, module.in_features, module.out_features, bias=module.bias is not None, **options)
