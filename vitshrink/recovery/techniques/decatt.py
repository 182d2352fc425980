"""DeCAtt: heads of one attention layer that do not say the same.

Bhattacharyya et al., "DeCAtt: Efficient Vision Transformers with Decorrelated Attention Heads", CVPR Workshops 2023.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.models.families import family_of
from vitshrink.models.targets import blocks_of
from vitshrink.recovery.objectives import Term


class HeadOutputs:
    """What the attention heads of every block gave in the last pass of a model, gradients included."""

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self.layers: dict[int, Tensor] = {}
        """(batch, tokens, heads × head width) by block; a backward pass that recomputes activations gives them anew."""

    def correlation(self, mask: Tensor | None) -> Tensor:
        """The mean of ``head_correlation`` over the layers of the last pass, which is then forgotten."""
        layers, self.layers = self.layers, {}
        return torch.stack([head_correlation(layers[index], self.heads, mask) for index in sorted(layers)]).mean()


def head_correlation(outputs: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Σ_{i≠j} ρ_ij² over the heads of a layer, averaged over the batch.

    Args:
        outputs: (batch, tokens, heads × head width).
        mask: (batch, tokens), True at real tokens; None where all are.

    ρ_ij is the correlation of two heads' outputs, each unrolled over tokens and channels to one vector a sample.
    """
    batch, tokens, width = outputs.shape
    unrolled = outputs.float().view(batch, tokens, heads, width // heads)
    weight = torch.ones(batch, tokens, device=outputs.device) if mask is None else mask.to(unrolled)
    weight = weight[:, :, None, None]
    count = weight.sum(1, keepdim=True) * (width // heads)
    unrolled = (unrolled - (unrolled * weight).sum((1, 3), keepdim=True) / count) * weight
    rows = unrolled.transpose(1, 2).flatten(2)
    rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny ** 0.5)
    correlation = rows @ rows.transpose(1, 2)
    off_diagonal: Tensor = correlation * (1 - torch.eye(heads, device=correlation.device))
    squared: Tensor = off_diagonal.square()
    return squared.sum((1, 2)).mean()


@contextmanager
def observed_heads(model: PreTrainedModel) -> Iterator[HeadOutputs]:
    """Inside, every pass in training mode leaves the outputs of its attention heads, as the output projection reads."""
    found = HeadOutputs(model.config.num_attention_heads)

    def keep(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                found.layers[index] = inputs[0]

        return hook

    path = family_of(model).modules["output"]
    outputs = [block.get_submodule(path) for block in blocks_of(model)]
    handles = [output.register_forward_pre_hook(keep(index)) for index, output in enumerate(outputs)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def decorrelated_heads(model: PreTrainedModel, weight: float) -> Iterator[Term]:
    """Inside, the term adds ``weight`` times the correlation of the attention heads of ``model``."""
    with observed_heads(model) as heads:
        yield lambda mask: weight * heads.correlation(mask)
