"""Parts of a model as programs of their own, to be timed: layers, blocks, and what a block does after attention."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
from vitshrink.models.structures.static import StaticLinear, StaticProduct
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
    def of_shape(
        cls,
        shape: tuple[int, int],
        rank: int | None,
        *,
        pivots: bool,
        stored: bool,
        rounded: Callable[[nn.Module], nn.Module] | None = None,
    ) -> Self:
        """(out, in), and the rank. ``stored``: as it is in a checkpoint; or else as it is exported, and ``rounded``."""
        outputs, inputs = shape
        layer: nn.Module = nn.Linear(inputs, outputs)
        if rank is not None:
            layer = _random_factors(None, shape, LayerSpec(rank, 0 if pivots and stored else None))
        if isinstance(layer, LowRankLinear) and not stored:
            layer = plain(layer)
        if rounded is not None:
            layer = rounded(layer)
        made = part_program(layer, _random(2, 8, inputs), dynamic_tokens=True)
        return cls(made.model, made.inputs, made.outputs, made.dynamic)

    def write(self, file: Path) -> Path:
        """As ONNX, without an exporter, which would take seconds for what is here a few nodes."""
        from onnx import TensorProto, helper, save_model

        assert isinstance(self.model, Part)
        layer: Any = self.model.module
        graph, found = _Graph(), "x"
        if isinstance(layer, StaticLinear):
            for product in (layer,) if layer.down is None else (layer.down, layer):
                found = graph.integers(found, product)
        else:
            for matrix in (layer.down, layer.weight) if isinstance(layer, LowRankLinear) else (layer.weight,):
                found = graph.node("MatMul", found, graph.constant(matrix.mT))
        graph.node("Add", found, graph.constant(layer.bias), gives="y")
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "tokens", width])
            for name, width in (("x", self.inputs["x"].shape[-1]), ("y", len(layer.bias)))
        ]
        made = helper.make_graph(graph.nodes, "product", ends[:1], ends[1:], graph.constants)
        opsets = [helper.make_opsetid("", OPSET)]
        save_model(helper.make_model(made, opset_imports=opsets, ir_version=10), str(file))
        return file


@dataclass(frozen=True, eq=False)
class _Graph:
    """Nodes and constants of an ONNX graph, by names that count them."""

    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)

    def constant(self, tensor: Tensor) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(tensor.detach().contiguous().numpy(), f"w{len(self.constants)}"))
        return str(self.constants[-1].name)

    def node(self, kind: str, *inputs: str, gives: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        output = gives or f"h{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return str(self.nodes[-1].output[0])

    def integers(self, found: str, layer: StaticProduct) -> str:
        """A product as ``StaticProduct`` exports it, without a bias."""
        grid = [self.constant(each) for each in (layer.input_scale, layer.input_zero)]
        read = self.node("DequantizeLinear", self.node("QuantizeLinear", found, *grid), *grid)
        weights = [self.constant(each) for each in (layer.integers.T, layer.weight.squeeze(1))]
        return self.node("MatMul", read, self.node("DequantizeLinear", *weights, axis=1))
