"""What a model says of a batch: the tensor by which two models are compared."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.models.readings import reading_of
from vitshrink.models.tasks import Task, task_of
from vitshrink.recovery.training_set import TrainingBatch
from vitshrink.statistics.reference import Kept

CACHE_BYTES = 2**30
"""Of the answers of the dense model that are kept."""


class Reader:
    """Runs a model: rows as ``models.readings`` has them, or the logits of the tokens hidden from a masked LM.

    ``run`` calls the model, which may be wrapped by accelerate; ``model`` is what is inside.
    """

    def __init__(self, model: PreTrainedModel, run: Callable[..., Any] | None = None) -> None:
        self.model = model
        self.run = run or model
        self.task: Task = task_of(model)
        self.reading = reading_of(model)

    def __call__(self, batch: TrainingBatch) -> Tensor:
        if self.task == "masked-lm":
            with self._asked(batch):
                logits: Tensor = self.run(**batch.inputs).logits
            return logits.squeeze(0)
        return self.reading.rows(self.run(**batch.inputs), batch)

    @contextmanager
    def _asked(self, batch: TrainingBatch) -> Iterator[None]:
        """Inside, the head of a masked language model is given the hidden tokens alone: a vocabulary is wide."""

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            assert batch.selected is not None
            output.last_hidden_state = output.last_hidden_state[batch.selected].unsqueeze(0)
            return output

        handle = self.model.base_model.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


class Teacher:
    """The dense model's answers, kept where a view of a sample comes again and memory allows."""

    def __init__(self, reader: Reader, *, autocast: Callable[[], Any], room: int = CACHE_BYTES) -> None:
        self.reader = reader
        self.autocast = autocast
        self._kept: Kept[tuple[int, int], Tensor] = Kept(room)
        """By sample and view: each epoch puts other samples together to a batch."""

    @torch.no_grad()
    def __call__(self, batch: TrainingBatch, view: int | None) -> Tensor:
        """The answer to a batch; ``view`` names the augmentation of its samples, None one that will not come again."""
        one_row_each = self.reader.task in ("image-classification", "text-classification")
        keys = [(int(index), view) for index in batch.indices] if view is not None and one_row_each else []
        if keys and all(key in self._kept for key in keys):
            device: torch.device = next(self.reader.model.parameters()).device
            return torch.stack([self._kept[key] for key in keys]).to(device)
        with self.autocast():
            answer = self.reader(batch).float()
        if keys:
            self._kept.keep(dict(zip(keys, answer.cpu(), strict=True)), answer.nbytes)
        return answer
