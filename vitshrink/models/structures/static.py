"""Matrices of 8-bit integers that meet inputs of 8 bits on one fixed grid: what runtimes multiply fastest.

The grid of an input, a scale and a zero point for the whole tensor, was chosen on calibration samples; a matrix has one
scale an output channel. Linear layers, low-rank layers and patch projections can be such. The scales are called
``weight``: that they are (out, 1) is what stops transformers without vitshrink from loading them.

PyTorch computes what runtimes do. ONNX files say it as they do, with QuantizeLinear and DequantizeLinear.
"""

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitshrink.models.structures.quantized import exact_on_this_cpu, multiplies_integers
from vitshrink.models.structures.registry import read_entry, structure, unreadable

LEVELS = 255
"""Of an input, from 0."""

LARGEST = 127
"""Integer of a weight."""


@structure("static")
@dataclass(frozen=True)
class StaticSpec:
    """What a layer has beside integers and the grid of its input.

    Attributes:
        rank: of one that has two factors.
        inputs, outputs: of one that has fewer than the dense model's.
        output_bits: 8 where outputs are rounded as well, for a product of two inputs behind it.
        factors: 1 where every input channel is multiplied by a factor before it is rounded.
    """

    rank: int | None = None
    inputs: int | None = None
    outputs: int | None = None
    output_bits: int | None = None
    factors: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, entry: Any) -> Self:
        spec = cls(**read_entry(entry, (), optional=("rank", "inputs", "outputs", "output_bits", "factors")))
        if spec.output_bits not in (None, 8) or spec.factors not in (None, 1):
            raise unreadable(entry, "outputs of 8 bits, where they are rounded, and one factor of an input")
        return spec

    def fits(self, module: nn.Module) -> bool:
        if isinstance(module, nn.Conv2d):
            plain = module.groups == 1 and module.padding_mode == "zeros" and isinstance(module.padding, tuple)
            return plain and self == StaticSpec()
        return (
            isinstance(module, nn.Linear)
            and (self.inputs or 0) <= module.in_features
            and (self.outputs or 0) <= module.out_features
        )

    def build(self, module: nn.Module) -> nn.Module:
        """An empty layer in the place of a linear one or a convolution."""
        if isinstance(module, nn.Conv2d):
            return StaticConv2d(module)
        assert isinstance(module, nn.Linear)
        return StaticLinear(
            self.inputs or module.in_features,
            self.outputs or module.out_features,
            self,
            bias=module.bias is not None,
            like=module.weight,
        )


class StaticProduct(nn.Module):
    """y = W x + b with integers W (out, in) times ``weight`` (out, 1), and x rounded to the grid of the input."""

    weight: Tensor
    input_scale: Tensor
    """()"""
    input_zero: Tensor
    """(), the integer that stands for 0."""
    input_factors: Tensor | None
    """(in,), by which inputs are multiplied first, where they are."""
    rounds = True
    """Whether inputs are rounded; without, it can be told what that does."""

    def __init__(self, shape: torch.Size, bias: bool, like: Tensor, *, factors: bool = False) -> None:
        super().__init__()
        exact_on_this_cpu()  # here, and not first while the model is traced
        self.integers = nn.Parameter(torch.empty(shape, dtype=torch.int8, device=like.device), requires_grad=False)
        self.register_buffer("weight", like.new_empty(shape[0], 1))
        self.register_buffer("input_scale", like.new_empty(()))
        self.register_buffer("input_zero", torch.empty((), dtype=torch.uint8, device=like.device))
        self.register_buffer("input_factors", like.new_empty(shape[1]) if factors else None)
        self.bias = nn.Parameter(like.new_empty(shape[0])) if bias else None

    def dense_matrix(self) -> Tensor:
        """By what inputs are multiplied in all."""
        return self.matrix() if self.input_factors is None else self.matrix() * self.input_factors

    def _multiplied(self, x: Tensor) -> Tensor:
        """x (…, in), float32, as it is rounded."""
        return x.float() if self.input_factors is None else x.float() * self.input_factors.float()

    def matrix(self) -> Tensor:
        """The weights in floating point, in the shape of ``integers``."""
        return self.integers.to(self.weight.dtype) * self.weight.view(-1, *[1] * (self.integers.dim() - 1))

    def steps(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """x in steps of a grid, (float32) whole numbers."""
        steps, zero = x.float() / scale.float(), zero.float()
        return torch.minimum(torch.maximum(steps.round(), -zero), LEVELS - zero) if self.rounds else steps

    def _rounded(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """x on a grid, (float32) unless it has another type."""
        scale = scale.float()
        if torch.onnx.is_in_onnx_export():
            codes = _node("QuantizeLinear", (x.float(), scale, zero), x.shape, dtype=torch.uint8)
            return _node("DequantizeLinear", (codes, scale, zero), x.shape).to(x.dtype)
        return (self.steps(x, scale, zero) * scale).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) to (…, out)."""
        if torch.onnx.is_in_onnx_export():
            return self._onnx("MatMul", x, (*x.shape[:-1], len(self.integers)), self.integers.T, 1)
        flat = self._multiplied(x.reshape(-1, self.integers.shape[1]))
        flat = self.steps(flat, self.input_scale, self.input_zero)
        if self.rounds and multiplies_integers(flat, self.integers):
            centered = 128 - self.input_zero.float()  # so that a step fits int8
            y = torch._int_mm((flat - centered).to(torch.int8), self.integers.T)
            y = y + centered * self.integers.sum(1, dtype=torch.float32)
        else:
            y = F.linear(flat, self.integers.float())
        y = y * (self.input_scale.float() * self.weight.float().squeeze(1))
        y = y if self.bias is None else y + self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def _onnx(self, kind: str, x: Tensor, shape: Any, integers: Tensor, axis: int, **attributes: Any) -> Tensor:
        """The product as a runtime recognizes it."""
        read = self._rounded(self._multiplied(x), self.input_scale, self.input_zero)
        scales = self.weight.float().squeeze(1)  # no zero points: with them OpenVINO multiplies in floating point
        matrix = _node("DequantizeLinear", (integers, scales), integers.shape, axis=axis)
        y = _node(kind, (read, matrix), shape, **attributes)
        if self.bias is not None:
            y = y + self.bias.float().view(-1, *[1] * (self.integers.dim() - 2))
        return y.to(x.dtype)


class StaticLinear(StaticProduct):
    """A product in the place of a linear layer, or two of them, of which the inner one is ``down``, without a bias."""

    output_scale: Tensor
    output_zero: Tensor
    defers = False
    """Whether what reads the outputs rounds them."""

    def __init__(self, in_features: int, out_features: int, spec: StaticSpec, *, bias: bool, like: Tensor) -> None:
        factors = spec.factors is not None
        shape = torch.Size((out_features, spec.rank or in_features))
        super().__init__(shape, bias, like, factors=factors and spec.rank is None)
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.down: StaticProduct | None = None
        if spec.rank is not None:
            self.down = StaticProduct(torch.Size((spec.rank, in_features)), False, like, factors=factors)
        if spec.output_bits is not None:
            self.register_buffer("output_scale", like.new_empty(()))
            self.register_buffer("output_zero", torch.empty((), dtype=torch.uint8, device=like.device))

    def dense_weight(self) -> Tensor:
        """The (out, in) matrix this layer stands for."""
        return self.dense_matrix() if self.down is None else self.dense_matrix() @ self.down.dense_matrix()

    def forward(self, x: Tensor) -> Tensor:
        y = self.unrounded(x)
        return y if self.defers else self.rounded_output(y)

    def unrounded(self, x: Tensor) -> Tensor:
        """Outputs before they are rounded."""
        return super().forward(x if self.down is None else self.down(x))

    def rounded_output(self, y: Tensor) -> Tensor:
        """Outputs, in any layout, on their grid where they have one."""
        return y if self.spec.output_bits is None else self._rounded(y, self.output_scale, self.output_zero)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.spec.rank}, bias={self.bias is not None}"


class StaticConv2d(StaticProduct):
    """A convolution of a rounded image, in the place of another."""

    spec = StaticSpec()

    def __init__(self, like: nn.Conv2d) -> None:
        super().__init__(like.weight.shape, like.bias is not None, like.weight)
        self.kernel_size: Any = like.kernel_size
        self.stride: Any = like.stride
        self.padding: Any = like.padding
        self.dilation: Any = like.dilation

    @torch.no_grad()
    def dense(self) -> nn.Conv2d:
        """The convolution in floating point."""
        rows, channels = self.integers.shape[:2]
        found = nn.Conv2d(
            channels, rows, self.kernel_size, self.stride, self.padding, self.dilation, bias=False, device="meta"
        )
        found.weight = nn.Parameter(self.matrix())
        found.register_parameter("bias", self.bias)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, channels, height, width)"""
        options = (self.stride, self.padding, self.dilation)
        if torch.onnx.is_in_onnx_export():
            attributes = {
                "kernel_shape": list(self.kernel_size),
                "strides": list(self.stride),
                "pads": [*self.padding, *self.padding],
                "dilations": list(self.dilation),
            }
            kernel = torch.empty(self.integers.shape, device="meta")
            shape = F.conv2d(x.to("meta"), kernel, None, *options).shape
            return self._onnx("Conv", x, shape, self.integers, 0, **attributes)
        rounded = self._rounded(x.float(), self.input_scale, self.input_zero)
        bias = None if self.bias is None else self.bias.float()
        return F.conv2d(rounded, self.matrix().float(), bias, *options).to(x.dtype)


def _node(kind: str, inputs: Any, shape: Any, *, dtype: torch.dtype = torch.float32, **attributes: Any) -> Tensor:
    """An operator of ONNX, in a program that becomes an ONNX file."""
    found: Tensor = torch.onnx.ops.symbolic(kind, inputs, attributes, dtype=dtype, shape=shape, version=18)
    return found
