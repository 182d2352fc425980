"""Backward passes in little memory: the activations inside a block are computed again when its turn comes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from vitshrink.models.targets import blocks_of

SHARE = 1 / 8
"""Of the memory that is free: what the activations of all blocks may take before they are computed twice."""


@dataclass(eq=False)
class Recomputing:
    """Decides pass by pass whether the blocks of a model keep their activations; the gradients are the same."""

    blocks: nn.ModuleList
    share: float = SHARE
    recomputes: bool = False
    _numbers: int = field(init=False)
    """Of a token: what the linear layers of all blocks read and give."""

    def __post_init__(self) -> None:
        layers = [module for module in self.blocks.modules() if isinstance(module, nn.Linear)]
        self._numbers = sum(layer.in_features + layer.out_features for layer in layers)

    def decide(self, hidden: Tensor) -> None:
        """For a pass in which the first block reads ``hidden`` (samples, tokens, width)."""
        tokens = hidden.numel() // hidden.shape[-1]
        self.recomputes = 4 * tokens * self._numbers > self.share * free_memory(hidden.device)

    def forward(self, block: nn.Module, dense: Callable[..., Any]) -> Callable[..., Any]:
        """What stands for the ``forward`` of a block, which is ``dense``."""

        def forward(*inputs: Any, **options: Any) -> Any:
            if not inputs or not isinstance(inputs[0], Tensor):
                return dense(*inputs, **options)
            hidden, *rest = inputs
            if block is self.blocks[0]:
                self.decide(hidden)
            if not (self.recomputes and torch.is_grad_enabled() and hidden.requires_grad):
                return dense(hidden, *rest, **options)
            # hooks inside see one pass with gradients, the second: the first one has none. Some blocks change what they
            # read in place, which a leaf does not allow
            return checkpoint(
                lambda x: dense(x.clone(), *rest, **options), hidden, use_reentrant=True, preserve_rng_state=False
            )

        return forward


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


@contextmanager
def recomputing(model: PreTrainedModel, share: float = SHARE) -> Iterator[Recomputing]:
    """Inside, passes over ``model`` whose activations would take more than a share of the free memory take less.

    They compute every block twice: a third more time. Hooks on modules of a block are called again in the backward
    pass, then with gradients.
    """
    found = Recomputing(blocks_of(model), share)
    for block in found.blocks:
        block.forward = found.forward(block, block.forward)
    try:
        yield found
    finally:
        for block in found.blocks:
            vars(block).pop("forward", None)
