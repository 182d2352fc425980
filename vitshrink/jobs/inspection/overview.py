"""What was found in a model, and what will be left alone."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from vitshrink.compression.repairs.stream import why_not_restored
from vitshrink.models.families import family_of
from vitshrink.models.reading import chain_problem
from vitshrink.models.targets import Target, find_outside, named_blocks
from vitshrink.models.tasks import task_of


@dataclass(frozen=True)
class Overview:
    """In words.

    Attributes:
        model: its class, family, what it reads and what it is for.
        blocks: where they are, and how many there.
        layers: their roles, and how many have each.
        outside: modules outside the blocks that may be rounded, too.
        left: modules with a matrix that stay as they are.
        limits: what cannot be done with this model.
    """

    model: str
    blocks: dict[str, int]
    layers: dict[str, int]
    outside: tuple[str, ...]
    left: tuple[str, ...]
    limits: tuple[str, ...]

    def lines(self) -> list[str]:
        """For the terminal."""
        blocks = ", ".join(f"{count} in {place}" for place, count in self.blocks.items())
        layers = ", ".join(f"{count} {role}" for role, count in self.layers.items())
        found = [self.model, f"blocks: {blocks}", f"linear layers: {layers}"]
        if self.outside:
            found.append(f"rounded only with --bits: {', '.join(self.outside)}")
        if self.left:
            found.append(f"left alone: {', '.join(self.left)}")
        return [*found, *(f"not available for this model: {limit}" for limit in self.limits)]


def overview(model: PreTrainedModel, targets: Sequence[Target]) -> Overview:
    """What is known of a dense model, of which ``targets`` are the layers in question."""
    family, outside = family_of(model), find_outside(model)
    chosen = {*outside, *(target.name for target in targets)}
    matrices = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d) and name not in chosen
    ]
    reads = family.modality.replace("-", "s and ")
    known = "" if family.layouts else ", without an entry in the table of families"
    return Overview(
        f"{type(model).__name__} ({family.model_type}{known}): reads {reads}s, for {task_of(model)}",
        dict(Counter(name.rpartition(".")[0] for name in named_blocks(model))),
        dict(Counter(target.role for target in targets)),
        tuple(outside),
        tuple(_together(matrices)),
        tuple(_limits(model)),
    )


def _limits(model: PreTrainedModel) -> list[str]:
    family, found = family_of(model), []
    if not family.plain:
        found.append("methods that replace attentions, and --decatt")
    if not family.grid:
        found.append("--tokens, --landmarks and --resolution")
    if (problem := why_not_restored(model)) is not None:
        found.append(f"repair of the residual stream: {problem}")
    if (problem := chain_problem(model)) is not None:
        found.append(f"--blockwise, --bdia, --reversible, and rounding again during recovery: {problem}")
    return found


def _together(names: Sequence[str]) -> list[str]:
    """Names that differ in numbers only are one."""
    found = Counter(re.sub(r"\.\d+\.", ".#.", name) for name in names)
    return [name if count == 1 else f"{name} ({count})" for name, count in found.items()]
