"""Merged tokens: in a block the patches that are most alike become one, and what no head reads is not computed."""

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitshrink.errors import CheckpointError
from vitshrink.models.structures.attention import StructuredAttention, layout_of, run_attention
from vitshrink.models.structures.joined import Joined, join
from vitshrink.models.structures.registry import read_entry, structure
from vitshrink.models.structures.static import StaticLinear

STREAMS = ("tokens", "sizes")
"""What blocks hand on: tokens (batch, tokens, n), or the same with how many patches each stands for behind it."""


SHORTEST = 1e-12
"""Length that a key is taken to have at least."""

PARTS = "vitshrink_parts"
"""Name under which a stream that is traced has its tokens and sizes."""


class NormOfMerged(nn.LayerNorm):
    """``nn.LayerNorm`` whose weight is (1, 1, n): the shape that says that this is another block."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.flatten(), self.bias, self.eps)


class Merging(Joined):
    """A block that merges patches between its attention and its MLP (token merging, arXiv 2210.09461).

    Every second patch is paired with the one of the others whose keys are most like its own. The pairs that are most
    alike, and whose first patch the special tokens attend to least, become one token, the mean weighted likewise. A
    token that stands for s patches counts s times in attention. How many pairs there are is given, so that shapes are
    the same for every image. Special tokens are left alone.
    Where only they are kept, nothing reads the patches afterwards: then nothing is merged, and they alone ask.
    """

    spec: "MergedTokens"
    attention: Any
    layernorm_before: Any
    layernorm_after: Any
    mlp: Any
    dropout: Any

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        spec = self.spec
        if attention_mask is not None and not torch.compiler.is_exporting():
            raise ValueError("an attention mask cannot be used with merged tokens.")
        if hidden_states.shape[1] != spec.tokens:
            raise ValueError(
                f"{hidden_states.shape[1]} tokens reach a block that merges {spec.tokens} to {spec.kept}: use "
                "images of the size that the model was compressed for, and keep the order of the blocks."
            )
        x, sizes = (hidden_states, None) if spec.reads == "tokens" else _read(hidden_states)
        attended, query, key = self._attend(self.layernorm_before(x), sizes, **kwargs)
        x = self.dropout(attended) + x[:, : attended.shape[1]]
        if spec.special < spec.kept < spec.tokens:
            weights = 1 + self._noticed(query, key, sizes)
            sizes = x.new_ones(*x.shape[:2], 1) if sizes is None else sizes
            pairs = pair(key.transpose(1, 2).flatten(2)[:, spec.special :].detach(), weights, spec.tokens - spec.kept)
            x, sizes = merge(x, sizes, weights, *pairs)
        x = self.dropout(self.mlp(self.layernorm_after(x))) + x
        return x if spec.gives == "tokens" else _stream(x, x.new_ones(*x.shape[:2], 1) if sizes is None else sizes)

    def _noticed(self, query: Tensor, key: Tensor, sizes: Tensor | None) -> Tensor:
        """The attention that patches get from special tokens, (batch, patches), as multiples of an equal share."""
        special = self.spec.special
        asking = query.transpose(1, 2)[:, :special].transpose(1, 2)  # runtimes then transpose no more than that
        scores = (asking.detach() * self.attention.scaling) @ key.detach().mT
        scores = scores if sizes is None else scores + sizes.log().mT[:, None]
        attention: Tensor = scores.softmax(-1).mean((1, 2))[:, special:]
        return attention * (self.spec.tokens - special)

    def _attend(self, x: Tensor, sizes: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """What the tokens that ask attend to, (batch, asking, n), and queries and keys before they are rounded, (batch,
        heads, tokens, d)."""
        attention, spec = self.attention, self.spec
        asking = spec.special if spec.kept == spec.special else spec.tokens
        layout = layout_of(attention, nn.Module)
        assert layout is not None
        if isinstance(attention, StructuredAttention):
            query, key, value = attention.project(x)
            query = query[:, :, :asking]
            asked, met = query, key
        else:
            layers = [getattr(attention, name) for name in (layout.query, layout.key, layout.value)]
            query, key, value = (
                y.view(*y.shape[:-1], attention.num_attention_heads, -1).transpose(1, 2)
                for y in (_unrounded(layer, read) for layer, read in zip(layers, (x[:, :asking], x, x), strict=True))
            )
            asked, met = _rounded(layers[0], query), _rounded(layers[1], key)
        mask = None if sizes is None else sizes.log().mT[:, None]
        if mask is not None and not torch.compiler.is_exporting():  # as wide as runtimes need it, and no wider
            mask = mask.expand(-1, 1, asking, -1)
        output, _ = run_attention(attention, asked, met, value, mask, **kwargs)
        assert layout.output is not None
        return getattr(attention, layout.output)(output.flatten(2)), query, key


def _stream(x: Tensor, sizes: Tensor) -> Tensor:
    """What a block hands on. A program that is exported reads the parts, and puts them together nowhere."""
    found = torch.cat([x, sizes], -1)
    if torch.compiler.is_exporting():
        setattr(found, PARTS, (x, sizes))
    return found


def _read(stream: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and sizes."""
    parts: tuple[Tensor, Tensor] = getattr(stream, PARTS, (stream[..., :-1], stream[..., -1:]))
    return parts


def _unrounded(layer: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = layer.unrounded(x) if isinstance(layer, StaticLinear) else layer(x)
    return found


def _rounded(layer: nn.Module, y: Tensor) -> Tensor:
    """What a layer gives, in any layout, on its grid where it has one."""
    return layer.rounded_output(y) if isinstance(layer, StaticLinear) else y


def merge(x: Tensor, sizes: Tensor, weights: Tensor, sources: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens x (batch, tokens, n) and sizes (batch, tokens, 1), the patches at ``sources`` merged into ``others``.

    The ``weights`` of means (batch, patches), and places (batch, pairs), begin with the first patch. Tokens keep their
    order.
    """
    special, weights = x.shape[1] - weights.shape[1], weights[..., None]
    summed, counts = x[:, special:] * weights, torch.cat([weights, sizes[:, special:]], -1)  # each of them is copied
    stays = torch.ones_like(weights[..., 0], dtype=torch.int32).scatter(1, sources, 0)
    stays = stays.argsort(dim=1, stable=True, descending=True)[:, : weights.shape[1] - sources.shape[1]]
    summed, counts = (
        rows(each.scatter_add(1, _wide(others, each), rows(each, sources)), stays) for each in (summed, counts)
    )
    found = torch.cat([x[:, :special], summed / counts[..., :1]], 1)
    return found, torch.cat([sizes[:, :special], counts[..., 1:]], 1)


def pair(keys: Tensor, weights: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The cheapest pairs of a patch with an even place and one with an odd place: places (batch, number) of both.

    No two pairs share the first of them. A pair costs 1 − the cosine of its ``keys`` (batch, patches, m), times the
    weight of the first, (batch, patches).
    """
    unit = keys / keys.norm(dim=-1, keepdim=True).clamp_min(SHORTEST)
    likeness, nearest = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)
    costs = (1 - likeness) * weights[:, ::2]
    best = costs.argsort(dim=1, stable=True)[:, :number]
    return 2 * best, 2 * nearest.gather(1, best) + 1


def rows(x: Tensor, places: Tensor) -> Tensor:
    """x (batch, tokens, n) at places (batch, k): (batch, k, n). Runtimes copy rows faster than they gather elements."""
    starts = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (places + starts).flatten()).view(*places.shape, x.shape[-1])


def _wide(places: Tensor, like: Tensor) -> Tensor:
    return places[..., None].expand(-1, -1, like.shape[-1])


@structure("merged-tokens")
@dataclass(frozen=True)
class MergedTokens:
    """How many tokens a block reads, and how many of them it keeps.

    Attributes:
        tokens: that reach the block, the special ones among them.
        kept: that its MLP sees and that it hands on; as many as are ``special`` where nothing reads the patches.
        special: tokens before the patches.
        reads: what the block before hands on, see ``STREAMS``.
        gives: what this one does.
    """

    tokens: int
    kept: int
    special: int = 1
    reads: str = "tokens"
    gives: str = "tokens"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: Any) -> Self:
        choices = {"reads": STREAMS, "gives": STREAMS}
        return cls(**read_entry(entry, ("tokens", "kept", "special"), choices=choices))

    @property
    def fewest(self) -> int:
        """Tokens that are left when as many are merged as can be at once."""
        return self.tokens - (self.tokens - self.special) // 2

    def fits(self, module: nn.Module) -> bool:
        norm, attention = (getattr(module, name, None) for name in ("layernorm_after", "attention"))
        layout = layout_of(attention, nn.Module) if isinstance(attention, nn.Module) else None
        return isinstance(norm, nn.LayerNorm) and norm.weight.dim() == 1 and layout is not None and bool(layout.output)

    def build(self, module: nn.Module) -> nn.Module:
        if not (self.kept == self.special < self.tokens or self.fewest <= self.kept <= self.tokens):
            raise CheckpointError(
                f"a block cannot merge {self.tokens} tokens to {self.kept}, {self.special} of them special: the "
                "config.json is damaged."
            )
        join(module, Merging)
        module.spec = self  # type: ignore[assignment]
        norm: Any = module.layernorm_after
        norm.__class__ = NormOfMerged
        norm.weight = nn.Parameter(torch.empty_like(norm.weight.detach())[None, None])
        return module
