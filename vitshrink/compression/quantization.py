"""A model with its matrices rounded to integers, and what it takes in bytes."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import nn
from transformers import PreTrainedModel

from vitshrink.config.options import CompressConfig, quantized_bits
from vitshrink.errors import UsageError
from vitshrink.methods.ranks import Storage
from vitshrink.models import cost
from vitshrink.models.checkpoint import HEADER_BYTES, compressed_layers, replace_layers
from vitshrink.models.structures import structure_of
from vitshrink.models.structures.coded import CodedSpec
from vitshrink.models.structures.low_rank import LayerSpec, LowRankLinear
from vitshrink.models.structures.narrow import Narrow
from vitshrink.models.structures.quantized import (
    Activations,
    QuantizedEmbedding,
    QuantizedEmbeddingSpec,
    QuantizedLinear,
    matrix_bytes,
)
from vitshrink.models.structures.quantized import QuantizedSpec as Spec
from vitshrink.models.structures.static import StaticSpec
from vitshrink.models.targets import blocks_of
from vitshrink.models.views import cast_view, view_of

FACTOR_BITS = 8
"""Bits of low-rank factors: those of a layer with pivots differ too much in size for 4, measured."""


@dataclass(frozen=True)
class Quantization:
    """How the weights of a job are rounded. ``dtype`` is that of scales, and of all that is not rounded."""

    bits: int
    activations: Activations
    dtype: torch.dtype

    @classmethod
    def of(cls, config: CompressConfig, dtype: torch.dtype) -> Self | None:
        """What a job asks for, if it does."""
        if config.rounded_to is None:
            return None
        return cls(*quantized_bits(config.rounded_to, config.activations), dtype)

    def applied(self, model: PreTrainedModel) -> PreTrainedModel:
        """A view of the model with integers, see ``quantized``."""
        return quantized(model, self.bits, self.activations, dtype=self.dtype)

    def file_bytes(self, model: PreTrainedModel) -> int:
        """At most so many bytes take the weight files of the model once it is rounded."""
        rounded = cast_view(self.applied(model), self.dtype)
        return cost.stored_bytes(rounded) + HEADER_BYTES * len(rounded.state_dict())

    def low_rank_bytes(self, shape: tuple[int, int], rank: int, storage: Storage) -> int:
        """Bytes in the file of a layer as two rounded factors, with what its second factor adds to the header."""
        m, n = shape
        inner = n - rank if storage == "gauge" else n
        factors = sum(matrix_bytes(*each, FACTOR_BITS, self.dtype.itemsize) for each in ((m, rank), (rank, inner)))
        return factors + 2 * HEADER_BYTES  # of the second factor and its scales

    def dense_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes in the file of a rounded layer of full rank."""
        return matrix_bytes(*shape, self.bits, self.dtype.itemsize)


@torch.no_grad()
def quantized(
    model: PreTrainedModel, bits: int, activations: Activations, *, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A view of the model with integers in its blocks: in the linear layers, and in the factors of low-rank ones.

    Factors and word embeddings are rounded to 8 bits even where ``bits`` is 4; embeddings that are tied to the output
    not at all. Heads, norms, positions and the patch projection stay as they are. ``dtype`` is that in which scales
    will be stored (the model's if not given).

    Raises UsageError where the model is quantized already.
    """
    require_floating_point(model)
    rounded = cast_view(view_of(model), dtype or model.dtype)
    names = {module: name for name, module in rounded.named_modules()}
    layers: dict[str, nn.Module] = {}
    for module in blocks_of(rounded).modules():
        spec = structure_of(module)
        # another linear layer that is a structure itself would be rebuilt as another one
        if isinstance(module, nn.Linear | LowRankLinear) and (spec is None or isinstance(spec, LayerSpec | Narrow)):
            own = FACTOR_BITS if isinstance(module, LowRankLinear) else bits
            layers[names[module]] = QuantizedLinear.from_layer(module, own, activations)
    replace_layers(rounded, layers | integer_table(rounded))
    cast_view(rounded, model.dtype).eval()
    return rounded


def require_floating_point(model: PreTrainedModel) -> None:
    """Raises UsageError where the model is quantized already."""
    known = (Spec, QuantizedEmbeddingSpec, CodedSpec, StaticSpec)
    if any(isinstance(layer.spec, known) for layer in compressed_layers(model).values()):
        raise UsageError("the model is already quantized: start from the floating-point model.")


def integer_table(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The word embeddings with rows of integers, by name; none where they are tied to the output."""
    try:
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # some image models cannot say what they read patches with
        return {}
    if not isinstance(table, nn.Embedding) or (head is not None and head.weight is table.weight):
        return {}
    name = next(name for name, module in model.named_modules() if module is table)
    return {name: QuantizedEmbedding.from_layer(table)}
