"""What a maker of candidates is, what it works with, and the table of forms that a job may ask for by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from vitshrink.compression.candidates import Cost, Currency, Form, Offer
from vitshrink.compression.findings import Findings
from vitshrink.compression.quantization import Quantization
from vitshrink.config.choosing import choose
from vitshrink.methods import LayerMethod
from vitshrink.methods.ranks import Storage, dense_cost
from vitshrink.models.targets import Target, linear_of


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

    def build(self, model: PreTrainedModel, chosen: Mapping[str, Form], findings: Findings) -> None:
        """Put the chosen forms, by site, into ``model``, a view of the dense one.

        Tensors that ``model`` shares with the dense model must not be changed.
        """


MakeForm = Callable[[Material, LayerMethod], Maker]
_FORMS: dict[str, MakeForm] = {}


def form_maker(*names: str) -> Callable[[Callable[[str, Material, LayerMethod], Maker]], Any]:
    """Enter the decorated ``f(name, material, method)`` as what makes the forms of these names."""

    def enter(make: Callable[[str, Material, LayerMethod], Maker]) -> Callable[[str, Material, LayerMethod], Maker]:
        for name in names:
            if name in _FORMS:
                raise ValueError(f"two forms are called {name!r}")
            _FORMS[name] = _named(make, name)
        return make

    return enter


def _named(make: Callable[[str, Material, LayerMethod], Maker], name: str) -> MakeForm:
    return lambda material, method: make(name, material, method)


def known_forms() -> list[str]:
    """The forms that a job may ask for beside those of its method."""
    return sorted(_FORMS)


def make_form(name: str, material: Material, method: LayerMethod) -> Maker:
    """The maker of a form. Raises UsageError for a name that is not known."""
    return choose(name, _FORMS, "form")(material, method)
