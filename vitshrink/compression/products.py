"""One matrix whose inputs are to be rounded, and what errors there cost."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitshrink.compression.grids import Grid, Values
from vitshrink.statistics.inputs import Inputs


@dataclass(eq=False)
class Product:
    """One matrix (m, n) with what reaches it.

    Attributes:
        divided: by what the inputs have been divided since they were seen, (n,).
        gains: by what the outputs have been divided, (m,).
        factors: by what the layer itself multiplies its inputs, (n,).
        grid: of the inputs.
        output: of the outputs, where they meet another input in a product.
    """

    module: nn.Linear | nn.Conv2d
    seen: Inputs
    divided: Tensor
    gains: Tensor
    factors: Tensor | None = None
    grid: Grid | None = None
    output: Grid | None = None

    @classmethod
    def of(cls, module: nn.Linear | nn.Conv2d, seen: Inputs) -> "Product":
        n, m = seen.tokens.shape[1], len(module.weight)
        return cls(module, seen, torch.ones(n), torch.ones(m))

    @property
    def weight(self) -> Tensor:
        return self.module.weight.detach().flatten(1).float()

    @property
    def tokens(self) -> Tensor:
        return self.seen.tokens / self.divided

    @property
    def bounds(self) -> Tensor:
        """The least and the largest value of each channel, (2, n)."""
        return self.seen.bounds / self.divided

    @property
    def covariance(self) -> Tensor:
        """Second moments about the mean, float64."""
        found = self.seen.sensitivity.covariance
        assert found is not None
        divided = self.divided.double()
        return found / divided / divided[:, None]

    @property
    def outputs(self) -> Tensor:
        """Sensitivities, (m,), float64: a squared error costs half of them."""
        return self.seen.sensitivity.outputs * self.gains.double().square()

    def answers(self) -> Values:
        """What it gives for the tokens, in floating point."""
        bias = 0.0 if self.module.bias is None else self.module.bias.detach().float()
        return Values.of(self.tokens @ self.weight.T + bias, 0.5 * self.outputs.float())

    def costs(self, scaled: Tensor | float = 1.0) -> Tensor:
        """Of squared errors of inputs that are divided by ``scaled`` as well, (n,)."""
        return 0.5 * self.outputs.float() @ (self.weight * scaled).square()

    def read_divided(self, scale: Tensor) -> None:
        """Read x / ``scale``, (n,), in the place of x, and give the same."""
        weight = self.module.weight
        weight.data = weight.data * scale.view(-1, *[1] * (weight.dim() - 2)).to(weight.dtype)
        self.divided = self.divided * scale

    def as_it_was(self) -> None:
        """Leave the inputs as they come."""
        if self.factors is not None:
            self.module.weight.data = self.module.weight.data * self.factors.to(self.module.weight.dtype)
            self.divided, self.factors = self.divided * self.factors, None

    def give_divided(self, scale: Tensor) -> None:
        """Give y / ``scale``, (m,), in the place of y."""
        divide(self.module, scale)
        self.gains = self.gains * scale


def divide(giver: nn.Module, scale: Tensor) -> None:
    """Let a norm or a linear layer give y / ``scale`` in the place of y."""
    weight, bias = giver.get_parameter("weight"), giver.bias
    weight.data = weight.data / (scale[:, None] if isinstance(giver, nn.Linear) else scale).to(weight.dtype)
    if isinstance(bias, nn.Parameter):
        bias.data = (bias.data / scale).to(bias.dtype)


def values_of(readers: Sequence[Product], scale: Tensor | float = 1.0) -> Values:
    """What the readers of one tensor read of it, divided by ``scale``, and what errors there cost each of them.

    Each has its own tokens: where only special tokens ask, keys count on others than queries.
    """
    return Values.joined([_values(reader, scale) for reader in readers])


def _values(reader: Product, scale: Tensor | float) -> Values:
    costs = reader.costs(scale)
    return Values.of(reader.tokens / scale, costs).with_bounds(reader.bounds / scale, costs, reader.seen.count)


def peaks_of(readers: Sequence[Product]) -> Tensor:
    """How far each channel reaches in what any of them reads, (n,)."""
    return torch.stack([reader.bounds.abs().amax(0) for reader in readers]).amax(0)
