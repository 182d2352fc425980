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
        moved: what was subtracted from them before that, (n,).
        gains: by what the outputs have been divided, (m,).
        factors: by what the layer itself multiplies its inputs, (n,).
        grid: of the inputs.
        output: of the outputs, where they meet another input in a product.
    """

    module: nn.Linear | nn.Conv2d
    seen: Inputs
    divided: Tensor
    moved: Tensor
    gains: Tensor
    factors: Tensor | None = None
    grid: Grid | None = None
    output: Grid | None = None

    @classmethod
    def of(cls, module: nn.Linear | nn.Conv2d, seen: Inputs) -> "Product":
        n, m = seen.tokens.shape[1], len(module.weight)
        return cls(module, seen, torch.ones(n), torch.zeros(n), torch.ones(m))

    @property
    def weight(self) -> Tensor:
        return self.module.weight.detach().flatten(1).float()

    @property
    def tokens(self) -> Tensor:
        return (self.seen.tokens - self.moved) / self.divided

    @property
    def bounds(self) -> Tensor:
        """The least and the largest value of each channel, (2, n)."""
        return (self.seen.bounds - self.moved) / self.divided

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

    def read_divided(self, scale: Tensor, center: Tensor) -> None:
        """Read (x - ``center``) / ``scale`` in the place of x, both (n,), and give the same."""
        bias, weight = self.module.bias, self.module.weight
        if bias is not None:
            bias.data = bias.data + (self.weight @ center).to(bias.dtype)
        weight.data = weight.data * scale.view(-1, *[1] * (weight.dim() - 2)).to(weight.dtype)
        self.moved = self.moved + center * self.divided
        self.divided = self.divided * scale

    def as_it_was(self) -> None:
        """Leave the inputs as they come."""
        if self.factors is not None:
            self.module.weight.data = self.module.weight.data * self.factors.to(self.module.weight.dtype)
            self.divided, self.factors = self.divided * self.factors, None

    def give_divided(self, scale: Tensor, center: Tensor) -> None:
        """Give (y - ``center``) / ``scale`` in the place of y, both (m,)."""
        divide(self.module, scale, center)
        self.gains = self.gains * scale


def divide(giver: nn.Module, scale: Tensor, center: Tensor) -> None:
    """Let a norm or a linear layer give (y - ``center``) / ``scale`` in the place of y.

    One without a bias has no center.
    """
    weight, bias = giver.get_parameter("weight"), giver.bias
    weight.data = weight.data / (scale[:, None] if isinstance(giver, nn.Linear) else scale).to(weight.dtype)
    if isinstance(bias, nn.Parameter):
        bias.data = ((bias.data - center) / scale).to(bias.dtype)


def values_of(readers: Sequence[Product], scale: Tensor | float = 1.0, center: Tensor | float = 0.0) -> Values:
    """(x - ``center``) / ``scale`` for what all of them read, x, and what errors cost in all of them."""
    costs = torch.stack([reader.costs(scale) for reader in readers]).sum(0)
    first = readers[0]
    found = Values.of((first.tokens - center) / scale, costs)
    return found.with_bounds((first.bounds - center) / scale, costs, first.seen.count)
