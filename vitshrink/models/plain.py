"""Low-rank layers as runtimes multiply them fastest: two plain matrices, or one."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.models.structures.coded import decode_all
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.views import view_of


@torch.no_grad()
def plain_view(model: PreTrainedModel) -> PreTrainedModel:
    """A view of the model without entropy-coded matrices and without pivots: the same function of its inputs.

    Pivots save parameters, but runtimes do not see a matrix product in an identity beside a matrix: they slice and add
    for it, and quantize its parts apart.
    """
    view = view_of(model)
    decode_all(view)
    for name, layer in list(view.named_modules()):
        if isinstance(layer, LowRankLinear):
            view.set_submodule(name, plain(layer), strict=True)
    return view


def plain(layer: LowRankLinear) -> LowRankLinear | nn.Linear:
    """The layer with balanced factors, or dense where those would take as many multiplications."""
    up, down = (factor.double() for factor in layer.factors())
    dtype, inputs, outputs = layer.weight.dtype, layer.in_features, layer.out_features
    if layer.rank * (inputs + outputs) < inputs * outputs:
        return LowRankLinear.from_factors(*balanced(up, down), layer.bias, dtype=dtype).train(layer.training)
    dense = nn.Linear(inputs, outputs, bias=False, device="meta")
    dense.weight = nn.Parameter((up @ down).to(dtype))
    dense.register_parameter("bias", layer.bias)
    return dense.train(layer.training)


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (out, rank) and (rank, in) of the same product, with its singular values shared out evenly.

    Column j of the one is as long as row j of the other, so that what is rounded in either counts alike. The rank is at
    most the smaller side of the product.
    """
    left, R = torch.linalg.qr(up)
    right, S = torch.linalg.qr(down.mT)
    U, values, Vh = torch.linalg.svd(R @ S.mT)
    root = values.sqrt()
    return left @ (U * root), root[:, None] * (Vh @ right.mT)
