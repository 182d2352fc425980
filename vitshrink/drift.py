"""Drift: what the mean activations of a compressed model have moved away from the dense model's, and taking it back."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.calibration import CalibrationBatch
from vitshrink.models import Target, blocks_of, family_of
from vitshrink.sequential import HiddenBatch, hidden_batches, stages

Means = dict[str, Tensor]
"""Layer → mean (m,) of what it hands on, float64."""


class _SeenEnoughError(Exception):
    """Ends a pass through a block that has reached the last layer of interest."""


class Watch:
    """The inputs and outputs of some layers of a block during one pass, which ends at the layer ``last``."""

    def __init__(self, model: PreTrainedModel, targets: Sequence[Target], last: Target) -> None:
        self.model = model
        self.targets = {target.role: target for target in targets}
        self.last = last.role
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def run(self, block: nn.Module, batch: HiddenBatch) -> Tensor | None:
        """Pass a batch through the block; returns its output, or None when the pass ended before."""
        with ExitStack() as hooks:
            for role, target in self.targets.items():
                handle = self.model.get_submodule(target.name).register_forward_hook(self._hook(role))
                hooks.callback(handle.remove)
            try:
                return batch.through(block)
            except _SeenEnoughError:
                return None

    def handed_on(self, role: str, batch: HiddenBatch, block_output: Tensor | None) -> Tensor:
        """What the rest of the model gets to see of a layer: its output, or the residual stream after it.

        A shift that the residual stream has already can be taken back where a layer writes to it, and only there.
        """
        if role == "output":
            return batch.hidden + self.outputs[role]
        if role == "fc2" and block_output is not None and family_of(self.model).norm == "before":
            return block_output
        if role == "fc2" and "fc1" in self.inputs:
            return self.inputs["fc1"] + self.outputs[role]
        return self.outputs[role]

    def _hook(self, role: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[role], self.outputs[role] = inputs[0], output
            if role == self.last and role != "fc2":
                raise _SeenEnoughError

        return hook


@torch.no_grad()
def correct_drift(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    targets: Sequence[Target],
    token_weights: Mapping[str, Tensor],
    batches: Sequence[CalibrationBatch],
    *,
    on_block: Callable[[int], None] = lambda _blocks: None,
) -> None:
    """Set the biases of the compressed ``model`` so that every layer's mean output is the dense model's, in place.

    Truncation leaves each mean as it was for the inputs of the dense model, but the inputs that arrive have been
    through the compressed layers before, and what is lost there does not average out behind an activation function.
    The blocks are walked in order, the layers of each as a forward pass meets them, and each mean is restored before
    the next is measured. No size changes: every bias that is corrected was there before.

    Args:
        token_weights: for every target the weights (tokens,) of the calibration tokens in the mean.
    """
    streams = [hidden_batches(each, blocks_of(each)[0], batches) for each in (dense, model)]
    by_block = {block: [group for _, group in found] for block, found in groupby(stages(targets), key=lambda s: s[0])}
    for index, (dense_block, block) in enumerate(zip(blocks_of(dense), blocks_of(model), strict=True)):
        groups = by_block.get(index, [])
        watched = [target for group in groups for target in group]
        wanted = _means(dense, dense_block, watched, watched, token_weights, streams[0]) if watched else {}
        for group in groups:
            found = _means(model, block, watched, group, token_weights, streams[1])
            for target in group:
                bias = model.get_submodule(target.name).bias
                if isinstance(bias, Tensor):
                    bias.add_((wanted[target.name] - found[target.name]).to(bias))
        for stream, each in zip(streams, (dense_block, block), strict=True):
            for batch in stream:
                batch.hidden = batch.through(each)
        on_block(1)


def _means(
    model: PreTrainedModel,
    block: nn.Module,
    watched: Sequence[Target],
    wanted: Sequence[Target],
    token_weights: Mapping[str, Tensor],
    batches: Sequence[HiddenBatch],
) -> Means:
    """Weighted means of what the ``wanted`` layers of a block hand on."""
    watch = Watch(model, watched, wanted[-1])
    sums: dict[str, Tensor] = {}
    start = 0
    for batch in batches:
        output = watch.run(block, batch)
        count = batch.hidden[..., 0].numel() if batch.mask is None else int(batch.mask.sum())
        for target in wanted:
            handed = watch.handed_on(target.role, batch, output)
            tokens = handed.reshape(-1, handed.shape[-1]) if batch.mask is None else handed[batch.mask]
            weights = token_weights[target.name][start : start + count].to(tokens)
            total = (weights @ tokens.float()).double()
            sums[target.name] = sums[target.name] + total if target.name in sums else total
        start += count
    return {
        target.name: sums[target.name] / token_weights[target.name].double().sum().to(sums[target.name])
        for target in wanted
    }
