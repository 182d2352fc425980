"""Which layers of a model become integers on fixed grids, and what stands in their place, still empty."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.compression.quantization import integer_table
from vitshrink.models.checkpoint import replace_layers
from vitshrink.models.families import Role, family_of
from vitshrink.models.plain import plain_view
from vitshrink.models.structures import structure_of
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.structures.narrow import NarrowLinear
from vitshrink.models.structures.static import LARGEST, LEVELS, StaticConv2d, StaticLinear, StaticProduct, StaticSpec
from vitshrink.models.targets import blocks_of

COMPARED: tuple[Role, ...] = ("query", "key")
"""Whose outputs meet in a product."""

REACH = 8.0
"""Of grids that nobody chose."""


class Factors(nn.Sequential):
    """A low-rank layer as two linear ones, the inner one first."""

    @classmethod
    def of(cls, layer: LowRankLinear) -> "Factors":
        up, down = spread(*layer.factors())
        parts = [nn.Linear(each.shape[1], each.shape[0], bias=False, device="meta") for each in (down, up)]
        for part, matrix in zip(parts, (down, up), strict=True):
            part.weight = nn.Parameter(matrix.detach().clone())
        parts[1].register_parameter("bias", layer.bias)
        return cls(*parts)

    @property
    def inner(self) -> nn.Linear:
        return self.get_submodule("0")  # type: ignore[return-value]

    @property
    def outer(self) -> nn.Linear:
        return self.get_submodule("1")  # type: ignore[return-value]


def spread(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (m, rank) and (rank, n) of the same product, in another basis: all that lies between them varies alike.

    A singular vector of a large value would need a wide grid, which all others share.
    """
    mixing = torch.randn(up.shape[1], up.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(mixing)[0].to(up.device)
    return (up.double() @ basis.mT).to(up.dtype), (basis @ down.double()).to(down.dtype)


def split_view(model: PreTrainedModel) -> PreTrainedModel:
    """A view of the model in which low-rank layers are two linear ones each."""
    working = plain_view(model)
    for name, layer in list(working.named_modules()):
        if isinstance(layer, LowRankLinear):
            working.set_submodule(name, Factors.of(layer), strict=True)
    return working


def layers_of(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """What can be rounded in a ``split_view``, by name; what reads tokens of its own kind is left alone."""
    names = {module: name for name, module in model.named_modules()}
    for module in model.base_model.get_submodule("embeddings").modules():
        if structure_of(module) is not None:
            break
        if type(module) is nn.Conv2d and StaticSpec().fits(module):
            yield names[module], module
    inside: set[nn.Module] = set()
    for module in blocks_of(model).modules():
        if isinstance(module, Factors):
            inside.update(module)
            yield names[module], module
        elif module not in inside and type(module) in (nn.Linear, NarrowLinear):
            yield names[module], module


def parts_of(layer: nn.Module) -> list[tuple[int, nn.Linear | nn.Conv2d]]:
    """The matrices of a layer, in the order in which they are multiplied."""
    if isinstance(layer, Factors):
        return [(0, layer.inner), (1, layer.outer)]
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return [(0, layer)]


def module_at(block: nn.Module, path: str) -> nn.Module:
    """The module of this name; the block itself, which is no layer, where there is none."""
    try:
        return block.get_submodule(path)
    except AttributeError:
        return block


def steps_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Of rows, (m, 1), as they are stored."""
    peaks = weight.abs().amax(1, keepdim=True) / LARGEST
    return peaks.clamp_min(torch.finfo(dtype).tiny).to(dtype).float()


def empty(layer: nn.Linear | Factors, *, rounds_outputs: bool, factors: bool = False) -> StaticLinear:
    """What takes the place of a linear layer, or of two."""
    inner, outer = (layer.inner, layer.outer) if isinstance(layer, Factors) else (layer, layer)
    spec = StaticSpec(**layer.spec.to_dict()) if isinstance(layer, NarrowLinear) else StaticSpec()
    rank = inner.out_features if isinstance(layer, Factors) else None
    spec = replace(spec, rank=rank, output_bits=8 if rounds_outputs else None, factors=1 if factors else None)
    bias = outer.bias is not None
    return StaticLinear(inner.in_features, outer.out_features, spec, bias=bias, like=outer.weight)


@torch.no_grad()
def as_fast_as_integers(model: PreTrainedModel) -> PreTrainedModel:
    """A view of the model with integers on grids that nobody chose: it takes as long as a calibrated one."""
    working, built = split_view(model), dict[str, nn.Module]()
    compared = {giver for block in blocks_of(working) for giver in compared_in(working, block)}
    for name, layer in layers_of(working):
        built[name] = to_the_nearest(layer, rounds_outputs=layer in compared)
    replace_layers(working, built | integer_table(working))
    working.eval()
    return working


def compared_in(model: PreTrainedModel, block: nn.Module) -> list[nn.Module]:
    """What gives the queries and the keys of a block."""
    modules = family_of(model).modules
    return [module_at(block, modules[role]) for role in COMPARED] if set(COMPARED) <= set(modules) else []


@torch.no_grad()
def to_the_nearest(layer: nn.Module, *, rounds_outputs: bool = False) -> StaticProduct:
    """A layer with its weights rounded to the nearest, and grids that nobody chose."""
    layer = Factors.of(layer) if isinstance(layer, LowRankLinear) else layer
    parts = [part for _, part in parts_of(layer)]
    if isinstance(layer, nn.Conv2d):
        made: StaticProduct = StaticConv2d(layer)
        products = [made]
    else:
        assert isinstance(layer, nn.Linear | Factors)
        made = linear = empty(layer, rounds_outputs=rounds_outputs)
        products = [linear] if linear.down is None else [linear.down, linear]
        if rounds_outputs:
            _reach(linear.output_scale, linear.output_zero)
    for product, part in zip(products, parts, strict=True):
        weight = part.weight.detach().flatten(1).float()
        steps = steps_of(weight, weight.dtype)
        product.integers.copy_((weight / steps).round().view(product.integers.shape))
        product.weight.copy_(steps)
        _reach(product.input_scale, product.input_zero)
    if made.bias is not None:
        made.bias.copy_(parts[-1].bias)  # type: ignore[arg-type]
    return made


def _reach(scale: Tensor, zero: Tensor) -> None:
    scale.fill_(2 * REACH / LEVELS)
    zero.fill_((LEVELS + 1) // 2)
