"""What structures of an attention share: where its projections are, and how it runs once they have been replaced.

The class of the dense attention stays the base of what replaces it, so that transformers finds its attention maps and
settings where it looks for them.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import eager_attention_forward

from vitshrink.models.structures.joined import Joined, join


@dataclass(frozen=True)
class Layout:
    """Names of the projections in an attention module; ``output`` is None where it lies in another module."""

    query: str
    key: str
    value: str
    output: str | None


_LAYOUTS = (Layout("q_proj", "k_proj", "v_proj", "o_proj"), Layout("query", "key", "value", None))


def layout_of(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> Layout | None:
    """Where the projections of an attention are; None where the module is no attention with layers of this kind."""
    for layout in _LAYOUTS:
        names = (layout.query, layout.key, layout.value, *([layout.output] if layout.output else []))
        if all(isinstance(getattr(module, name, None), kind) for name in names) and hasattr(module, "scaling"):
            return layout
    return None


def linear(module: nn.Module, name: str) -> nn.Linear:
    """A projection of an attention that is still dense."""
    layer = getattr(module, name)
    assert isinstance(layer, nn.Linear)
    return layer


def resized(like: nn.Linear, *, inputs: int | None = None, outputs: int | None = None, bias: bool) -> nn.Linear:
    """An empty linear layer of another size, on the device and in the type of ``like``."""
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.in_features = like.in_features if inputs is None else inputs
    layer.out_features = like.out_features if outputs is None else outputs
    options: Any = {"device": like.weight.device, "dtype": like.weight.dtype}
    layer.weight = nn.Parameter(torch.empty(layer.out_features, layer.in_features, **options))
    layer.register_parameter("bias", nn.Parameter(torch.empty(layer.out_features, **options)) if bias else None)
    return layer


class StructuredAttention(Joined):
    """Attention whose queries, keys and values come from ``project``; the scale of the softmax stays what it was.

    The head dimension of queries and keys may differ from that of the values, and either from the dense model's.
    """

    config: Any
    scaling: float
    num_attention_heads: int
    layout: Layout

    @abstractmethod
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (batch, tokens, n) to queries, keys and values, each (batch, heads, tokens, its head dimension)."""

    def heads(self, y: Tensor) -> Tensor:
        """(batch, tokens, heads · d) to (batch, heads, tokens, d)."""
        return y.view(*y.shape[:-1], self.num_attention_heads, -1).transpose(1, 2)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if past_key_values is not None:
            raise ValueError("a compressed attention is for encoders: it keeps no keys and values of earlier tokens.")
        output, maps = self.attend(*self.project(hidden_states), attention_mask, **kwargs)
        output = output.flatten(2).contiguous()
        return (output if self.layout.output is None else getattr(self, self.layout.output)(output)), maps

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The attended values, (batch, tokens, heads, d), and the maps where the implementation has them."""
        return run_attention(self, query, key, value, mask, **kwargs)


def run_attention(
    module: StructuredAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention in the implementation that the model is set to."""
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention_forward)
    output, maps = interface(
        module,
        query,
        key,
        value,
        mask,
        dropout=module.config.attention_probs_dropout_prob if module.training else 0.0,
        scaling=module.scaling,
        **kwargs,
    )
    return output, maps


def become(module: nn.Module, kind: type[StructuredAttention], spec: object) -> nn.Module:
    """Make a dense attention one of ``kind``, in place; its projections are still to be replaced."""
    layout = layout_of(module, nn.Module)
    assert layout is not None
    join(module, kind)
    module.layout = layout  # type: ignore[assignment]
    module.spec = spec  # type: ignore[assignment]
    return module


def head_dimension(module: nn.Module) -> int:
    """Of the queries of a dense attention."""
    layout = layout_of(module)
    assert layout is not None
    heads = module.num_attention_heads
    assert isinstance(heads, int)
    return linear(module, layout.query).out_features // heads
