"""A model with its matrices rounded to integers."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from vitshrink.checkpoint import compressed_layers, replace_layers
from vitshrink.errors import UsageError
from vitshrink.lowrank import LowRankLinear
from vitshrink.models import blocks_of
from vitshrink.structures.quantized import Activations, QuantizedEmbedding, QuantizedEmbeddingSpec, QuantizedLinear
from vitshrink.structures.quantized import QuantizedSpec as Spec


def quantized(
    model: PreTrainedModel, bits: int, activations: Activations, *, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A copy of the model with integers in its blocks: in the linear layers, and in the factors of low-rank ones.

    Factors and word embeddings are rounded to 8 bits even where ``bits`` is 4; embeddings that are tied to the output
    not at all. Heads, norms, positions and the patch projection stay as they are. ``dtype`` is that in which scales
    will be stored (the model's if not given).

    Raises UsageError where the model is quantised already.
    """
    if any(isinstance(layer.spec, Spec | QuantizedEmbeddingSpec) for layer in compressed_layers(model).values()):
        raise UsageError("the model is quantised already: start from the one in floating point.")
    rounded = copy.deepcopy(model).to(dtype or model.dtype)
    names = {module: name for name, module in rounded.named_modules()}
    layers: dict[str, nn.Module] = {}
    for module in blocks_of(rounded).modules():
        if isinstance(module, nn.Linear | LowRankLinear):
            # the factors of a layer with pivots differ too much in size for 4 bits: measured, it is not worth having
            own = 8 if isinstance(module, LowRankLinear) else bits
            layers[names[module]] = QuantizedLinear.from_layer(module, own, activations)
    table, head = rounded.get_input_embeddings(), rounded.get_output_embeddings()
    if isinstance(table, nn.Embedding) and (head is None or head.weight is not table.weight):
        layers[names[table]] = QuantizedEmbedding.from_layer(table)
    replace_layers(rounded, layers)
    return rounded.to(model.dtype).eval()
