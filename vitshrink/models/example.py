"""Inputs of the usual shape: to count operations and compare outputs, not to judge a model."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.models.geometry import image_shape

TEXT_TOKENS = 128
"""Length of the text for which operations and latency of a text model are given."""


def example_inputs(model: PreTrainedModel, batch_size: int = 1) -> dict[str, Tensor]:
    """Inputs of the usual shape, the same every time: to count operations and compare outputs, not to judge a model."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(batch_size, *image_shape(config), generator=generator)}
    length = min(TEXT_TOKENS, config.max_position_embeddings)
    tokens = torch.randint(config.vocab_size, (batch_size, length), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
