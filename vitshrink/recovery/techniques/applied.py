"""All techniques that a config asks for, together."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from transformers import PreTrainedModel

from vitshrink.config.options import FinetuneConfig
from vitshrink.models.loading import FLASH, flash_attention
from vitshrink.recovery.objectives import Term
from vitshrink.recovery.techniques.decatt import decorrelated_heads
from vitshrink.recovery.techniques.hidden import near_blocks
from vitshrink.recovery.techniques.recomputation import recomputed_activations
from vitshrink.recovery.techniques.reversible import bidirectional


@contextmanager
def applied(
    model: PreTrainedModel, dense: PreTrainedModel | None, config: FinetuneConfig, *, features: float, attention: str
) -> Iterator[list[Term]]:
    """Inside, ``model`` is trained by the techniques of ``config``; gives what they add to the loss of a batch.

    Args:
        features: weight of the error of the blocks' outputs; 0 leaves it out.
        attention: ``flash`` runs both models by its kernels.
    """
    terms = []
    with ExitStack() as inside:
        if config.gradient_checkpointing:
            inside.enter_context(recomputed_activations(model))
        if attention == FLASH:
            inside.enter_context(flash_attention(model, *([] if dense is None else [dense])))
        if config.bdia or config.reversible:
            kind = bidirectional(model, reversible=config.reversible, gamma=config.gamma, momentum=config.momentum)
            inside.enter_context(kind)
        if features and dense is not None:
            terms.append(inside.enter_context(near_blocks(model, dense, features)))
        if config.decatt:
            terms.append(inside.enter_context(decorrelated_heads(model, config.decatt)))
        yield terms
