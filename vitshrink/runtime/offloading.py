"""A model that a device has no room for: its blocks are there one at a time, while they run.

All else stays where the model is, at home: the weights, so that whoever reads them between two passes finds them, what
enters and leaves a block, and every sum over what was seen inside. The hooks of accelerate leave modules without
weights between two passes, and belong to one model: views of it, which share its weights, would run with those of
another.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

_MARK = "_vitshrink_runs_on"
"""What a block that runs elsewhere has, and all views of it."""

_away: set[torch.device] = set()
"""Devices with nothing but blocks that run."""

_running: dict[nn.Module, list[tuple[dict[str, Any], str, Any]]] = {}
"""Blocks that are there now, with what they have at home."""


def offload(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Have blocks run on a device from now on, each with a copy of its weights there that is gone afterwards.

    Gradients pass; weights get none. Views of the blocks do the same.
    """
    _away.add(device)
    for block in blocks:
        setattr(block, _MARK, device)
        block.register_forward_pre_hook(_enter, with_kwargs=True)
        block.register_forward_hook(_leave, with_kwargs=True, always_call=True)


def recall(blocks: Iterable[nn.Module]) -> None:
    """Have blocks run at home again."""
    for block in blocks:
        vars(block).pop(_MARK, None)


def runs_on(block: nn.Module) -> torch.device | None:
    """The device that a block is sent to; None where it runs at home."""
    found: torch.device | None = getattr(block, _MARK, None)
    return found if found in _away else None


def device_of_passes(model: nn.Module) -> torch.device:
    """Where the blocks of a model run."""
    sent = (runs_on(module) for module in model.modules())
    return next((device for device in sent if device is not None), next(model.parameters()).device)


@contextmanager
def stopped() -> Iterator[None]:
    """All blocks run at home inside."""
    sent = set(_away)
    _away.clear()
    try:
        yield
    finally:
        _away.update(sent)


def at_home(tensor: Tensor) -> Tensor:
    """What was seen inside a block, where the model is."""
    return tensor.cpu() if tensor.device in _away else tensor


@contextmanager
def running(block: nn.Module) -> Iterator[None]:
    """A block that was sent to a device has its weights there inside; nothing happens to others."""
    device = runs_on(block)
    if device is None or block in _running:
        yield
        return
    _send(block, device)
    try:
        yield
    finally:
        _return(block)


def _enter(block: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any] | None:
    device = runs_on(block)
    if device is None:
        return None
    _send(block, device)
    return send_to_device(inputs, device), send_to_device(options, device)


def _leave(block: nn.Module, _inputs: Any, _options: Any, output: Any) -> Any:
    if block not in _running:
        return None
    _return(block)
    return None if output is None else send_to_device(output, torch.device("cpu"))


def _send(block: nn.Module, device: torch.device) -> None:
    kept: list[tuple[dict[str, Any], str, Any]] = []
    copies: dict[int, Any] = {}  # by identity, so that what is tied stays so
    for module in block.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in copies:
                    there = tensor.detach().to(device)
                    parameter = isinstance(tensor, nn.Parameter)
                    copies[id(tensor)] = nn.Parameter(there, requires_grad=False) if parameter else there
                kept.append((tensors, name, tensor))
                tensors[name] = copies[id(tensor)]
    _running[block] = kept


def _return(block: nn.Module) -> None:
    for tensors, name, tensor in _running.pop(block, ()):
        tensors[name] = tensor
