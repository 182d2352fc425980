"""How much each token counts at the inputs of layers, by the gradients at their outputs."""

from collections.abc import Collection, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.models.targets import first_blocks
from vitshrink.runtime.modes import frozen
from vitshrink.runtime.offloading import at_home
from vitshrink.runtime.precision import Passes
from vitshrink.statistics.calibration import CalibrationBatch, to_device, token_mask
from vitshrink.statistics.curvature import clipping, token_weights
from vitshrink.statistics.functionals import batch_generator, random_functional, require_gradient
from vitshrink.statistics.recomputing import recomputing


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


def weigh_tokens(
    model: PreTrainedModel,
    weights: TokenWeights,
    batches: Iterable[CalibrationBatch],
    *,
    seed: int = 0,
    first: int = 0,
    passes: Passes = nullcontext,
) -> None:
    """Find the weights of tokens by one forward and one backward pass over all batches.

    ``first`` is the number of the first batch in the whole of the data.
    """
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        for block in first_blocks(model):
            stack.callback(block.register_forward_pre_hook(require_gradient).remove)
        weights.attach(model, stack)
        for number, batch in enumerate(batches, first):
            weights.begin(token_mask(batch, device))
            with torch.enable_grad(), recomputing(model):
                with passes():
                    outputs = model(**to_device(batch.inputs, device))
                functional = random_functional(model, outputs, batch, batch_generator(seed, number))
                torch.autograd.backward(functional(outputs).sum())
