"""What errors of the outputs of each block cost, by their place, and the inputs of layers as they count by it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.models.blocks import hidden_of
from vitshrink.models.targets import blocks_of
from vitshrink.recovery.training_set import TrainingBatch
from vitshrink.runtime.modes import frozen
from vitshrink.statistics.functionals import batch_generator, random_functional, require_gradient
from vitshrink.statistics.sensitivity import WEIGHTS

SHRINKAGE = 0.5
"""How far channels are pulled towards their mean: a few hundred samples overrate what they saw."""


@dataclass(frozen=True, eq=False)
class Importance:
    """Mean squared gradients at the blocks' outputs, (blocks, tokens) and (blocks, width), both of mean 1."""

    places: Tensor
    channels: Tensor

    def weights(self, block: int) -> Tensor:
        """What an error of the block's output counts, (tokens, width), of mean 1."""
        return self.places[block][:, None] * self.channels[block]

    def tokens(self, block: int) -> Tensor:
        """What a token counts where the inputs of a layer are summed, (tokens,); those of block -1 are the first's."""
        return self.places[max(0, block)].clamp(*WEIGHTS)


def importance_of(dense: PreTrainedModel, batches: Sequence[TrainingBatch], seed: int, longest: int) -> Importance:
    """By one forward and one backward pass of a random functional of the dense model's outputs.

    Places up to the ``longest`` text that none of the batches has count as the mean does.
    """
    blocks, sums = list(blocks_of(dense)), _Sums()
    outputs: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: object) -> None:
        hidden = hidden_of(output)
        hidden.retain_grad()
        outputs.append(hidden)

    with frozen(dense), torch.enable_grad():
        handles = [blocks[0].register_forward_pre_hook(require_gradient)]
        handles += [block.register_forward_hook(keep) for block in blocks]
        try:
            for number, batch in enumerate(batches):
                outputs.clear()
                answer = dense(**batch.inputs)
                functional = random_functional(dense, answer, batch, batch_generator(seed, number))
                torch.autograd.backward(functional(answer).sum())
                sums.add(outputs, batch.token_mask)
        finally:
            for handle in handles:
                handle.remove()
    return sums.found(longest)


class _Sums:
    """Over samples; places that only long texts have are seen by these alone."""

    def __init__(self) -> None:
        self.places = self.counts = self.channels = torch.zeros(0)

    def add(self, outputs: Sequence[Tensor], mask: Tensor | None) -> None:
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in outputs]
        squares = torch.stack([each.float().square() for each in gradients])
        real = torch.ones(squares.shape[1:3], device=squares.device) if mask is None else mask.float()
        squares = squares * real[..., None]
        self.places = _sum(self.places, squares.sum((1, 3)))
        self.counts = _sum(self.counts, real.sum(0)[None])
        self.channels = _sum(self.channels, squares.sum((1, 2)))

    def found(self, longest: int) -> Importance:
        tiny = torch.finfo(torch.float32).tiny
        places = self.places / self.counts.clamp_min(1)
        channels = self.channels / self.channels.mean(1, keepdim=True).clamp_min(tiny)
        channels = (1 - SHRINKAGE) * channels + SHRINKAGE
        places = places / places.mean(1, keepdim=True).clamp_min(tiny)
        return Importance(F.pad(places, (0, max(0, longest - places.shape[1])), value=1.0), channels)


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """Of (…, tokens), the shorter one taken to end in zeros."""
    if a.numel() == 0:
        return b
    length = max(a.shape[-1], b.shape[-1])
    return F.pad(a, (0, length - a.shape[-1])) + F.pad(b, (0, length - b.shape[-1]))


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a layer reads: covariance (n, n) and mean (n,), float64, and how many tokens of one weight say as much."""

    covariance: Tensor
    mean: Tensor
    tokens: float


class InputSums:
    """Over weighted tokens, float64."""

    def __init__(self) -> None:
        self.gram: Tensor | None = None
        self.total = self.weight = self.squared = torch.zeros(())

    def add(self, x: Tensor, mask: Tensor | None, tokens: Tensor) -> None:
        """``x`` (batch, tokens, n); ``tokens``: what each place counts."""
        weights = tokens[: x.shape[1]].expand(x.shape[:2])
        x, weights = (x.flatten(0, 1), weights.flatten()) if mask is None else (x[mask], weights[mask])
        weighted = x.float() * weights[:, None]
        gram, total = (x.float().T @ weighted).double(), weighted.sum(0).double()
        if self.gram is None:
            self.gram, self.total = gram, total
        else:
            self.gram, self.total = self.gram + gram, self.total + total
        self.weight = self.weight.to(weights) + weights.sum()
        self.squared = self.squared.to(weights) + weights.square().sum()

    def found(self) -> Inputs:
        assert self.gram is not None
        mean = self.total / self.weight
        covariance = self.gram / self.weight - torch.outer(mean, mean)
        return Inputs(covariance, mean, float(self.weight**2 / self.squared))
