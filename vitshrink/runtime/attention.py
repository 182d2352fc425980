"""Attention of short texts, differentiated on a CPU."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vitshrink.runtime.precision import in_full

SHORT = 128
"""Tokens up to which this is faster."""


class ShortInFull(TorchFunctionMode):
    """Inside, attention over few tokens runs in float32 on a CPU, whatever the passes run in, for their gradients.

    The backward pass of torch 2.13 in bfloat16 multiplies small matrices without the instructions for it: with texts of
    twenty tokens it takes seven times as long as in float32, and more than all the rest of a pass. Both take as long
    from 200 tokens on, as those of images, where float32 would take more room.
    """

    def __torch_function__(
        self, function: Any, types: Any, inputs: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        options = options or {}
        if function is F.scaled_dot_product_attention:
            query = inputs[0] if inputs else options["query"]
            if query.device.type == "cpu" and query.shape[-2] <= SHORT and _narrow(query):
                with in_full(query.device):
                    found = function(*map(_wide, inputs), **{name: _wide(each) for name, each in options.items()})
                return found.to(query.dtype)
        return function(*inputs, **options)


def short_in_full(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with attention as in ``ShortInFull``."""

    def inside(*inputs: Any, **options: Any) -> Any:
        with ShortInFull():
            return run(*inputs, **options)

    return inside


def _narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _wide(value: Any) -> Any:
    return value.float() if _narrow(value) else value
