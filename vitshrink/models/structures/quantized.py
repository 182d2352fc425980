"""Matrices of 8-bit or 4-bit integers: linear layers, low-rank layers and embeddings.

A matrix (out, in) is stored as integers (out, groups, in / groups) and one scale for each group, (out, groups): a
weight is its integer times its scale. With 8 bits an output channel is one group; with 4 bits groups are of about 32
inputs, and two integers share a byte. The third dimension is what stops transformers without vitshrink from loading it.

With dynamic activations each token is rounded to 8 bits by its own largest entry, and integers are multiplied: on CPUs
that have instructions for it several times as fast as floating point.
"""

import functools
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitshrink.errors import CheckpointError
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.structures.registry import structure, structure_of

Activations = Literal["none", "dynamic"]

GROUP = 32
"""Inputs that share a scale with 4 bits, about: the groups of a channel are of one size."""

CLIPPING = tuple(1 - 0.04 * step for step in range(11))
"""Fractions of the largest weight of a 4-bit group at which it may be clipped; the least squared error decides."""

RIDGE = 1e-6
"""Of an outer factor that is fitted to the rounded inner one; relative to the mean square of the latter's rows."""


@structure("quantized")
@dataclass(frozen=True)
class QuantizedSpec:
    """``bits`` of a weight, how activations are treated, and for other than dense layers what their structure says."""

    bits: int
    activations: Activations
    rank: int | None = None
    pivot: int | None = None
    inputs: int | None = None
    outputs: int | None = None

    @classmethod
    def of(cls, layer: nn.Module, bits: int, activations: Activations) -> Self:
        """For a linear, narrower or low-rank layer."""
        spec = structure_of(layer)
        return cls(bits, activations, **({} if spec is None else spec.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, entry: Any) -> Self:
        """Raises CheckpointError when the entry is not one that this version writes."""
        numbers = [value for name, value in entry.items() if name != "activations"]
        known = {"bits", "activations"} <= set(entry) <= {field.name for field in fields(cls)}
        if not known or any(type(number) is not int for number in numbers):
            raise CheckpointError(f"cannot read the description {entry!r} of a quantized layer: it is damaged.")
        spec = cls(**entry)
        modes = {8: ("none", "dynamic"), 4: ("none",)}
        least = min(*(entry.get(name, 1) for name in ("rank", "inputs", "outputs")), 1 + entry.get("pivot", 0))
        if spec.activations not in modes.get(spec.bits, ()) or least < 1:
            raise CheckpointError(f"cannot build the quantized layer {entry!r}: upgrade vitshrink.")
        return spec

    def fits(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def build(self, module: nn.Module) -> "QuantizedLinear":
        """An empty layer in the place of a linear one. Raises CheckpointError where the pivots do not fit."""
        assert isinstance(module, nn.Linear)
        return QuantizedLinear(
            self.inputs or module.in_features,
            self.outputs or module.out_features,
            self,
            bias=module.bias is not None,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )


class QuantizedLinear(nn.Module):
    """y = W x + b, or up (down x) + b as in ``LowRankLinear``, with integer matrices."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantizedSpec,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        if spec.activations == "dynamic":
            exact_on_this_cpu()  # here, and not first while the model is traced
        start, rank = spec.pivot or 0, spec.rank or 0
        if start + rank > in_features:
            raise CheckpointError(f"pivots {start}…{start + rank - 1} of {in_features} inputs do not exist.")
        matrices = {"weight": (out_features, in_features)}
        if spec.rank is not None:
            stored = in_features if spec.pivot is None else in_features - spec.rank
            matrices = {"weight": (out_features, spec.rank), "down": (spec.rank, stored)}
        self.padding = 0
        """Integers that fill up the groups of 4 bits: they take room, and stand for no weight."""
        for name, shape in matrices.items():
            groups, width = groups_of(shape[1], spec.bits)
            self.padding += shape[0] * (groups * width - shape[1])
            integers, scales = empty(*shape, spec.bits, device, dtype)
            self.register_parameter(name, nn.Parameter(integers, requires_grad=False))
            self.register_buffer(f"{name}_scale", scales)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    @torch.no_grad()
    def from_layer(cls, layer: nn.Linear | LowRankLinear, bits: int, activations: Activations) -> Self:
        """The layer with its matrices rounded; everything else is kept.

        Of a low-rank layer the inner factor is rounded first, and the outer one is fitted to what came out.
        """
        spec, names = QuantizedSpec.of(layer, bits, activations), ["weight"]
        if isinstance(layer, LowRankLinear):
            names = ["weight", "down"]
        made = cls(
            layer.in_features,
            layer.out_features,
            spec,
            bias=layer.bias is not None,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )
        for name in reversed(names):
            matrix = getattr(layer, name).flatten(0, -2)  # some structures have one more side
            if name == "weight" and isinstance(layer, LowRankLinear):
                matrix = refitted(*layer.factors(), made.inner()).to(matrix.dtype)
            integers, scales = quantize(matrix, bits)
            getattr(made, name).copy_(integers)
            getattr(made, f"{name}_scale").copy_(scales)
        if made.bias is not None and layer.bias is not None:
            made.bias.copy_(layer.bias)
        return made

    def matrix(self, name: str, columns: int) -> Tensor:
        """``weight`` or ``down`` in floating point, (rows, columns)."""
        integers, scale = getattr(self, name), getattr(self, f"{name}_scale")
        return dequantize(integers, scale, self.spec.bits, columns)

    def dense_weight(self) -> Tensor:
        """The (out, in) matrix this layer stands for."""
        spec = self.spec
        if spec.rank is None:
            return self.matrix("weight", self.in_features)
        return self.matrix("weight", spec.rank) @ self.inner()

    def inner(self) -> Tensor:
        """The whole of the inner factor, (rank, in)."""
        spec = self.spec
        assert spec.rank is not None
        if spec.pivot is None:
            return self.matrix("down", self.in_features)
        down = self.matrix("down", self.in_features - spec.rank)
        identity = torch.eye(spec.rank, dtype=down.dtype, device=down.device)
        return torch.cat([down[:, : spec.pivot], identity, down[:, spec.pivot :]], 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        if (rank := self.spec.rank) is not None:
            pivot = self.spec.pivot
            if pivot is None:
                flat = self._product("down", flat)
            else:
                start, stop = pivot, pivot + rank
                others = flat[:, stop:] if start == 0 else torch.cat([flat[:, :start], flat[:, stop:]], 1)
                flat = flat[:, start:stop] + self._product("down", others)
        y: Tensor = self._product("weight", flat, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _product(self, name: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
        integers, scale = getattr(self, name), getattr(self, f"{name}_scale")
        if self.spec.activations == "dynamic":
            return dynamic_product(x, integers.flatten(1), scale.squeeze(1), bias)
        if self.spec.bits == 8:
            y: Tensor = F.linear(x, integers.flatten(1).to(x.dtype)) * scale.squeeze(1)
            return y if bias is None else y + bias
        return F.linear(x, self.matrix(name, x.shape[1]), bias)

    def extra_repr(self) -> str:
        described = ", ".join(f"{name}={value}" for name, value in self.spec.to_dict().items())
        return f"{self.in_features}, {self.out_features}, {described}, bias={self.bias is not None}"


@structure("quantized-embedding")
@dataclass(frozen=True)
class QuantizedEmbeddingSpec:
    """An embedding with rows of 8-bit integers, each with a scale."""

    bits: int = 8

    def to_dict(self) -> dict[str, Any]:
        return {"bits": self.bits}

    @classmethod
    def from_dict(cls, entry: Any) -> Self:
        """Raises CheckpointError when the entry is not one that this version writes."""
        if entry != {"bits": 8}:
            raise CheckpointError(f"cannot read the description {entry!r} of a quantized embedding: upgrade vitshrink.")
        return cls()

    def fits(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    def build(self, module: nn.Module) -> "QuantizedEmbedding":
        """An empty table in the place of an embedding."""
        assert isinstance(module, nn.Embedding)
        return QuantizedEmbedding(module)


class QuantizedEmbedding(nn.Module):
    """Rows of integers, looked up and scaled."""

    def __init__(self, like: nn.Embedding) -> None:
        super().__init__()
        self.spec = QuantizedEmbeddingSpec()
        rows, columns = like.weight.shape
        integers, scales = empty(rows, columns, 8, like.weight.device, like.weight.dtype)
        self.weight = nn.Parameter(integers, requires_grad=False)
        self.weight_scale: Tensor
        self.register_buffer("weight_scale", scales)

    @classmethod
    @torch.no_grad()
    def from_layer(cls, layer: nn.Embedding) -> Self:
        """The table with its rows rounded."""
        made = cls(layer)
        integers, scales = quantize(layer.weight, 8)
        made.weight.copy_(integers)
        made.weight_scale.copy_(scales)
        return made

    def dense_weight(self) -> Tensor:
        """The (rows, width) matrix this table stands for."""
        return dequantize(self.weight, self.weight_scale, 8, self.weight.shape[2])

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.weight.squeeze(1)[tokens].to(self.weight_scale.dtype) * self.weight_scale[tokens]
        return found


def refitted(up: Tensor, down: Tensor, rounded: Tensor) -> Tensor:
    """The outer factor with which ``rounded`` is closest to ``up @ down``, in float64, (out, rank).

    Least squares over the weights, with a trace of ridge towards ``up``, so that a row of zeros changes nothing.
    """
    up, down, rounded = up.double(), down.double(), rounded.double()
    gram = rounded @ rounded.T
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if not ridge.any():
        return up
    found: Tensor = torch.linalg.solve(gram + ridge, (rounded @ down.T + ridge) @ up.T).T
    return found


def groups_of(columns: int, bits: int) -> tuple[int, int]:
    """How many groups a channel of ``columns`` weights has, and how many integers each."""
    if bits == 8:
        return 1, columns
    groups = -(-columns // GROUP)
    width = -(-columns // groups)
    return groups, width + width % 2


def matrix_bytes(rows: int, columns: int, bits: int, itemsize: int) -> int:
    """Bytes of the integers and scales of a matrix, a scale taking ``itemsize`` of them."""
    groups, width = groups_of(columns, bits)
    return rows * groups * (width * bits // 8 + itemsize)


def empty(
    rows: int, columns: int, bits: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Storage for the integers and scales of a matrix."""
    groups, width = groups_of(columns, bits)
    kind, packed = (torch.int8, width) if bits == 8 else (torch.uint8, width // 2)
    integers = torch.empty(rows, groups, packed, dtype=kind, device=device)
    return integers, torch.empty(rows, groups, device=device, dtype=dtype)


def quantize(matrix: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers and scales (in the type of the matrix) of a matrix (out, in), in the form in which they are stored."""
    groups, width = groups_of(matrix.shape[1], bits)
    padded = F.pad(matrix.detach().float(), (0, groups * width - matrix.shape[1])).view(-1, groups, width)
    top = 2 ** (bits - 1) - 1
    peak = padded.abs().amax(-1) / top
    best = torch.full_like(peak, torch.inf)
    chosen = peak
    for fraction in CLIPPING if bits == 4 else (1.0,):
        scale = (fraction * peak).to(matrix.dtype).float()
        error = (_rounded(padded, scale, top) * scale[..., None] - padded).square().sum(-1)
        chosen = torch.where(error < best, scale, chosen)
        best = torch.minimum(error, best)
    integers = _rounded(padded, chosen, top)
    if bits == 8:
        return integers.to(torch.int8), chosen.to(matrix.dtype)
    nibbles = (integers + 8).to(torch.uint8)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4, chosen.to(matrix.dtype)


def _rounded(values: Tensor, scale: Tensor, top: int) -> Tensor:
    quotient = values / scale[..., None]  # a scale of zero: all values are
    return quotient.nan_to_num(0, 0, 0).round().clamp(-top, top)


def dequantize(integers: Tensor, scale: Tensor, bits: int, columns: int) -> Tensor:
    """The matrix (out, ``columns``), in the type of the scales."""
    if bits == 4:
        integers = torch.stack([integers & 15, integers >> 4], -1).flatten(2).to(torch.int8) - 8
    matrix: Tensor = (integers.to(scale.dtype) * scale[..., None]).flatten(1)
    return matrix[:, :columns]


def dynamic_product(x: Tensor, integers: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (tokens, in), rounded token by token to 8 bits, times integers (out, in), scaled by (out,)."""
    flat = x.float()
    peak = flat.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    rounded = (flat / peak).round_()
    if multiplies_integers(x, integers):
        y = torch._int_mm(rounded.to(torch.int8), integers.T) * peak
    else:
        y = F.linear(rounded, integers.float()) * peak
    y = y * scale if bias is None else torch.addcmul(bias.float(), y, scale.float())
    return y.to(x.dtype)


def multiplies_integers(x: Tensor, integers: Tensor) -> bool:
    if x.device.type == "cuda":  # the limits of torch._int_mm there
        return x.shape[0] > 16 and x.shape[1] % 8 == 0 and integers.shape[0] % 8 == 0
    # with one input per output it reads beyond it on the CPU (torch 2.13)
    return x.device.type == "cpu" and x.shape[1] > 1 and exact_on_this_cpu()


@functools.cache
def exact_on_this_cpu() -> bool:
    """CPUs without instructions for 8-bit dot products add pairs in 16 bits, which large values overflow."""
    largest = torch.full((32, 64), 127, dtype=torch.int8, device="cpu")
    return bool((torch._int_mm(largest, -largest.T) == -64 * 127**2).all())
