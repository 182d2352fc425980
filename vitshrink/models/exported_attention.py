"""Attention as programs that leave PyTorch compute it: two products and a softmax, without what no model needs there.

The kernel of PyTorch is exported with a mask of booleans where nothing is masked, and with a search for NaN behind the
softmax, for rows of which everything is masked. Runtimes compute both on every entry of every attention map.

Queries and keys that lie on grids are rounded here, right before their product: OpenVINO multiplies integers where it
finds them on both sides, and not behind a change of the layout.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vitshrink.models.structures.attention import layout_of
from vitshrink.models.structures.merging import Merging
from vitshrink.models.structures.static import StaticLinear

NAME = "vitshrink-exported"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Queries, keys and values (batch, heads, tokens, d) to (batch, tokens, heads, d)."""
    query, key = (
        x if layer is None else layer.rounded_output(x)
        for layer, x in zip(_deferring(module), (query, key), strict=True)
    )
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def mask_of(
    *,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **rest: Any,
) -> Tensor | None:
    """What is added to scores: (batch, 1, 1, tokens), for a mask (batch, tokens) of which every row has a token.

    Where not every token sees all others, as transformers has it for attention without a kernel.
    """
    if mask_function is not bidirectional_mask_function:
        found: Tensor = eager_mask(mask_function=mask_function, attention_mask=attention_mask, dtype=dtype, **rest)
        return found
    if attention_mask is None:
        return None
    masked = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    return masked.masked_fill(~attention_mask.bool(), torch.finfo(dtype).min)[:, None, None]


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask_of)


def _layers(module: nn.Module) -> list[StaticLinear | None]:
    """What makes queries and what makes keys in an attention, where the outputs lie on grids."""
    layout = layout_of(module, nn.Module)
    found = [] if layout is None else [getattr(module, layout.query), getattr(module, layout.key)]
    return [layer if isinstance(layer, StaticLinear) else None for layer in found] or [None, None]


def _deferring(module: nn.Module) -> list[StaticLinear | None]:
    return [layer if layer is not None and layer.defers else None for layer in _layers(module)]


@contextmanager
def exported_attention(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes so."""
    found = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    before = {key: getattr(config, "_attn_implementation", None) for key, config in found.items()}
    # blocks that merge tokens read the keys, too
    merging = [block.attention for block in model.modules() if isinstance(block, Merging)]
    plain = [module for module in model.modules() if module not in merging]
    layers = [layer for module in plain for layer in _layers(module) if layer is not None]
    try:
        for config in found.values():
            config._attn_implementation = NAME
        for layer in layers:
            layer.defers = True
        yield
    finally:
        for key, config in found.items():
            config._attn_implementation = before[key]
        for layer in layers:
            layer.defers = False
