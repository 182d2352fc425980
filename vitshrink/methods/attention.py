"""The table of methods that replace a whole attention. Like those for layers: a pure function in a file of its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitshrink.errors import NumericsError, UsageError
from vitshrink.methods.ranks import Storage
from vitshrink.methods.registry import Method, available_methods, enter
from vitshrink.models.structures import Structure
from vitshrink.statistics.needs import Needs
from vitshrink.statistics.stats import LinearStats

ATTENTION = "attention"
"""Where, beside the four roles, a structure may stand: the module that holds the projections."""


@dataclass(frozen=True)
class Dimensions:
    """Of one attention: its heads, the dimension of each, and the width of what it reads."""

    heads: int
    head: int
    width: int


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """One dense attention and what calibration left of it, in float64; expectations are over the calibration tokens.

    Attributes:
        weights: (out, in) by role: query, key, value, output.
        biases: (out,) by role; zeros where the layer has none.
        stats: by role; those of query, key and value are of the same inputs.
        following: of the blocks that a stack has after this one, for parts that cover them all.
    """

    dimensions: Dimensions
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    stats: Mapping[str, LinearStats]
    following: "Sequence[AttentionWeights]" = ()

    def by_head(self, role: str) -> Tensor:
        """(heads, d, n) of a projection of the inputs, (heads, m, d) of the output projection."""
        weight, heads = self.weights[role], self.dimensions.heads
        if role == "output":
            return weight.reshape(weight.shape[0], heads, -1).transpose(0, 1)
        return weight.reshape(heads, -1, weight.shape[1])

    def bias_by_head(self, role: str) -> Tensor:
        """(heads, d)"""
        return self.biases[role].reshape(self.dimensions.heads, -1)

    def covariance(self, role: str) -> Tensor:
        """Of the inputs around their mean, (n, n). Raises NumericsError where it was not collected."""
        return self.stats[role].covariance(centered=True)

    def mean(self, role: str) -> Tensor:
        """Of the inputs, (n,)."""
        return self.stats[role].mean


@dataclass(frozen=True, eq=False)
class Part:
    """What an attention method offers to choose the rank of.

    Attributes:
        loss: by rank, from 0; what the rank loses in the method's metric. Never rises.
        tensors: from a rank to the values of the parameters that change, by place (a role, or ``attention``) and name.
    """

    loss: Tensor
    tensors: Callable[[int], dict[str, dict[str, Tensor]]]

    def check_finite(self) -> "Part":
        if not torch.isfinite(self.loss).all():
            raise NumericsError("the factorization gave NaN or Inf.")
        return self


def tail(energies: Tensor) -> Tensor:
    """(k,) what each component takes away, to (k + 1,) what is left at every rank."""
    left = energies.flip(0).cumsum(0).flip(0)
    return torch.cat([left, left.new_zeros(1)])


Decompose = Callable[..., dict[str, Part]]
"""``f(attention, ranks, parts, *, **options)``: the parts asked for, for the ranks on offer; nothing is changed."""

Structures = Callable[..., dict[str, Structure]]
"""``f(dimensions, ranks by part, **options)``: what stands where at these ranks; parts that are left out stay."""


@dataclass(frozen=True, kw_only=True)
class AttentionMethod(Method):
    """A registered method for attentions."""

    factorize: Decompose
    structures: Structures
    parts: Mapping[str, tuple[str, ...]]
    """What there is to choose the rank of, and the roles it replaces."""
    ranks: Callable[..., Sequence[int]]
    extra: str | None = None
    """The optional extra that it needs."""
    stacked: Mapping[str, Callable[[str, int], Structure]] = field(default_factory=dict)
    """Parts that cover as many attentions in a row as the option ``blocks`` says, and what stands in the place of the
    second and the others: made from the name of the first, and their number."""

    def require(self, *, layers: str, storage: Storage, allocation: str) -> None:
        """Raises UsageError for what makes no sense with a method of attentions, before any work."""
        if layers == "mlp":
            raise UsageError(
                f"--method {self.name} replaces attentions, and --layers mlp excludes them: use --layers attention."
            )
        if allocation == "measured":
            raise UsageError(
                f"--allocation measured works on linear layers: it cannot be used with --method {self.name}."
            )
        if storage != "factors":
            raise UsageError(
                f"--method {self.name} has its own storage form: --storage {storage} works on linear layers only."
            )


def below_head_dimension(dimensions: Dimensions) -> Sequence[int]:
    return range(1, dimensions.head)


def attention_method(
    name: str,
    *,
    parts: Mapping[str, tuple[str, ...]],
    structures: Structures,
    ranks: Callable[..., Sequence[int]] = below_head_dimension,
    allocation: str = "energy",
    extra: str | None = None,
    stacked: Mapping[str, Callable[[str, int], Structure]] | None = None,
) -> Callable[[Decompose], Decompose]:
    """Enter the decorated function as method ``name``."""

    def entered(function: Decompose) -> Decompose:
        enter(
            AttentionMethod(
                name=name,
                factorize=function,
                needs=Needs.COVARIANCE,
                allocation=allocation,
                compensation="none",
                storage="factors",
                structures=structures,
                parts=parts,
                ranks=ranks,
                extra=extra,
                stacked=stacked or {},
            )
        )
        return function

    return entered


def attention_methods() -> list[str]:
    """Names of all registered methods for attentions."""
    return available_methods(AttentionMethod)
