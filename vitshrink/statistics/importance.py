"""How much each token counts at the inputs of layers, by the gradients at their outputs."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.models.targets import Target, first_blocks
from vitshrink.runtime.modes import frozen
from vitshrink.runtime.offloading import at_home
from vitshrink.runtime.precision import Passes
from vitshrink.statistics.calibration import CalibrationBatch, to_device, token_mask
from vitshrink.statistics.curvature import clipping, token_weights
from vitshrink.statistics.functionals import batch_generator, random_functional, require_gradient
from vitshrink.statistics.recomputing import recomputing


def weights_of_tokens(
    model: PreTrainedModel,
    targets: Sequence[Target],
    batches: Iterable[CalibrationBatch],
    *,
    seed: int = 0,
    first: int = 0,
    passes: Passes = nullcontext,
) -> list[dict[str, Tensor]]:
    """For every batch the weights (batch, tokens) of its tokens in C, by target; padding has none.

    They are those of ``collect_curvature`` for a layer that is the only one to read its input, from one forward and one
    backward pass. ``first`` is the number of the first batch in the whole of the data.
    """
    device = next(model.parameters()).device
    found: list[dict[str, Tensor]] = []
    mask: Tensor | None = None

    def see(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _grad_input: Any, grad_output: Any) -> None:
            gradient = grad_output[0].detach().float()
            real = torch.ones(gradient.shape[:2], dtype=torch.bool) if mask is None else mask
            real = real.to(gradient.device)
            norms = gradient[real].norm(dim=1, keepdim=True)
            weights = gradient.new_zeros(gradient.shape[:2])
            weights[real] = token_weights([(norms * clipping(norms)).square().squeeze(1)])
            found[-1][name] = at_home(weights)

        return hook

    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        for block in first_blocks(model):
            stack.callback(block.register_forward_pre_hook(require_gradient).remove)
        for target in targets:
            stack.callback(model.get_submodule(target.name).register_full_backward_hook(see(target.name)).remove)
        for number, batch in enumerate(batches, first):
            mask = token_mask(batch, device)
            found.append({})
            with torch.enable_grad(), recomputing(model):
                with passes():
                    outputs = model(**to_device(batch.inputs, device))
                functional = random_functional(model, outputs, batch, batch_generator(seed, number))
                torch.autograd.backward(functional(outputs).sum())
    return found
