"""What a maker of candidates is, and what it works with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from vitshrink.compression.candidates import Cost, Currency, Form, Offer
from vitshrink.compression.findings import Findings
from vitshrink.compression.quantization import Quantization
from vitshrink.methods.ranks import Storage, dense_cost
from vitshrink.models.targets import Target, linear_of


class Priced(Protocol):
    """What the model takes, and its layers, in nanoseconds."""

    @property
    def whole(self) -> int:
        """With its layers dense."""

    def of(self, target: Target, rank: int | None) -> int:
        """Of a layer at a rank, or dense."""

    def resized(self, target: Target, shape: tuple[int, int]) -> int:
        """Of a dense layer of another shape."""


@dataclass(frozen=True, eq=False)
class Material:
    """The dense model and the choices of a job that forms depend on.

    Attributes:
        targets: the linear layers that may change.
        options: of the method.
        compensation: the repair; some move biases.
        storage: how low-rank layers are stored.
        multiple: ranks are multiples of it.
        dtype: of the weights in the file.
        quantization: how all weights are rounded in the end, if they are.
        measures: whether what components do to the output decides, rather than the method's own loss.
        prices: what layers take of a budget of time, where there is one.
    """

    dense: PreTrainedModel
    targets: Sequence[Target]
    options: Mapping[str, Any]
    compensation: str
    storage: Storage
    multiple: int
    dtype: torch.dtype
    currency: Currency
    quantization: Quantization | None
    measures: bool
    prices: "Priced | None" = None

    @property
    def itemsize(self) -> int:
        """Bytes of a stored number."""
        return self.dtype.itemsize

    def dense_cost(self, shape: tuple[int, int]) -> Cost:
        """Of a layer that is kept as it is, or only rounded in the end."""
        numbers, rounding = dense_cost(*shape), self.quantization
        return Cost(numbers, numbers * self.itemsize if rounding is None else rounding.dense_bytes(shape))

    def layer(self, name: str) -> nn.Linear:
        """The dense layer of this name."""
        return linear_of(self.dense, name)


class Maker(Protocol):
    """Offers candidates of one kind of form at its sites, and builds those that a plan chooses."""

    def offers(self, findings: Findings | None = None) -> Sequence[Offer]:
        """One offer a site, for every site of which something was found; without findings costs only are told."""

    def makes(self, form: Form) -> bool:
        """Whether forms of this kind are its own."""

    def build(self, model: PreTrainedModel, chosen: Mapping[str, Form], findings: Findings) -> None:
        """Put the chosen forms, by site, into ``model``, a view of the dense one.

        Tensors that ``model`` shares with the dense model must not be changed.
        """
