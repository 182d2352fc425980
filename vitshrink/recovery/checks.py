"""What a model and its data allow; checked before any work."""

from transformers import PreTrainedModel

from vitshrink.config.options import FinetuneConfig
from vitshrink.errors import UsageError
from vitshrink.models.checkpoint import compressed_layers
from vitshrink.models.families import family_of
from vitshrink.models.reading import chain_problem
from vitshrink.models.structures.merging import MergedTokens
from vitshrink.models.structures.tokens import MixedTokens
from vitshrink.models.tasks import Task, task_of


def check(model: PreTrainedModel, config: FinetuneConfig, *, dense: bool, labeled: bool) -> None:
    """Raises UsageError for an objective that a model does not allow, or that lacks what it needs; before any work."""
    if task_of(model) == "image-text":
        raise UsageError(
            f"{type(model).__name__} is a dual encoder, and vitshrink does not train dual encoders: remove "
            "--finetune, or save one tower with save_pretrained and train it."
        )
    check_tokens(config, task_of(model), tokens_kind(model))
    check_blocks(config, model)
    if config.objective == "distill":
        if not dense:
            raise UsageError("distillation learns from the dense model: pass it as --teacher.")
        return
    task = task_of(model)
    if task in ("features", "masked-lm"):
        raise UsageError(f"supervised fine-tuning needs a model that predicts labels, but this model is for {task}.")
    if not labeled:
        raise UsageError("supervised fine-tuning needs labels, but the samples have none: pass labeled data.")
    if (config.distillation or config.features) and not dense:
        raise UsageError("distillation learns from the dense model: pass it as --teacher.")
    if config.features and not config.distillation:
        raise UsageError(
            "--features compares with the dense model, which the supervised objective does not run: pass "
            "--distillation too."
        )


def check_blocks(config: FinetuneConfig, model: PreTrainedModel) -> None:
    """Raises UsageError for techniques that need to know more of the blocks than is known of this model."""
    kind = f"{type(model).__name__} ({family_of(model).model_type})"
    if config.decatt and not family_of(model).plain:
        raise UsageError(f"--decatt: vitshrink does not know where the heads of {kind} are: remove --decatt.")
    asked = next((name for name in ("blockwise", "bdia", "reversible") if getattr(config, name)), None)
    if asked is not None and tokens_kind(model) is None and (problem := chain_problem(model)) is not None:
        raise UsageError(f"--{asked} runs the blocks of {kind} one after another, and {problem}: remove --{asked}.")


def check_tokens(config: FinetuneConfig, task: Task, kind: str | None) -> None:
    """Raises UsageError for what cannot be trained where tokens are "mixed" or "merged"; None are the dense model's."""
    if kind is None:
        return
    for name in ("blockwise", "features"):
        if getattr(config, name):
            raise UsageError(
                f"--{name} compares blocks token by token, and this model has {kind} tokens: remove --{name}."
            )
    if task == "features":
        raise UsageError(
            f"a headless model with {kind} tokens cannot be trained, because its tokens differ from those of the "
            "dense model."
        )
    if kind == "merged" and (config.bdia or config.reversible):
        raise UsageError(
            "--bdia and --reversible need the same number of tokens in every block, and this model merges tokens."
        )


def tokens_kind(model: PreTrainedModel) -> str | None:
    """What the tokens are that some block of ``model`` reads; None where they are the dense model's."""
    for layer in compressed_layers(model).values():
        if isinstance(layer.spec, MixedTokens | MergedTokens):
            return "mixed" if isinstance(layer.spec, MixedTokens) else "merged"
    return None


def asks_dense(config: FinetuneConfig) -> bool:
    """Whether training asks the dense model at all."""
    return config.objective == "distill" or bool(config.distillation)
