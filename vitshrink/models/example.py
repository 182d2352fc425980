"""Inputs of the usual shape: to count operations and compare outputs, not to judge a model."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.models.geometry import image_shape
from vitshrink.models.tasks import task_of

COUNT_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet", "data2vec-text", "xlm-roberta-xl")
"""Types of models whose positions begin after the number of the padding token, which is 1 as a rule."""

CHOICES = 2
"""Of a sample for which operations and latency of a multiple-choice model are given."""

TEXT_TOKENS = 128
"""Length of the text for which operations and latency of a text model are given."""


def text_length(config: Any) -> int | None:
    """Of the longest text that a model can take, in tokens; None where its positions have no end.

    Models like RoBERTa count positions from the one after their padding token's.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    return positions - (max(1, config.pad_token_id) + 1 if config.model_type in COUNT_FROM_PADDING else 0)


def example_inputs(model: PreTrainedModel, batch_size: int = 1) -> dict[str, Tensor]:
    """Inputs of the usual shape, the same every time: to count operations and compare outputs, not to judge a model."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(batch_size, *image_shape(config), generator=generator)}
    length = min(TEXT_TOKENS, text_length(config) or TEXT_TOKENS)
    choices = (CHOICES,) if task_of(model) == "multiple-choice" else ()
    tokens = torch.randint(config.vocab_size, (batch_size, *choices, length), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
