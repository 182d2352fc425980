"""A sample of what goes through the layers: enough to see distributions, in bounded memory."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitshrink.errors import DataError
from vitshrink.models.targets import Target
from vitshrink.runtime.modes import evaluating
from vitshrink.statistics.calibration import CalibrationBatch, to_device, token_mask

TOKENS = 1024
"""Tokens kept of each input: several for every channel of a small model, and 16 MB of the widest layer there is."""

TOKENS_A_BATCH = 64


@dataclass(frozen=True, eq=False)
class Activations:
    """Tokens drawn at random, on the CPU.

    Attributes:
        inputs: group of layers → inputs (tokens, n), float32.
        pre_activations: block → outputs (tokens, hidden) of the first layer of its MLP, float32.
    """

    inputs: dict[str, Tensor]
    pre_activations: dict[int, Tensor]


@torch.no_grad()
def sample_activations(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Iterable[CalibrationBatch],
    *,
    seed: int = 0,
    on_batch: Callable[[int], None] = lambda _samples: None,
) -> Activations:
    """Run ``TOKENS / TOKENS_A_BATCH`` batches and keep random tokens, the same ones for all layers; no padding.

    Raises:
        DataError: no batch at all.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[int, list[Tensor]] = {}
    chosen: Tensor | None = None
    mask: Tensor | None = None

    def drawn(activation: Tensor) -> Tensor:
        nonlocal chosen
        tokens = activation[mask] if mask is not None else activation.reshape(-1, activation.shape[-1])
        if chosen is None:
            chosen = torch.randperm(len(tokens), generator=generator)[:TOKENS_A_BATCH]
        return tokens[chosen.to(tokens.device)].float().cpu()

    def hook(target: Target) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(_module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            found = inputs.setdefault(target.input_group, [])
            if len(found) < done + 1:  # the first layer of its group
                found.append(drawn(given[0]))
            if target.role == "fc1":
                outputs.setdefault(target.block, []).append(drawn(output))

        return keep

    device = next(model.parameters()).device
    handles = [model.get_submodule(target.name).register_forward_hook(hook(target)) for target in targets]
    done = 0
    try:
        for batch in batches:
            if done * TOKENS_A_BATCH >= TOKENS:
                break
            chosen, mask = None, token_mask(batch, device)
            with evaluating(model):
                model(**to_device(batch.inputs, device))
            done += 1
            on_batch(next(iter(batch.inputs.values())).shape[0])
    finally:
        for handle in handles:
            handle.remove()
    if not done:
        raise DataError("no calibration batch reached the model: is the data set empty?")
    return Activations(
        {group: torch.cat(found) for group, found in inputs.items()},
        {block: torch.cat(found) for block, found in outputs.items()},
    )
