"""Where the attentions of a model are, and which parts of them a method offers to choose the rank of."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.errors import UsageError
from vitshrink.methods.attention import ATTENTION, AttentionMethod, AttentionWeights, Dimensions
from vitshrink.models.families import family_of
from vitshrink.models.targets import Target, find_targets, linear_of
from vitshrink.statistics.stats import LinearStats


@dataclass(frozen=True)
class Attention:
    """Where one attention is in the model."""

    block: int
    dimensions: Dimensions
    places: Mapping[str, str]
    """Module names by role, and of the attention itself."""
    targets: Mapping[str, Target]
    """By role; only those that may be replaced."""


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """A part of one attention, or of several in a row."""

    part: str
    attentions: Sequence[Attention]

    @property
    def name(self) -> str:
        """In plans and reports."""
        several = f" of {len(self.attentions)} blocks" if len(self.attentions) > 1 else ""
        return f"{self.attentions[0].places[ATTENTION]}:{self.part}{several}"


def sites_of(
    attentions: Sequence[Attention], method: AttentionMethod, options: Mapping[str, Any]
) -> list[AttentionSite]:
    """Block by block, so that what serves several comes with the first of them."""
    stacks = {
        part: _stacks(attentions, roles, options.get("blocks", 1) if part in method.stacked else 1)
        for part, roles in method.parts.items()
    }
    return [
        AttentionSite(part, stack)
        for attention in attentions
        for part, found in stacks.items()
        for stack in found
        if stack[0] is attention
    ]


def attentions_of(model: PreTrainedModel, targets: Sequence[Target]) -> list[Attention]:
    """The dense attentions of a model, with those of their projections that are among ``targets``."""
    family = family_of(model)
    if not family.plain:
        raise UsageError(
            f"the attentions of {type(model).__name__} ({family.model_type}) are not plain softmax(QKᵀ) V, or "
            "vitshrink does not know them: choose a method for linear layers (see `vitshrink methods`), such as "
            "curvature or whitened."
        )
    chosen = {target.name for target in targets}
    blocks: dict[int, dict[str, Target]] = {}
    for target in find_targets(model):
        if target.role in ("query", "key", "value", "output"):
            blocks.setdefault(target.block, {})[target.role] = target
    found = []
    for block, roles in blocks.items():
        if len(roles) < 4:
            continue
        path = roles["query"].name.rpartition(".")[0]
        heads = model.get_submodule(path).num_attention_heads
        assert isinstance(heads, int)
        outputs, width = roles["query"].shape
        places = {role: target.name for role, target in roles.items()} | {ATTENTION: path}
        mine = {role: target for role, target in roles.items() if target.name in chosen}
        if mine:
            found.append(Attention(block, Dimensions(heads, outputs // heads, width), places, mine))
    return found


def weights_of(model: PreTrainedModel, attention: Attention, stats: Mapping[str, LinearStats]) -> AttentionWeights:
    """The weights of a dense attention, and the statistics of its layers."""
    layers = {role: linear_of(model, target.name) for role, target in attention.targets.items()}
    return AttentionWeights(
        attention.dimensions,
        {role: layer.weight.detach().double() for role, layer in layers.items()},
        {role: _bias(layer) for role, layer in layers.items()},
        {role: stats[target.name] for role, target in attention.targets.items()},
    )


def _bias(layer: nn.Linear) -> Tensor:
    zeros = layer.weight.detach().new_zeros(layer.out_features).double()
    return zeros if layer.bias is None else layer.bias.detach().double()


def _stacks(attentions: Sequence[Attention], roles: Iterable[str], blocks: int) -> list[list[Attention]]:
    """Those that have all these roles, so many in a row; the last ones may be fewer."""
    whole = [attention for attention in attentions if set(roles) <= set(attention.targets)]
    return [whole[start : start + blocks] for start in range(0, len(whole), blocks)]
