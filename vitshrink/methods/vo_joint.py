"""Values and outputs together: what a head carries, with fewer dimensions."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vitshrink.methods.attention import ATTENTION, AttentionWeights, Dimensions, Part, attention_method, tail
from vitshrink.models.structures import Structure
from vitshrink.models.structures.headwise import Headwise
from vitshrink.models.structures.narrow import Narrow
from vitshrink.statistics.algebra import square_roots


def structures(dimensions: Dimensions, ranks: Mapping[str, int]) -> dict[str, Structure]:
    return {ATTENTION: Headwise(value=ranks["vo"]), "output": Narrow(dimensions.heads * ranks["vo"])}


@attention_method("vo-joint", parts={"vo": ("value", "output")}, structures=structures)
def vo_joint(attention: AttentionWeights, ranks: Sequence[int], parts: Sequence[str]) -> dict[str, Part]:
    """Best rank-r factors of W_o W_v in every head, in the metric of the activations: smaller heads, no extra product.

    A head adds W_o s to the output, s = Σ_j a_ij (W_v x_j + b_v). With S the covariance of s on the calibration data,
    E‖W_o (s − Π s)‖² is least for the truncated SVD W_o S^½ = U Σ Vᵀ (Eckart and Young, 1936): values Σ^½ Vᵀ S^-½ W_v
    and outputs U Σ^½. Heads are taken one by one. The rows of an attention map add up to one, so that the value bias
    and the mean of s move into the output bias, exactly.
    """
    W_v, W_o = attention.by_head("value"), attention.by_head("output")
    bias, heads = attention.bias_by_head("value"), attention.dimensions.heads
    S_all, mean = attention.covariance("output"), attention.mean("output").reshape(heads, -1)
    blocks = S_all.reshape(heads, len(mean[0]), heads, -1)
    encoders, decoders, values = [], [], []
    for h in range(heads):
        root, inverse = square_roots(blocks[h, :, h])
        U, S, Vh = torch.linalg.svd(W_o[h] @ root, full_matrices=False)
        encoders.append(S.sqrt()[:, None] * Vh @ inverse)
        decoders.append(U * S.sqrt())
        values.append(S.square())
    encode, decode = torch.stack(encoders), torch.stack(decoders)

    def tensors(rank: int) -> dict[str, dict[str, Tensor]]:
        E, D = encode[:, :rank], decode[..., :rank]
        kept = D @ (E @ (bias - mean)[..., None])
        shift = (W_o @ mean[..., None] + kept).sum(0)[:, 0]
        return {
            "value": {"weight": (E @ W_v).flatten(0, 1)},
            "output": {"weight": D.transpose(0, 1).flatten(1), "bias": attention.biases["output"] + shift},
        }

    return {"vo": Part(tail(torch.stack(values).sum(0)), tensors)}
