"""What calibration leaves behind for one linear layer y = W x + b, and the damping of it.

All tensors are float64. ``n`` is the number of inputs, ``m`` the number of outputs; expectations are over the
unmasked calibration tokens.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitshrink.errors import NumericsError
from vitshrink.runtime.precision import narrow_products
from vitshrink.statistics.halves import half_gram, half_of, symmetric

FAR, FAR_IN_BFLOAT16 = 16.0, 2.0
"""A mean above so many standard deviations of its channel is far: squared, it takes 8 of the 24 bits of float32. A
Gram whose numbers are rounded to 8 bits hides the spread sooner."""

EVERY, ENOUGH = 8, 64
"""One token in so many tells whether a mean is far, where these are at least so many tokens."""


@dataclass(frozen=True, eq=False)
class LinearStats:
    """Statistics of one layer; which are there depends on what the method asked for.

    Attributes:
        tokens: number of tokens seen.
        mean: E[x], (n,).
        gram: E[x xᵀ], (n, n); None where only ``output_gram`` was needed.
        output_gram: E[(Wx)(Wx)ᵀ], (m, m): all that a layer with m < n needs, at a fraction of the cost.
        abs_mean: E|x|, (n,).
        abs_max: max |x|, (n,).
        gradient_gram: H = E[g gᵀ], (m, m), with g a label-free gradient at the output; where m <= n.
        input_gradient_gram: Wᵀ H W, (n, n), where m > n.
        gradient_power: tr H.
    """

    tokens: int
    mean: Tensor
    gram: Tensor | None = None
    output_gram: Tensor | None = None
    abs_mean: Tensor | None = None
    abs_max: Tensor | None = None
    gradient_gram: Tensor | None = None
    input_gradient_gram: Tensor | None = None
    gradient_power: float = 0.0

    def refined_by(self, again: "LinearStats") -> "LinearStats":
        """Statistics of the same layer in the compressed model: its inputs are taken over, the gradients averaged."""
        return replace(
            again,
            gradient_gram=_mean(self.gradient_gram, again.gradient_gram),
            input_gradient_gram=_mean(self.input_gradient_gram, again.input_gradient_gram),
            gradient_power=(self.gradient_power + again.gradient_power) / 2,
        )

    @classmethod
    def from_inputs(cls, x: Tensor) -> "LinearStats":
        """Statistics of inputs x (tokens, n), all at once."""
        x = x.double()
        return cls(
            tokens=x.shape[0],
            mean=x.mean(0),
            abs_mean=x.abs().mean(0),
            abs_max=x.abs().amax(0),
            gram=gram_of(x) / x.shape[0],
        )

    def covariance(self, *, centered: bool) -> Tensor:
        """E[x xᵀ], less μμᵀ when ``centered``; (n, n)."""
        if self.gram is None:
            raise NumericsError("the input Gram of this layer was not collected.")
        return self.gram - torch.outer(self.mean, self.mean) if centered else self.gram

    def output_covariance(self, weight: Tensor, *, centered: bool) -> Tensor:
        """W C Wᵀ, (m, m), without ever forming C where the outputs were collected instead."""
        if self.output_gram is None:
            return weight @ self.covariance(centered=centered) @ weight.T
        if not centered:
            return self.output_gram
        shift = weight @ self.mean
        return self.output_gram - torch.outer(shift, shift)


def gram_of(x: Tensor) -> Tensor:
    """xᵀx, (k, k), of x (tokens, k); what lies under the diagonal is copied from above it."""
    return symmetric(half_gram(x))


class Moments:
    """Sums over tokens x (tokens, n), float32, each with its weight (tokens,) if any is given; float64.

    Float32 has no digits left for the spread of a channel whose mean is far above it, once that is squared. Such a mean
    is taken out before, and put back in float64; where there is none, the sums are those of the plain tokens.
    """

    def __init__(self, x: Tensor, weights: Tensor | None = None, *, narrow: bool = False) -> None:
        """``narrow``: whether their Gram is multiplied in bfloat16."""
        self.rest, self.narrow = x, narrow
        self.weights = weights
        self.shift: Tensor | None = None
        """(n,), float64, to be added to ``rest``; None where no mean is far."""
        far = _far(x[::EVERY] if len(x) >= EVERY * ENOUGH else x, FAR_IN_BFLOAT16 if narrow else FAR)
        if far.any():
            mean = x.mean(0).where(far, 0)
            self.rest, self.shift = x - mean, mean.double()
        each = x.new_ones(len(x)) if weights is None else weights
        self.rest_total = (each @ self.rest).double()  # in half of the time of a sum over tokens

    def through(self, weight: Tensor) -> "Moments":
        """Those of Wx, with the matrix W (m, n), where a mean of x is far."""
        assert self.shift is not None
        found = copy.copy(self)
        found.rest = self.rest @ weight.T
        # not summed anew: what is centered later has to cancel to the last digit
        found.shift, found.rest_total = weight.double() @ self.shift, weight.double() @ self.rest_total
        return found

    def total(self) -> Tensor:
        """Σ x, (n,)."""
        return self.rest_total.clone() if self.shift is None else self.rest_total + self._weight() * self.shift

    def gram(self) -> Tensor:
        """Σ x xᵀ, (n, n)."""
        return symmetric(self.half()).double()

    def half(self) -> Tensor:
        """That of ``gram``; float32 where no mean is far."""
        x = self.rest if self.weights is None else self.rest * self.weights.sqrt()[:, None]
        with narrow_products(self.narrow):
            half = half_gram(x)
        if self.shift is None:
            return half
        cross = torch.outer(self.rest_total, self.shift)
        return half + half_of(cross + cross.T + self._weight() * torch.outer(self.shift, self.shift))

    def _weight(self) -> float:
        return float(len(self.rest) if self.weights is None else self.weights.double().sum())


def _far(x: Tensor, deviations: float) -> Tensor:
    """Which channels of tokens x (tokens, n) have a mean above so many standard deviations."""
    mean = x.mean(0)
    variance = (x * x).mean(0) - mean.square()  # exact enough to tell 256 squares of it; ``var_mean`` is slow here
    # among others that vary more, the rounding of a channel that hardly varies is of no consequence
    return mean.square() > deviations**2 * torch.maximum(variance, variance.mean())


def _mean(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else (one + other) / 2
