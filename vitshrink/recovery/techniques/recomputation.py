"""Gradient checkpointing: activations inside a block are computed again in the backward pass and never stored."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel


@contextmanager
def recomputed_activations(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the blocks of ``model`` recompute their activations in the backward pass."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # transformers before 5.2x
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{name}_checkpointing_disable")()
