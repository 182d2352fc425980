"""Which layers of a model read what, found by running it once."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.models.blocks import find_blocks, hidden_of
from vitshrink.models.example import example_inputs
from vitshrink.runtime.modes import evaluating
from vitshrink.runtime.offloading import stopped

FEW_TOKENS = 8
"""Of a text that shows what reads what."""


def groups_of(model: PreTrainedModel, names: Sequence[str]) -> dict[str, str]:
    """Of the linear layers of these names, those that run: layer -> the first layer that reads the same tensors."""
    read: dict[str, list[Tensor]] = {name: [] for name in names}

    def see(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            read[name].append(inputs[0])  # kept, so that nothing else gets its identity

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(see(name)).remove)
        _run(model)
    first: dict[tuple[int, ...], str] = {}
    tensors = {name: tuple(map(id, found)) for name, found in read.items() if found}
    return {name: first.setdefault(found, name) for name, found in tensors.items()}


def called(model: PreTrainedModel, names: Sequence[str]) -> set[str]:
    """Those of the modules of these names that run: of others the model takes the weights alone."""
    found: set[str] = set()
    with ExitStack() as stack:
        for name in names:
            hook = partial(_note, found, name)
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook).remove)
        _run(model)
    return found


def _note(found: set[str], name: str, _module: nn.Module, _inputs: object) -> None:
    found.add(name)


def chain_problem(model: PreTrainedModel) -> str | None:
    """Why the blocks cannot be run one after another on what reaches the first of them; None where they can.

    Each has to run once, on what the one before it gives, and with the same arguments besides.
    """
    blocks = find_blocks(model.base_model)
    runs: list[tuple[str, Any, Any, Any]] = []

    def see(name: str) -> Callable[..., None]:
        return lambda _module, inputs, keywords, output: runs.append((name, inputs, keywords, output))

    with ExitStack() as stack:
        for name, block in blocks.items():
            stack.callback(block.register_forward_hook(see(name), with_kwargs=True).remove)
        _run(model, whole=True)
    if [name for name, *_ in runs] != list(blocks):
        return "its blocks are shared and run several times"
    for (_, inputs, keywords, output), (_, after, others, _) in pairwise(runs):
        if not inputs or not after or after[0] is not hidden_of(output):
            return "other operations run between its blocks"
        if not _same((inputs[1:], keywords), (after[1:], others)):
            return "its blocks get different arguments"
    return None


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(each, other[name]) for name, each in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or bool(one == other)


def _run(model: PreTrainedModel, *, whole: bool = False) -> None:
    """One pass of an image, or of a text that is short, or ``whole`` and padded."""
    device, dtype = model.device, model.dtype
    inputs = {
        name: value.to(device, dtype if value.is_floating_point() else None)
        for name, value in example_inputs(model).items()
    }
    if "attention_mask" in inputs and whole:
        inputs["attention_mask"][:, -1] = 0
    elif "attention_mask" in inputs:
        inputs = {name: value[:, :FEW_TOKENS] for name, value in inputs.items()}
    with evaluating(model), torch.no_grad(), stopped():  # what is the same tensor at home
        model(**inputs)
