"""The table of structures, and how each is found again: from a checkpoint's config, and from a module of a model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from vitshrink.errors import CheckpointError

LINEAR = "low-rank"
"""The structure of an entry that names none: a linear layer as two factors."""


@runtime_checkable
class Structure(Protocol):
    """What a checkpoint says of one module that is not the dense model's; modules carry theirs as ``spec``.

    Besides, a tensor of the module must have the name of one that the dense model has, and another shape: that is what
    stops transformers from loading the checkpoint, in part at random, where vitshrink is not imported.
    """

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as they stand in the config."""

    @classmethod
    def from_dict(cls, entry: Any) -> Self:
        """The inverse. Raises CheckpointError for an entry that this version does not write."""

    def fits(self, module: nn.Module) -> bool:
        """Whether it can stand in the place of this module."""

    def build(self, module: nn.Module) -> nn.Module:
        """What takes the place of ``module``: new parameters empty, on its device and in its type, others kept.

        Raises CheckpointError where the numbers do not fit the module.
        """


@runtime_checkable
class Connected(Structure, Protocol):
    """A structure that reads something of another module, by its name relative to the base model."""

    @property
    def source(self) -> str: ...

    def finds_its_source(self, module: nn.Module, base: nn.Module) -> bool:
        """Whether what ``module`` reads is still the module of that name."""

    def connect(self, module: nn.Module, base: nn.Module) -> None:
        """Let ``module``, which has this structure, find the other one in the base model. Raises CheckpointError."""


Kind = TypeVar("Kind", bound=type)

_STRUCTURES: dict[str, Any] = {}


def structure(kind: str) -> Callable[[Kind], Kind]:
    """Enter the decorated class as structure ``kind``."""

    def enter(cls: Kind) -> Kind:
        if kind in _STRUCTURES:
            raise ValueError(f"two structures are called {kind!r}")
        _STRUCTURES[kind] = cls
        return cls

    return enter


def describe(found: Structure) -> dict[str, Any]:
    """The entry of a structure in a checkpoint's config."""
    kind = next(name for name, cls in _STRUCTURES.items() if cls is type(found))
    return found.to_dict() if kind == LINEAR else {"structure": kind, **found.to_dict()}


def kind_of(entry: Any) -> str:
    """The kind of structure that an entry of a checkpoint's config is about."""
    return str(entry.get("structure", LINEAR)) if isinstance(entry, dict) else LINEAR


def read(entry: Any) -> Structure:
    """The structure that an entry describes. Raises CheckpointError."""
    kind = kind_of(entry)
    if kind not in _STRUCTURES:
        raise CheckpointError(
            f"the checkpoint contains a structure {kind!r}, but this version knows only "
            f"{', '.join(sorted(_STRUCTURES))}. Upgrade vitshrink."
        )
    cls = _STRUCTURES[kind]
    if kind == LINEAR:
        found: Structure = cls.from_dict(entry)
    else:
        found = cls.from_dict({name: value for name, value in entry.items() if name != "structure"})
    return found


def read_entry(
    entry: Any,
    numbers: Iterable[str],
    *,
    optional: Iterable[str] = (),
    choices: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> dict[str, Any]:
    """What a structure says of itself: positive whole numbers, and words of which each has its ``choices``.

    Raises CheckpointError for an entry that lacks one of them, has others, or other values.
    """
    required, known = {*numbers, *choices}, {*numbers, *choices, *optional}
    fits = isinstance(entry, dict) and required <= set(entry) <= known
    if not fits or not all(
        value in choices[name] if name in choices else type(value) is int and value > 0 for name, value in entry.items()
    ):
        words = "".join(f", and a {name} of {', '.join(found)}" for name, found in choices.items())
        raise unreadable(entry, f"positive whole numbers for {', '.join(sorted(known - set(choices)))}{words}")
    return dict(entry)


def unreadable(entry: Any, expected: str) -> CheckpointError:
    """What there is to say of an entry that no version up to this one writes."""
    return CheckpointError(
        f"cannot read the description {entry!r}: expected {expected}. "
        "The checkpoint is damaged or was written by a newer vitshrink."
    )


def structure_of(module: nn.Module) -> Structure | None:
    """The structure of a module; None where it is one of the dense model's."""
    spec: Any = getattr(module, "spec", None)
    return spec if type(spec) in _STRUCTURES.values() else None


def connect(base: nn.Module) -> None:
    """Let the modules of a base model that read others find them, once all of them are there."""
    for module in base.modules():
        if isinstance(spec := structure_of(module), Connected):
            spec.connect(module, base)


@torch.no_grad()
def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters of these names; cast once, here."""
    for name, tensor in tensors.items():
        module.get_parameter(name).copy_(tensor)
