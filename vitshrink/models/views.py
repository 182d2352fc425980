"""Models that share their weights: a view has modules of its own, which may be replaced, and the tensors of another."""

import copy
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

Model = TypeVar("Model", bound=PreTrainedModel)
Module = TypeVar("Module", bound=nn.Module)


def view_of(model: Model) -> Model:
    """A model of the same modules and tensors whose modules may be replaced without a trace in ``model``.

    Changing a tensor in place would change it in both: see ``own``.
    """
    made: dict[nn.Module, nn.Module] = {}
    viewed = _module(model, made)
    assert isinstance(viewed, type(model))
    viewed.config = copy.deepcopy(model.config)
    return viewed


def _module(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in made:
        twin = module.__new__(type(module))
        twin.__dict__ = dict(module.__dict__)
        for name, kept in module.__dict__.items():
            if name.startswith("_") and isinstance(kept, dict | set):  # parameters, buffers, hooks
                twin.__dict__[name] = copy.copy(kept)
        made[module] = twin
        twin._modules = {name: None if each is None else _module(each, made) for name, each in module._modules.items()}
    return made[module]


@torch.no_grad()
def own(model: Module) -> Module:
    """Give a view, or a module of one, tensors of its own, in place; tied ones stay tied."""
    return _changed(model, Tensor.clone)


@torch.no_grad()
def cast_view(model: Model, dtype: torch.dtype) -> Model:
    """Give a view floating-point tensors of a type, in place; those that have it stay shared."""
    kept = list(computed(model))
    found = _changed(model, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
    for buffers, name, tensor in kept:
        buffers[name] = tensor
    return found


def computed(model: nn.Module) -> Iterator[tuple[dict[str, Tensor | None], str, Tensor]]:
    """The buffers that no file of the model holds, frequencies of rotations for one: they stay as they were computed.

    Of each the buffers that it is one of, its name, and the tensor.
    """
    for module in model.modules():
        for name, tensor in module._buffers.items():
            if tensor is not None and name in module._non_persistent_buffers_set:
                yield module._buffers, name, tensor


def rounded(model: Model, dtype: torch.dtype) -> Model:
    """A view with its floating-point tensors rounded to ``dtype``, and back in their type; in place."""
    kept = model.dtype  # before the cast, which is in place
    return cast_view(cast_view(model, dtype), kept)


def _changed(model: Module, change: Callable[[Tensor], Tensor]) -> Module:
    changed = WeakTensorKeyDictionary()  # by identity, so that what is tied stays so; what is replaced is let go
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in changed:
                    bare = tensor.detach()
                    found = change(bare)
                    if found is bare:
                        found = tensor
                    elif isinstance(tensor, nn.Parameter):
                        found = nn.Parameter(found, requires_grad=tensor.requires_grad)
                    changed[tensor] = found
                tensors[name] = changed[tensor]
    return model
