"""The table of methods. A method is a pure function in a file of its own, entered here by its decorator."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vitshrink.config.choosing import choose
from vitshrink.errors import NumericsError
from vitshrink.methods.ranks import Storage
from vitshrink.statistics.needs import Needs


@dataclass(frozen=True, eq=False)
class Factorization:
    """Nested factors of one layer: the best rank-r form is a slice.

    Attributes:
        up: (m, k); down: (k, n); Ŵ at rank r is ``up[:, :r] @ down[:r]``.
        loss: (k + 1,), ``loss[r]`` is what rank r loses in the method's own metric; it never rises, and ends near zero.
        measured: (k + 1,), the same at the model's output, where the allocation has asked for it.
    """

    up: Tensor
    down: Tensor
    loss: Tensor
    measured: Tensor | None = None

    def measured_between(self, before: "Factorization", again: "Factorization", share: float) -> "Factorization":
        """With the loss that was measured of other factors of this layer ``before``, and ``again`` by ``share``.

        What was measured again is first scaled, rank by rank, as the loss of these factors is to that of those.
        """
        if before.measured is None or again.measured is None:
            return self
        ratio = self.loss / torch.where(again.loss > 0, again.loss, torch.inf)
        measured = before.measured ** (1 - share) * (again.measured * ratio) ** share
        return replace(self, measured=measured.cummin(0).values)

    @classmethod
    def from_spectrum(cls, up: Tensor, down: Tensor, energies: Tensor) -> "Factorization":
        """``energies`` (k,): the loss that each component in turn takes away."""
        tail = energies.flip(0).cumsum(0).flip(0)
        return cls(up, down, torch.cat([tail, tail.new_zeros(1)]))

    def check_finite(self) -> "Factorization":
        for part, name in ((self.up, "up"), (self.down, "down"), (self.loss, "loss")):
            if not torch.isfinite(part).all():
                raise NumericsError(f"the factorization gave NaN or Inf in its {name!r} part.")
        return self


Factorize = Callable[..., Factorization]
"""``f(weight (m, n), stats, *, centered, **options)``: weight and stats in float64, neither changed.

``centered`` says that the bias will absorb (W − Ŵ) μ, so only what varies around the mean μ of x has to be kept."""


@dataclass(frozen=True)
class Method:
    """A registered method, with the allocation, compensation and storage that go with it."""

    name: str
    factorize: Callable[..., Any]
    needs: Needs
    allocation: str
    compensation: str
    storage: Storage

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (self.factorize.__doc__ or "").strip().splitlines()[0]

    @property
    def options(self) -> dict[str, Any]:
        """What ``--option`` sets, and the defaults: the arguments that are given by name."""
        parameters = inspect.signature(self.factorize).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "centered"}


@dataclass(frozen=True)
class LayerMethod(Method):
    """A method that factorizes linear layers, one by one."""

    factorize: Factorize


_METHODS: dict[str, Method] = {}
"""One table for the methods of every kind."""


def enter(method: Method) -> None:
    """Put a method into the table. Raises ValueError where another has its name."""
    if method.name in _METHODS:
        raise ValueError(f"two methods are called {method.name!r}")
    _METHODS[method.name] = method


def method(
    name: str,
    *,
    needs: Needs,
    allocation: str = "uniform-ratio",
    compensation: str = "none",
    storage: Storage = "factors",
) -> Callable[[Factorize], Factorize]:
    """Enter the decorated function as method ``name``."""

    def entered(function: Factorize) -> Factorize:
        enter(LayerMethod(name, function, needs, allocation, compensation, storage))
        return function

    return entered


def available_methods(kind: type[Method] = LayerMethod) -> list[str]:
    """Names of all registered methods of a kind: for linear layers, if none is given."""
    return sorted(name for name, each in _METHODS.items() if isinstance(each, kind))


def find_method(name: str) -> Method:
    """Look a method up. Raises UsageError with the nearest name."""
    return choose(name, _METHODS, "method")


def get_method(name: str) -> LayerMethod:
    """Look a method for layers up. Raises UsageError with the nearest name."""
    return choose(name, {key: each for key, each in _METHODS.items() if isinstance(each, LayerMethod)}, "method")
