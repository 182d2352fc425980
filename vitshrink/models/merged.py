"""A model whose blocks merge tokens: what such blocks need to know of each other, and what they cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from transformers import PreTrainedModel

from vitshrink.errors import UsageError
from vitshrink.models import cost
from vitshrink.models.checkpoint import replace_layers
from vitshrink.models.example import example_inputs
from vitshrink.models.families import Role, family_of, require_grid
from vitshrink.models.geometry import grid_of
from vitshrink.models.structures import fill, structure_of
from vitshrink.models.structures.landmarks import Landmarks
from vitshrink.models.structures.merging import MergedTokens
from vitshrink.models.structures.tokens import MixedTokens
from vitshrink.models.targets import blocks_of, named_blocks
from vitshrink.models.tasks import task_of

Kept = tuple[int, ...]
"""How many tokens each block keeps, special ones among them."""


def require_mergeable(model: PreTrainedModel) -> None:
    """Raises UsageError for a model whose tokens cannot be merged."""
    family = family_of(model)
    if family.modality == "text":
        raise UsageError(
            f"--tokens merge merges patches of an image, but {type(model).__name__} ({family.model_type}) reads "
            "text, where every token counts. For texts, batches of equal length save time."
        )
    require_grid(model, "--tokens merge")
    for spec in map(structure_of, model.modules()):
        if isinstance(spec, MixedTokens | Landmarks | MergedTokens):
            raise UsageError(
                "--tokens merge needs the tokens and attention maps of the dense model, and this model has others."
            )


def special_tokens(model: PreTrainedModel) -> int:
    """Tokens before the patches: for the class, and for distillation."""
    return 2 if hasattr(model.base_model.get_submodule("embeddings"), "distillation_token") else 1


def tokens_of(model: PreTrainedModel) -> int:
    """That enter the first block of an image model."""
    rows, columns = grid_of(model.config)
    return rows * columns + special_tokens(model)


def reads_special_only(model: PreTrainedModel) -> bool:
    """Whether what follows the blocks reads no patch."""
    return task_of(model) == "image-classification"


def merges_of(model: PreTrainedModel, kept: Kept) -> dict[int, MergedTokens]:
    """What the blocks become, from the first that merges to the last."""
    special, tokens = special_tokens(model), tokens_of(model)
    read = [tokens, *kept[:-1]]
    first = next((block for block, (had, has) in enumerate(zip(read, kept, strict=True)) if has < had), len(kept))
    return {
        block: MergedTokens(
            read[block],
            kept[block],
            special,
            "tokens" if block == first else "sizes",
            "tokens" if block == len(kept) - 1 else "sizes",
        )
        for block in range(first, len(kept))
    }


@torch.no_grad()
def merge_tokens(model: PreTrainedModel, kept: Kept) -> None:
    """Let the blocks of a model keep so many tokens, in place; its layers may be of any form."""
    blocks, built = list(named_blocks(model).items()), {}
    for index, spec in merges_of(model, kept).items():
        name, block = blocks[index]
        weight = block.get_parameter("layernorm_after.weight").detach().clone()
        fill(spec.build(block), {"layernorm_after.weight": weight[None, None]})
        built[name] = block
    replace_layers(model, built)


def kept_by(model: PreTrainedModel) -> list[MergedTokens]:
    """What the blocks of a model that merge are, in order."""
    return [spec for block in blocks_of(model) if isinstance(spec := structure_of(block), MergedTokens)]


@dataclass(frozen=True)
class Operations:
    """The price of a block in multiply-accumulates, by the tokens that it reads and keeps; see ``cost.macs``."""

    weights: dict[Role, int]
    """Of a block; the same in every block of a model."""
    width: int
    """Of queries, and of what attention gives: of all heads together."""
    special: int
    rest: int
    """Of what is no block."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Of a dense model."""
        modules, block = family_of(model).modules, blocks_of(model)[0]
        weights = {role: block.get_parameter(f"{path}.weight") for role, path in modules.items()}
        numbers = {role: weight.numel() for role, weight in weights.items()}
        bare = cls(numbers, weights["query"].shape[0], special_tokens(model), 0)
        whole, tokens = cost.macs(model, example_inputs(model)), tokens_of(model)
        return cls(numbers, bare.width, bare.special, whole - len(blocks_of(model)) * bare.block(tokens, tokens))

    def block(self, tokens: int, kept: int) -> int:
        """Of one block, matching included."""
        ends = kept == self.special < tokens
        asking, weights = self.special if ends else tokens, self.weights
        found = asking * (weights["query"] + weights["output"]) + tokens * (weights["key"] + weights["value"])
        found += 2 * asking * tokens * self.width + kept * (weights["fc1"] + weights["fc2"])
        if ends or kept == tokens:
            return found
        patches = tokens - self.special
        return found + ((patches + 1) // 2 * (patches // 2) + self.special * tokens) * self.width

    def total(self, tokens: int, kept: Sequence[int]) -> int:
        """Of a model whose first block reads ``tokens``."""
        return self.rest + sum(self.block(had, has) for had, has in zip([tokens, *kept[:-1]], kept, strict=True))
