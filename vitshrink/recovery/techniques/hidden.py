"""What the blocks of a model hand on, beside what the dense model's do: targets at every token, not one a sample.

Few samples then say much: a hint for each block, as in Romero et al., "FitNets" (arXiv 1412.6550), but from a dense
model of the same widths, so that nothing has to be projected.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.config.options import FinetuneConfig
from vitshrink.models.blocks import hidden_of
from vitshrink.models.targets import blocks_of
from vitshrink.recovery.checks import asks_dense, tokens_kind
from vitshrink.recovery.objectives import Term

FEATURES = 5.0
"""Weight of the blocks' outputs, where they are far from the dense model's, or labels must be heard."""
MOST_FEATURES = 200.0
"""The same where a distillation begins near: a few hundred samples teach by it, and overfit without."""


class BlockOutputs:
    """The hidden states that the blocks of two models gave in their last passes, gradients included."""

    def __init__(self) -> None:
        self.compressed: dict[int, Tensor] = {}
        """(batch, tokens, width) by block."""
        self.dense: dict[int, Tensor] = {}

    def error(self, mask: Tensor | None) -> Tensor:
        """The mean over the blocks of ``unexplained``; the last passes are then forgotten."""
        errors = [unexplained(output, self.dense[index], mask) for index, output in self.compressed.items()]
        self.compressed.clear()
        self.dense.clear()
        return torch.stack(errors).mean()


def unexplained(output: Tensor, wanted: Tensor, mask: Tensor | None, weights: Tensor | None = None) -> Tensor:
    """Squared error over the variance of what is wanted, (batch, tokens, width) both, at the real tokens; ().

    Errors count by the ``weights`` (tokens, width) of their places, of mean 1.
    """
    errors, wanted = (output.float() - wanted.float()).square(), wanted.float()
    if weights is not None:
        errors = errors * weights[: errors.shape[1]]
    if mask is not None:
        errors, wanted = errors[mask], wanted[mask]
    return errors.mean() / wanted.var().clamp_min(1e-12)


@contextmanager
def observed_blocks(model: PreTrainedModel, dense: PreTrainedModel) -> Iterator[BlockOutputs]:
    """Inside, every pass of the two models leaves what their blocks gave."""
    found = BlockOutputs()

    def keep(outputs: dict[int, Tensor], index: int, block: nn.Module) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs[index] = hidden_of(output)

        return block.register_forward_hook(hook)

    with ExitStack() as inside:
        for each, outputs in ((model, found.compressed), (dense, found.dense)):
            for index, block in enumerate(blocks_of(each)):
                inside.callback(keep(outputs, index, block).remove)
        yield found


@contextmanager
def near_blocks(model: PreTrainedModel, dense: PreTrainedModel, weight: float) -> Iterator[Term]:
    """Inside, the term adds ``weight`` times the error of the blocks' outputs of ``model``; both models have to run."""
    with observed_blocks(model, dense) as blocks:
        yield lambda mask: weight * blocks.error(mask)


def usual_weight(model: PreTrainedModel, config: FinetuneConfig) -> float:
    """The weight of the blocks' outputs; 0 where the dense model is not asked, or its blocks give something else."""
    if config.features is not None:
        return config.features
    comparable = asks_dense(config) and not (config.bdia or config.reversible or tokens_kind(model) is not None)
    return FEATURES if comparable else 0.0


def weight_from(start: float, nothing: float) -> float:
    """The weight in distillation: less, the more is lost at the ``start`` of what saying ``nothing`` loses.

    A model that has lost nearly all of them has to learn them anew, and what its blocks hand on is of no use before.
    """
    kept = max(0.0, 1 - start / max(nothing, 1e-12))
    return max(FEATURES, MOST_FEATURES * kept**2)
