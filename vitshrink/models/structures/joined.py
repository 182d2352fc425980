"""Modules of the dense model that are made another kind in place, the dense class staying a base of theirs."""

from typing import Any, SupportsIndex

from torch import nn


class Joined(nn.Module):
    """A kind that modules of several dense classes become; the classes of both are made when they are needed."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """What is pickled names the two classes: that which is made of them can be imported from nowhere."""
        whole = super().__reduce_ex__(protocol)
        assert isinstance(whole, tuple)
        return (_blank, type(self).__bases__, *whole[2:])


def join(module: nn.Module, kind: type[Joined]) -> None:
    """Make ``module`` one of ``kind``, in place."""
    module.__class__ = _joined(kind, type(module))


_JOINED: dict[tuple[type, type], type[nn.Module]] = {}


def _joined(kind: type[Joined], base: type[nn.Module]) -> type[nn.Module]:
    if (kind, base) not in _JOINED:
        # "Mixed" of MixedEmbeddings and ViTEmbeddings: each kind is named for what it changes
        own = kind.__name__.removesuffix("Attention").removesuffix("Embeddings")
        _JOINED[kind, base] = type(f"{own}{base.__name__}", (kind, base), {})
    return _JOINED[kind, base]


def _blank(kind: type[Joined], base: type[nn.Module]) -> nn.Module:
    """A module as pickle begins with: its state follows."""
    joined = _joined(kind, base)
    return joined.__new__(joined)
