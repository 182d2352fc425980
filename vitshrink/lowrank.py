"""The low-rank linear layer and the description from which it is rebuilt."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitshrink.errors import CheckpointError


@dataclass(frozen=True)
class LayerSpec:
    """What a checkpoint says of one compressed layer: enough to build it empty, before its tensors are read."""

    rank: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: Any) -> "LayerSpec":
        """Raises CheckpointError when the entry is not one that this version writes."""
        if not isinstance(entry, dict) or set(entry) != {"rank"} or type(entry["rank"]) is not int:
            raise CheckpointError(
                f"cannot read the layer description {entry!r}: expected {{'rank': <integer>}}. "
                "The checkpoint is damaged or was written by a newer vitshrink."
            )
        if entry["rank"] < 1:
            raise CheckpointError(f"cannot build a layer of rank {entry['rank']}: ranks start at 1.")
        return cls(**entry)


class LowRankLinear(nn.Module):
    """y = up (down x) + b, with up (out, rank) and down (rank, in).

    The output factor is called ``weight`` on purpose: transformers without vitshrink then meets a tensor of the wrong
    shape and refuses to load, where an unknown name would leave it with a randomly initialised layer and a warning.
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
        self.in_features = in_features
        self.out_features = out_features
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(out_features, spec.rank, device=device, dtype=dtype))
        self.down = nn.Parameter(torch.empty(spec.rank, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_factors(cls, up: Tensor, down: Tensor, bias: Tensor | None, *, dtype: torch.dtype) -> "LowRankLinear":
        """Build from up (out, rank), down (rank, in) and bias (out,); cast once, here."""
        layer = cls(
            down.shape[1], up.shape[0], LayerSpec(up.shape[1]), bias=bias is not None, device=up.device, dtype=dtype
        )
        with torch.no_grad():
            layer.weight.copy_(up)
            layer.down.copy_(down)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return layer

    @property
    def rank(self) -> int:
        return self.spec.rank

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.weight, self.bias)

    def dense_weight(self) -> Tensor:
        """The (out, in) matrix this layer stands for."""
        return self.weight @ self.down

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"
