"""What a model and its data allow; checked before any work."""

from transformers import PreTrainedModel

from vitshrink.config.options import FinetuneConfig
from vitshrink.errors import UsageError
from vitshrink.models.checkpoint import compressed_layers
from vitshrink.models.families import task_of
from vitshrink.models.structures.tokens import MixedTokens


def check(model: PreTrainedModel, config: FinetuneConfig, *, dense: bool, labelled: bool) -> None:
    """Raises UsageError for an objective that a model does not allow, or that lacks what it needs; before any work."""
    if has_mixed_tokens(model):
        for name in ("blockwise", "features"):
            if getattr(config, name):
                raise UsageError(
                    f"--{name} compares blocks token by token, and this model has mixed tokens: leave it out."
                )
        if task_of(model) == "features":
            raise UsageError(
                "a headless model with mixed tokens cannot be trained: its tokens are not the dense one's."
            )
    if config.objective == "distill":
        if not dense:
            raise UsageError("distillation learns from the dense model: pass it as --teacher.")
        return
    task = task_of(model)
    if task in ("features", "masked-lm"):
        raise UsageError(f"supervised fine-tuning needs a model that predicts labels, and this is one for {task}.")
    if not labelled:
        raise UsageError("supervised fine-tuning needs labels, and the samples have none: pass labelled data.")
    if (config.distillation or config.features) and not dense:
        raise UsageError("distillation learns from the dense model: pass it as --teacher.")
    if config.features and not config.distillation:
        raise UsageError("--features compares with the dense model, which is not asked here: pass --distillation too.")


def has_mixed_tokens(model: PreTrainedModel) -> bool:
    """Whether some block of ``model`` reads tokens that are not the dense model's."""
    return any(isinstance(layer.spec, MixedTokens) for layer in compressed_layers(model).values())


def asks_dense(config: FinetuneConfig) -> bool:
    """Whether training asks the dense model at all."""
    return config.objective == "distill" or bool(config.distillation)
