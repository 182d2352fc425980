"""What the bias of a layer can absorb."""

from torch import Tensor

RESCALING = ("rescale", "stream")
"""Repairs that end with gains and biases fitted to the outputs."""

SHIFTING = ("bias", *RESCALING)
"""Repairs that begin by making every mean output exact."""


def shifted_bias(bias: Tensor, weight: Tensor, approximation: Tensor, mean: Tensor) -> Tensor:
    """b + (W − Ŵ) μ, (m,): the bias that makes the mean output exact."""
    return bias + (weight - approximation) @ mean
