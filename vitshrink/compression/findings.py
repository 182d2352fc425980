"""What a job has learned of a model, before it chooses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Findings:
    """What a method found at its sites, why sites that are missing are, and the statistics behind it.

    Attributes:
        layers: by site, a ``Factorization`` of a layer, a ``Part`` of an attention, or the ``Metric`` of a matrix.
        failures: by site, why nothing was found; such a site is kept as it is.
        stats: by layer.
        scales: what losses of each kind of form are multiplied by, in the order of the makers; infinite for one that
            is not used. Nothing: all as they are predicted.
        light: whether the model of a plan was found to lose so little that few samples repair it.
    """

    layers: dict[str, Any]
    failures: dict[str, str]
    stats: Mapping[str, Any]
    scales: tuple[float, ...] = ()
    light: bool = False


Rebuild = Callable[[Findings], PreTrainedModel]
"""The compressed model of one size, as other findings make it."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What each rank of one layer loses at the output of the model, (k + 1,): all that a job keeps of its factors."""

    measured: Tensor
