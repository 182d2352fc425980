"""PyTorch, operation by operation."""

from vitshrink.models.runtimes.registry import Runtime, enter

TORCH = enter(Runtime("torch", lambda program: program.model, "torch", factors=True))
