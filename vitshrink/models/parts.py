"""Parts of a model as programs of their own, to be timed: layers, blocks, and what a block does after attention."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.models.plain import plain
from vitshrink.models.runtimes import Program
from vitshrink.models.structures import fill
from vitshrink.models.structures.low_rank import LayerSpec, LowRankLinear
from vitshrink.models.structures.merging import MergedTokens
from vitshrink.models.targets import block_list, blocks_of, named_blocks
from vitshrink.models.views import view_of

OPSET = 18


class Part(nn.Module):
    """A module that is given one tensor, x, and gives one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.module(x)
        return output


class AfterAttention(nn.Module):
    """What a block of a ViT does after its attention."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm, self.mlp = block.layernorm_after, block.mlp

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.mlp(self.norm(x)) + x
        return output


def block_program(model: PreTrainedModel, batch_size: int, spec: MergedTokens | None = None) -> Program:
    """The first block of an image model on random tokens; with ``spec`` it merges some of them."""
    block: Any = blocks_of(view_of(model))[0]
    width = block.layernorm_after.normalized_shape[0]
    if spec is None:
        return part_program(block, _random(batch_size, 8, width), dynamic_tokens=True)
    weight = block.layernorm_after.weight.detach().clone()
    fill(spec.build(block), {"layernorm_after.weight": weight[None, None]})
    x = _random(batch_size, spec.tokens, width)
    if spec.reads == "sizes":
        x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], -1)
    return part_program(block, x)


def after_attention(model: PreTrainedModel, batch_size: int) -> Program:
    """What the first block of an image model does after attention, for any number of tokens."""
    part = AfterAttention(blocks_of(view_of(model))[0])
    return part_program(part, _random(batch_size, 8, part.norm.normalized_shape[0]), dynamic_tokens=True)


def shortened(model: PreTrainedModel, blocks: int) -> Program:
    """A whole model of which only the first blocks are left, which are in one list."""
    view = view_of(model)
    del block_list(view)[blocks:]
    return Program.of(view)


def in_one_list(model: PreTrainedModel) -> bool:
    """Whether all blocks of a model are in one list, and each is run once."""
    lists = {name.rpartition(".")[0] for name in named_blocks(model)}
    return len(lists) == 1 and getattr(model.config, "num_hidden_layers", None) == len(named_blocks(model))


def with_pivots(model: PreTrainedModel) -> PreTrainedModel:
    """A view of a model with random factors that have pivots in the place of those without: as fast as those stored."""
    view = view_of(model)
    for name, layer in list(view.named_modules()):
        if isinstance(layer, LowRankLinear) and layer.spec.pivot is None:
            spec, bias = LayerSpec(layer.rank, 0), layer.bias is not None
            view.set_submodule(
                name, _random_factors(layer.weight.device, (layer.out_features, layer.in_features), spec, bias)
            )
    return view


def _random_factors(
    device: torch.device | None, shape: tuple[int, int], spec: LayerSpec, bias: bool = True
) -> LowRankLinear:
    layer = LowRankLinear(shape[1], shape[0], spec, bias=bias, device=device).requires_grad_(False).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer


def part_program(module: nn.Module, x: Tensor, *, dynamic_tokens: bool = False) -> Program:
    """A module that is given x (batch, tokens, n); it is traced with two samples, and run with any number."""
    traced = x[:1].expand(2, *x.shape[1:]).clone()
    dynamic: dict[int, Any] = {0: "batch"} | ({1: "tokens"} if dynamic_tokens else {})
    return Program(Part(module).eval(), {"x": traced}, ["y"], {"x": dynamic})


def random_tokens(batch_size: int, tokens: int, width: int) -> Mapping[str, Tensor]:
    """What a part is timed on, (batch, tokens, width)."""
    return {"x": _random(batch_size, tokens, width)}


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True, eq=False)
class Product(Program):
    """A linear layer with random weights, of which every rank takes as long: dense, or two factors."""

    @classmethod
    def of_shape(cls, shape: tuple[int, int], rank: int | None, *, pivots: bool, stored: bool) -> Self:
        """(out, in), and the rank. ``stored``: as it is in a checkpoint; or else as it is exported."""
        outputs, inputs = shape
        layer: nn.Module = nn.Linear(inputs, outputs)
        if rank is not None:
            layer = _random_factors(None, shape, LayerSpec(rank, 0 if pivots and stored else None))
        if isinstance(layer, LowRankLinear) and not stored:
            layer = plain(layer)
        made = part_program(layer, _random(2, 8, inputs), dynamic_tokens=True)
        return cls(made.model, made.inputs, made.outputs, made.dynamic)

    def write(self, file: Path) -> Path:
        """As ONNX, without an exporter, which would take seconds for what is here one or two nodes."""
        from onnx import TensorProto, helper, numpy_helper, save_model

        assert isinstance(self.model, Part)
        layer: Any = self.model.module
        factors = [layer.down, layer.weight] if isinstance(layer, LowRankLinear) else [layer.weight]
        tensors = [*(each.detach().mT.contiguous() for each in factors), layer.bias.detach()]
        names = ["x", *(f"h{number}" for number in range(len(factors)))]
        nodes = [
            helper.make_node("MatMul", [names[number], f"w{number}"], [names[number + 1]])
            for number in range(len(factors))
        ]
        nodes.append(helper.make_node("Add", [names[-1], f"w{len(factors)}"], ["y"]))
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "tokens", width])
            for name, width in (("x", factors[0].shape[1]), ("y", len(tensors[-1])))
        ]
        stored = [numpy_helper.from_array(each.numpy(), f"w{number}") for number, each in enumerate(tensors)]
        graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], stored)
        opsets = [helper.make_opsetid("", OPSET)]
        save_model(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(file))
        return file
