"""The low-rank linear layer and the description from which it is rebuilt."""

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitshrink.errors import CheckpointError, NumericsError
from vitshrink.models.structures.registry import LINEAR, structure


@structure(LINEAR)
@dataclass(frozen=True)
class LayerSpec:
    """What a checkpoint says of one compressed layer: enough to build it empty, before its tensors are read.

    Attributes:
        pivot: first of the ``rank`` neighboring input channels on which the inner factor is the identity, which is
            then not stored; None when both factors are stored whole.
    """

    rank: int
    pivot: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"rank": self.rank} if self.pivot is None else {"rank": self.rank, "pivot": self.pivot}

    @classmethod
    def from_dict(cls, entry: Any) -> Self:
        """Raises CheckpointError when the entry is not one that this version writes."""
        known = isinstance(entry, dict) and {"rank"} <= set(entry) <= {"rank", "pivot"}
        if not known or any(type(number) is not int for number in entry.values()):
            raise CheckpointError(
                f"cannot read the layer description {entry!r}: expected {{'rank': <integer>, 'pivot': <integer>}}. "
                "The checkpoint is damaged or was written by a newer vitshrink."
            )
        if entry["rank"] < 1 or entry.get("pivot", 0) < 0:
            pivot = f" and pivot {entry['pivot']}" if "pivot" in entry else ""
            raise CheckpointError(
                f"cannot build a layer of rank {entry['rank']}{pivot}: the rank starts at 1 and the pivot at 0."
            )
        return cls(**entry)

    def fits(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def build(self, module: nn.Module) -> "LowRankLinear":
        """An empty layer in the place of a linear one. Raises CheckpointError where the pivots do not fit."""
        assert isinstance(module, nn.Linear)
        return LowRankLinear(
            module.in_features,
            module.out_features,
            self,
            bias=module.bias is not None,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )


class LowRankLinear(nn.Module):
    """y = up (down x) + b, with up (out, rank) and down (rank, in).

    With a pivot, down is the identity on ``rank`` neighboring inputs, and only its other columns are stored: r(m+n−r)
    numbers, the degrees of freedom of a rank-r matrix (PIFA, arXiv 2501.19090), and as many multiplications less. The
    block is contiguous, so nothing is gathered: h = x[pivots] + down' x[others] reads slices.

    The output factor is called ``weight`` on purpose: transformers without vitshrink then meets a tensor of the wrong
    shape and refuses to load, where an unknown name would leave it with a randomly initialized layer and a warning.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: LayerSpec,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if spec.pivot is not None and spec.pivot + spec.rank > in_features:
            raise CheckpointError(
                f"pivots {spec.pivot}…{spec.pivot + spec.rank - 1} of {in_features} inputs do not exist."
            )
        self.in_features = in_features
        self.out_features = out_features
        self.spec = spec
        stored = in_features if spec.pivot is None else in_features - spec.rank
        self.weight = nn.Parameter(torch.empty(out_features, spec.rank, device=device, dtype=dtype))
        self.down = nn.Parameter(torch.empty(spec.rank, stored, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_factors(
        cls, up: Tensor, down: Tensor, bias: Tensor | None, *, dtype: torch.dtype, pivot: int | None = None
    ) -> Self:
        """Build from up (out, rank), down (rank, in) and bias (out,), with or without pivots; cast once, here."""
        spec = LayerSpec(up.shape[1], pivot)
        layer = cls(down.shape[1], up.shape[0], spec, bias=bias is not None, device=up.device, dtype=dtype)
        layer.set_factors(up, down)
        if layer.bias is not None and bias is not None:
            with torch.no_grad():
                layer.bias.copy_(bias)
        return layer

    @property
    def rank(self) -> int:
        return self.spec.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """up (out, rank) and the whole of down (rank, in)."""
        if self.spec.pivot is None:
            return self.weight, self.down
        start = self.spec.pivot
        identity = torch.eye(self.rank, dtype=self.down.dtype, device=self.down.device)
        return self.weight, torch.cat([self.down[:, :start], identity, self.down[:, start:]], 1)

    @torch.no_grad()
    def set_factors(self, up: Tensor, down: Tensor) -> None:
        """Store the matrix ``up @ down``. Raises NumericsError where the pivots do not span its row space."""
        if self.spec.pivot is not None:
            start, stop = self.spec.pivot, self.spec.pivot + self.rank
            block = down[:, start:stop]
            others = torch.cat([down[:, :start], down[:, stop:]], 1)
            solved, info = torch.linalg.solve_ex(block, others)
            if int(info) or not torch.isfinite(solved).all():
                raise NumericsError(f"inputs {start}…{stop - 1} do not span the row space of this layer.")
            up, down = up @ block, solved
        self.weight.copy_(up)
        self.down.copy_(down)

    def dense_weight(self) -> Tensor:
        """The (out, in) matrix this layer stands for."""
        up, down = self.factors()
        return up @ down

    def forward(self, x: Tensor) -> Tensor:
        if self.spec.pivot is None:
            return F.linear(F.linear(x, self.down), self.weight, self.bias)
        start, stop = self.spec.pivot, self.spec.pivot + self.rank
        flat = x.reshape(-1, self.in_features)
        h = flat[:, start:stop]
        if start > 0:
            h = torch.addmm(h, flat[:, :start], self.down[:, :start].T)
        if stop < self.in_features:
            h = torch.addmm(h, flat[:, stop:], self.down[:, start:].T)
        return F.linear(h, self.weight, self.bias).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        pivot = "" if self.spec.pivot is None else f", pivot={self.spec.pivot}"
        return f"{self.in_features}, {self.out_features}, rank={self.rank}{pivot}, bias={self.bias is not None}"
