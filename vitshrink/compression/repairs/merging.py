"""The biases of a model that merges tokens: they put back what merging changes in the outputs of all samples alike."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from vitshrink.compression.repairs.rescaling import forward_passes, rescale_components
from vitshrink.data.batches import Batch
from vitshrink.models.merged import reads_special_only
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.targets import named_blocks
from vitshrink.runtime.observer import Job
from vitshrink.statistics.reference import DenseOutputs
from vitshrink.statistics.sharing import shared_effects, shared_shortfall


def shift_merged(
    model: PreTrainedModel, reference: DenseOutputs, batches: Sequence[Batch], job: Job, *, seed: int
) -> None:
    """Fit the biases of all layers of the blocks of ``model`` to the outputs of the dense one, in place.

    Only where these are outputs of the same tokens: a model that gives its tokens has fewer of them.
    """
    if not reads_special_only(model):
        return
    total = forward_passes(sum(len(batch.keys) for batch in batches))
    with job.stage("shift", "Fitting biases to merged tokens", total) as advance:
        rescale_components(
            model,
            reference,
            shifted_layers(model),
            None,
            batches,
            seed=seed,
            passes=reference.passes,
            measure=shared_effects,
            lacking=shared_shortfall,
            on_passes=advance,
        )


def shifted_layers(model: PreTrainedModel) -> list[str]:
    """Names of the layers whose biases are fitted."""
    return [
        f"{block}.{name}"
        for block, module in named_blocks(model).items()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | LowRankLinear) and layer.bias is not None
    ]
