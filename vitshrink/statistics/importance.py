"""How much each token counts at the inputs of layers, by the gradients at their outputs."""

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitshrink.runtime.offloading import at_home
from vitshrink.statistics.curvature import clipping, token_weights


@dataclass(eq=False)
class TokenWeights:
    """Hooks that turn the gradients at the outputs of layers into the weights of the tokens that these read in C.

    They are those of ``collect_curvature`` for a layer that is the only one to read its input.
    """

    names: Collection[str]
    """Of the layers."""
    found: list[dict[str, Tensor]] = field(default_factory=list)
    """For every batch the weights (batch, tokens) of its tokens, by layer; padding has none."""
    _mask: Tensor | None = None

    def attach(self, model: nn.Module, stack: ExitStack) -> None:
        """Before the first batch."""
        self.found.clear()
        for name in self.names:
            stack.callback(model.get_submodule(name).register_forward_hook(partial(self._watch, name)).remove)

    def begin(self, mask: Tensor | None) -> None:
        """Before each batch, with its mask (batch, tokens) of real tokens."""
        self._mask = mask
        self.found.append({})

    def _watch(self, name: str, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():  # not in a block that is computed again
            output.register_hook(partial(self._see, name))  # type: ignore[no-untyped-call]

    def _see(self, name: str, gradient: Tensor) -> None:
        gradient = gradient.detach().float()
        real = torch.ones(gradient.shape[:2], dtype=torch.bool) if self._mask is None else self._mask
        real = real.to(gradient.device)
        norms = gradient[real].norm(dim=1, keepdim=True)
        weights = gradient.new_zeros(gradient.shape[:2])
        weights[real] = token_weights([(norms * clipping(norms)).square().squeeze(1)])
        self.found[-1][name] = at_home(weights)
