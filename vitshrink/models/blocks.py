"""The blocks of a model, found by looking at it: lists of modules that have linear layers."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vitshrink.errors import CheckpointError
from vitshrink.models.duals import towers_of
from vitshrink.models.structures import structure_of

FEWEST_LAYERS = 2
"""Linear layers of a block, at least: one alone would be a list of projections."""

Members = nn.ModuleList | nn.Sequential


def find_blocks(base: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a base model, by name and in order; those of all stages, where it has several.

    Of all lists whose members have linear layers those at places of one kind (``encoder.layers.#.blocks``) are taken
    that have the most. Where their members are lists of like modules themselves, stages or groups, it is those. A dual
    encoder has the blocks of both towers.

    Raises CheckpointError where there is no such list.
    """
    if towers := towers_of(base):
        blocks = {tower: find_blocks(base.get_submodule(tower)) for tower in towers}
        return {f"{tower}.{name}": block for tower, found in blocks.items() for name, block in found.items()}
    lists: dict[str, list[tuple[str, Members]]] = {}
    for name, module in base.named_modules():
        listed = isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0
        if listed and all(_layers(each) >= FEWEST_LAYERS for each in module.children()):
            lists.setdefault(re.sub(r"\d+", "#", name), []).append((name, module))
    if not lists:
        raise CheckpointError(
            f"{type(base).__name__} has no list of blocks with linear layers, and vitshrink compresses only such "
            "models. Convolutional networks have none; vision transformers (ViT, DINOv2, Swin …) do."
        )
    counts = {kind: sum(_layers(module) for _, module in found) for kind, found in lists.items()}
    chosen = max(counts, key=counts.__getitem__)
    while (inner := _within(chosen, lists, counts)) is not None:
        chosen = inner
    return {f"{name}.{index}": block for name, module in lists[chosen] for index, block in enumerate(module)}


def hidden_of(output: Any) -> Tensor:
    """The hidden states that a block gives, which some families give together with attention maps."""
    hidden = output if isinstance(output, Tensor) else output[0]
    assert isinstance(hidden, Tensor)
    return hidden


def _layers(module: nn.Module) -> int:
    """How many linear layers it has, whatever their form."""
    return sum(isinstance(each, nn.Linear) or structure_of(each) is not None for each in module.modules())


def _within(kind: str, lists: Mapping[str, list[tuple[str, Members]]], counts: Mapping[str, int]) -> str | None:
    """The lists of like modules inside those of ``kind`` that have most of their layers."""
    for other, found in lists.items():
        alike = all(len({type(each) for each in module}) == 1 for _, module in found)
        if other.startswith(f"{kind}.#.") and alike and 2 * counts[other] > counts[kind]:
            return other
    return None
