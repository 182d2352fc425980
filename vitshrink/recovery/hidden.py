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

from vitshrink.models.targets import blocks_of


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


def unexplained(output: Tensor, wanted: Tensor, mask: Tensor | None) -> Tensor:
    """Squared error over the variance of what is wanted, (batch, tokens, width) both, at the real tokens; ()."""
    if mask is not None:
        output, wanted = output[mask], wanted[mask]
    wanted = wanted.float()
    return (output.float() - wanted).square().mean() / wanted.var().clamp_min(1e-12)


@contextmanager
def observed_blocks(model: PreTrainedModel, dense: PreTrainedModel) -> Iterator[BlockOutputs]:
    """Inside, every pass of the two models leaves what their blocks gave."""
    found = BlockOutputs()

    def keep(outputs: dict[int, Tensor], index: int, block: nn.Module) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            outputs[index] = output

        return block.register_forward_hook(hook)

    with ExitStack() as inside:
        for each, outputs in ((model, found.compressed), (dense, found.dense)):
            for index, block in enumerate(blocks_of(each)):
                inside.callback(keep(outputs, index, block).remove)
        yield found
