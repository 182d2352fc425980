"""What takes a training's steps: Muon for the matrices of the blocks, AdamW for everything else."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel

from vitshrink.models.targets import blocks_of

MATRICES = 6.0
"""The learning rate of matrices, in units of that of everything else."""
MOMENTUM = 0.95
BETAS = (0.9, 0.99)


class MuonAndAdamW(Optimizer):
    """Both as one optimizer, since a gradient scaler knows one only.

    Muon (Jordan et al., 2024; arXiv 2502.16982) makes every step of a matrix orthogonal: all its directions move alike,
    those that few samples show as well. ``lr`` of a group is what the training sets, times its ``share``.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], rest: Iterable[nn.Parameter]) -> None:
        self._parts: list[Optimizer] = []
        if matrices := list(matrices):
            muon = Muon(matrices, lr=1.0, weight_decay=0.0, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
            self._parts.append(muon)
        if rest := list(rest):
            self._parts.append(AdamW(rest, lr=1.0, betas=BETAS, weight_decay=0.0, fused=True))
        shares = [MATRICES if isinstance(part, Muon) else 1.0 for part in self._parts]
        groups = [part.param_groups[0] | {"share": share} for part, share in zip(self._parts, shares, strict=True)]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each, on the state that this optimizer saves and loads."""
        loss = None if closure is None else closure()
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
            part.step()
        return loss


def optimizer_of(model: PreTrainedModel, parameters: Iterable[nn.Parameter]) -> MuonAndAdamW:
    """For those ``parameters`` of ``model`` that learn; matrices are those of two dimensions in its blocks."""
    in_blocks = {id(each) for block in blocks_of(model) for each in block.parameters() if each.ndim == 2}
    given = list(parameters)
    return MuonAndAdamW(
        [each for each in given if id(each) in in_blocks], [each for each in given if id(each) not in in_blocks]
    )
