"""The blocks of a model, and its linear layers that may be factorized."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import nn
from transformers import PreTrainedModel

from vitshrink.errors import UsageError
from vitshrink.models.blocks import find_blocks
from vitshrink.models.duals import towers_of
from vitshrink.models.families import Role, family_of
from vitshrink.models.hf_quantizer import base_prefix
from vitshrink.models.reading import called, groups_of
from vitshrink.models.structures import structure_of
from vitshrink.models.structures.coded import dense_tensor, has_positions

Layers = Literal["attention", "mlp", "all"]


_ROLES: dict[str, tuple[Role, ...]] = {
    "attention": ("query", "key", "value", "qkv", "output"),
    "mlp": ("fc1", "gate", "up", "gated", "fc2"),
    "all": get_args(Role),
}


@dataclass(frozen=True)
class Target:
    """One linear layer that may be factorized."""

    name: str
    """Module name in memory, such as ``vit.layers.0.attention.q_proj``."""
    block: int
    role: Role
    shape: tuple[int, int]
    """(out, in)"""
    input_group: str
    """Layers of the same group read the same input tensor: query, key and value of a block, mostly."""


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of a model, in order; those of all stages where it has several."""
    return nn.ModuleList(named_blocks(model).values())


def first_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks that read nothing of another: the first one, or the first of each tower of a dual encoder."""
    blocks, towers = named_blocks(model), towers_of(model.base_model)
    if not towers:
        return [next(iter(blocks.values()))]
    return [next(block for name, block in blocks.items() if name.startswith(f"{tower}.")) for tower in towers]


def named_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The same by module name, such as ``vit.layers.0``. Raises CheckpointError where there is none."""
    prefix = base_prefix(model)
    return {prefix + name: block for name, block in find_blocks(model.base_model).items()}


def block_list(model: PreTrainedModel) -> nn.ModuleList:
    """The list that holds all blocks of a model that has no stages: what is taken out of it is not run."""
    names = {name.rpartition(".")[0] for name in named_blocks(model)}
    listed = model.get_submodule(min(names))
    assert len(names) == 1
    assert isinstance(listed, nn.ModuleList)
    return listed


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
    """The dense linear layers of the blocks that may be factorized, block by block.

    Embeddings, poolers, heads and tied weights are never among them. ``include`` and ``exclude`` are regular
    expressions searched in the layers' names; with ``include``, only layers that match one of them are kept. Where what
    lies ``outside`` is rounded, too, ``exclude`` may name that.

    Raises:
        UsageError: an expression is invalid or matches nothing, or no layer is left.
    """
    everything = list(_block_targets(model))
    targets = [target for target in everything if target.role in _ROLES[layers]]
    if everything and not targets:
        raise UsageError(
            f"--layers {layers}: vitshrink does not know which layers of {type(model).__name__} are {layers}. "
            f"Name them with --include instead, such as {', '.join(target.name for target in everything[:6])} …"
        )
    if not targets:
        raise UsageError("the model has no dense linear layer to factorize: it is already compressed.")
    names = [target.name for target in targets]
    included = matching(names, include, "include") if include else set(names)
    others = find_outside(model) if outside and layers == "all" and not include else []
    kept = included - matching([*names, *others], exclude, "exclude")
    if not kept:
        raise UsageError("no layer is left to factorize: --exclude matches every included layer.")
    return [target for target in targets if target.name in kept]


FEWEST_WEIGHTS = 4096
"""Of a matrix outside the blocks that is worth another form: below, what describes it takes as much."""


def find_outside(model: PreTrainedModel, *, exclude: Sequence[str] = ()) -> list[str]:
    """The embeddings, patch projections, positions and linear layers outside the blocks that may be rounded, by name.

    None that is small, that shares its matrix with another, that the model does not run, or whose name one of the
    expressions ``exclude`` is in.
    """
    blocks, grid = set(blocks_of(model).modules()), family_of(model).grid
    kinds = (nn.Linear, nn.Embedding, nn.Conv2d)
    modules = {
        name: module
        for name, module in model.named_modules()
        if (type(module) in kinds or (grid and has_positions(module))) and module not in blocks
    }
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    found = [
        name
        for name, module in modules.items()
        if dense_tensor(module).numel() >= FEWEST_WEIGHTS
        and uses[id(getattr(module, "weight", None))] <= 1
        and not any(re.search(pattern, name) for pattern in exclude)
        and (not isinstance(module, nn.Conv2d) or (module.groups == 1 and module.padding_mode == "zeros"))
    ]
    running = called(model, found)
    return [name for name in found if name in running]


def layers_in_blocks(model: PreTrainedModel, kind: type[nn.Module]) -> list[Target]:
    """The layers of a ``kind`` in the blocks, block by block: those whose role is known, then the others."""
    modules, found = family_of(model).modules, []
    for index, (name, block) in enumerate(named_blocks(model).items()):
        paths = {path: each for path, each in block.named_modules() if isinstance(each, kind)}
        roles: dict[str, Role] = {path: role for role, path in modules.items() if path in paths}
        for path in (*roles, *(path for path in paths if path not in roles)):
            layer: Any = paths[path]
            shape = (layer.out_features, layer.in_features)
            found.append(Target(f"{name}.{path}", index, roles.get(path, "other"), shape, f"{name}.{path}"))
    return found


def _block_targets(model: PreTrainedModel) -> Iterator[Target]:
    family, names = family_of(model), list(named_blocks(model))
    found = [
        target
        for target in layers_in_blocks(model, nn.Linear)
        if not _replaced(model, target.name, names[target.block])
        and not any(part in target.name for part in family.left)
    ]
    if not family.layouts:
        groups = groups_of(model, [target.name for target in found])
        yield from (replace(target, input_group=groups[target.name]) for target in found if target.name in groups)
        return
    for target in found:
        together = next((roles for roles in family.same_input if target.role in roles), None)
        part = "attention" if together and together[0] == "query" else "mlp"
        yield replace(target, input_group=f"{names[target.block]}.{part}") if together else target


def _replaced(model: nn.Module, name: str, block: str) -> bool:
    """Whether a layer, or a module between it and its block, is of another form than in the dense model."""
    while name != block:
        if structure_of(model.get_submodule(name)) is not None:
            return True
        name = name.rpartition(".")[0]
    return False


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
                f"{flag}: {pattern!r} matches none of the {len(names)} layers. Their names are {examples} …"
            )
        matching |= found
    return matching
