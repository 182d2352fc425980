"""Inputs of the usual shape: to count operations and compare outputs, not to judge a model."""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.models.duals import FILLED
from vitshrink.models.geometry import image_shape, sides
from vitshrink.models.tasks import task_of

COUNT_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet", "data2vec-text", "xlm-roberta-xl")
"""Types of models whose positions begin after the number of the padding token, which is 1 as a rule."""

CHOICES = 2
"""Of a sample for which operations and latency of a multiple-choice model are given."""

USUAL_PATCH = 16
"""Pixels of the side of a patch, where a config does not say it."""

TEXT_TOKENS = 128
"""Length of the text for which operations and latency of a text model are given."""


def text_config(config: Any) -> Any:
    """The part of a config that is about texts: that of a tower, in a dual encoder."""
    return getattr(config, "text_config", config)


def text_length(config: Any) -> int | None:
    """Of the longest text that a model can take, in tokens; None where its positions have no end.

    Models like RoBERTa count positions from the one after their padding token's.
    """
    config = text_config(config)
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    return positions - (max(1, config.pad_token_id) + 1 if config.model_type in COUNT_FROM_PADDING else 0)


def _sees(model: PreTrainedModel) -> bool:
    return task_of(model) == "image-text" or model.main_input_name == "pixel_values"


def usual_tokens(model: PreTrainedModel) -> int:
    """Patches of an image, or tokens of a text of the usual length; of a pair the larger of both."""
    config, numbers = model.config, []
    if _sees(model):
        _, *area = image_shape(config)
        patch = sides(getattr(getattr(config, "vision_config", config), "patch_size", USUAL_PATCH))
        numbers.append(math.prod(side // size for side, size in zip(area, patch, strict=True)))
    if not _sees(model) or task_of(model) == "image-text":
        numbers.append(_length(config))
    return max(numbers)


def _length(config: Any) -> int:
    return min(TEXT_TOKENS, text_length(config) or TEXT_TOKENS)


def example_inputs(model: PreTrainedModel, batch_size: int = 1) -> dict[str, Tensor]:
    """Inputs of the usual shape, the same every time: to count operations and compare outputs, not to judge a model."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    task, inputs = task_of(model), {}
    if _sees(model):
        inputs["pixel_values"] = torch.randn(batch_size, *image_shape(config), generator=generator)
        if task != "image-text":
            return inputs
    length = _length(config)
    choices = (CHOICES,) if task == "multiple-choice" else ()
    vocabulary = text_config(config).vocab_size
    inputs["input_ids"] = torch.randint(vocabulary, (batch_size, *choices, length), generator=generator)
    if not (task == "image-text" and config.model_type in FILLED):
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs
