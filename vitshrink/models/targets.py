"""The blocks of a model, and its linear layers that may be factorised."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn
from transformers import PreTrainedModel

from vitshrink.errors import CheckpointError, UsageError
from vitshrink.models.families import Role, family_of
from vitshrink.models.hf_quantizer import base_prefix
from vitshrink.models.structures import structure_of
from vitshrink.models.structures.coded import dense_tensor, has_positions

Layers = Literal["attention", "mlp", "all"]


_ROLES: dict[str, tuple[Role, ...]] = {
    "attention": ("query", "key", "value", "output"),
    "mlp": ("fc1", "fc2"),
    "all": get_args(Role),
}


@dataclass(frozen=True)
class Target:
    """One linear layer that may be factorised."""

    name: str
    """Module name in memory, such as ``vit.layers.0.attention.q_proj``."""
    block: int
    role: Role
    shape: tuple[int, int]
    """(out, in)"""
    input_group: str
    """Layers of the same group read the same input tensor: query, key and value of a block."""


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of a model, in order."""
    blocks = model.base_model.get_submodule(family_of(model).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """The dense linear layer of this name."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def find_targets(
    model: PreTrainedModel,
    *,
    layers: Layers = "all",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    outside: bool = False,
) -> list[Target]:
    """The dense linear layers of the blocks that may be factorised, block by block.

    Embeddings, poolers, heads and tied weights are never among them. ``include`` and ``exclude`` are regular
    expressions searched in the layers' names; with ``include``, only layers that match one of them are kept. Where what
    lies ``outside`` is rounded, too, ``exclude`` may name that.

    Raises:
        UsageError: an expression is invalid or matches nothing, or no layer is left.
    """
    targets = [target for target in _block_targets(model) if target.role in _ROLES[layers]]
    if not targets:
        raise UsageError("the model has no dense linear layer to factorise: it is already compressed.")
    names = [target.name for target in targets]
    included = matching(names, include, "include") if include else set(names)
    others = find_outside(model) if outside and layers == "all" and not include else []
    kept = included - matching([*names, *others], exclude, "exclude")
    if not kept:
        raise UsageError("no layer is left to factorise: the exclude expressions match every included layer.")
    return [target for target in targets if target.name in kept]


FEWEST_WEIGHTS = 4096
"""Of a matrix outside the blocks that is worth another form: below, what describes it takes as much."""


def find_outside(model: PreTrainedModel, *, exclude: Sequence[str] = ()) -> list[str]:
    """The embeddings, patch projections, positions and linear layers outside the blocks that may be rounded, by name.

    None that is small, that shares its matrix with another, or whose name one of the expressions ``exclude`` is in.
    """
    blocks = set(blocks_of(model).modules())
    kinds = (nn.Linear, nn.Embedding, nn.Conv2d)
    modules = {
        name: module
        for name, module in model.named_modules()
        if (type(module) in kinds or has_positions(module)) and module not in blocks
    }
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return [
        name
        for name, module in modules.items()
        if dense_tensor(module).numel() >= FEWEST_WEIGHTS
        and uses[id(getattr(module, "weight", None))] <= 1
        and not any(re.search(pattern, name) for pattern in exclude)
        and (not isinstance(module, nn.Conv2d) or (module.groups == 1 and module.padding_mode == "zeros"))
    ]


def _block_targets(model: PreTrainedModel) -> Iterator[Target]:
    family = family_of(model)
    path = base_prefix(model) + family.blocks
    for index, block in enumerate(blocks_of(model)):
        for role, module_path in family.modules.items():
            name = f"{path}.{index}.{module_path}"
            if any(structure_of(part) is not None for part in _along(block, module_path)):
                continue
            module = block.get_submodule(module_path)
            if not isinstance(module, nn.Linear):
                raise CheckpointError(f"{name} is a {type(module).__name__}, not a linear layer: cannot be factorised.")
            group = f"{path}.{index}.attention" if role in ("query", "key", "value") else name
            yield Target(name, index, role, (module.out_features, module.in_features), group)


def _along(block: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules on the way to ``path``, itself included; a structure may end the way."""
    module = block
    for name in path.split("."):
        if not hasattr(module, name):
            return
        module = module.get_submodule(name)
        yield module


def matching(names: Sequence[str], patterns: Sequence[str], flag: str) -> set[str]:
    """Those of the names in which one of the expressions is found. Raises UsageError for one that finds nothing."""
    matching: set[str] = set()
    for pattern in patterns:
        try:
            found = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise UsageError(f"{flag}: {pattern!r} is not a valid regular expression ({error}).") from error
        if not found:
            examples = ", ".join(names[:6])
            raise UsageError(
                f"{flag}: {pattern!r} matches none of the {len(names)} layers. They are called {examples} …"
            )
        matching |= found
    return matching
