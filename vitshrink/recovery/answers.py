"""What a model says of a batch: the tensors by which two models are compared."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.models import Task, task_of
from vitshrink.recovery.samples import TrainingBatch

CACHE_BYTES = 2**30
"""Of the answers of the dense model that are kept."""


@dataclass(frozen=True)
class Answer:
    """``logits`` (rows, classes), or None for a headless model; ``features`` (rows, width).

    A row is a sample, or a token: one that is hidden from a masked language model, or a real one of a headless model.
    The features of a classifier are those that its head reads.
    """

    logits: Tensor | None
    features: Tensor

    @property
    def nbytes(self) -> int:
        return self.features.nbytes + (0 if self.logits is None else self.logits.nbytes)


class Reader:
    """Runs a model and takes its answer apart.

    ``run`` calls the model, which may be wrapped by accelerate; ``model`` is what is inside.
    """

    def __init__(self, model: PreTrainedModel, run: Callable[..., Any] | None = None) -> None:
        self.model = model
        self.run = run or model
        self.task: Task = task_of(model)
        self.read_tokens = 2 if hasattr(model, "distillation_classifier") else 1

    def __call__(self, batch: TrainingBatch) -> Answer:
        if self.task == "features":
            hidden: Tensor = self.run(**batch.inputs).last_hidden_state
            return Answer(None, hidden.flatten(0, 1) if batch.mask is None else hidden[batch.mask])
        with self._features(batch) as features:
            logits: Tensor = self.run(**batch.inputs).logits
        return Answer(logits.squeeze(0) if self.task == "masked-lm" else logits, features[0])

    @contextmanager
    def _features(self, batch: TrainingBatch) -> Iterator[list[Tensor]]:
        """The features that the head reads, of the pass inside."""
        features: list[Tensor] = []

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            hidden = output.last_hidden_state
            if self.task != "masked-lm":
                features.append(hidden[:, : self.read_tokens].flatten(1))
                return output
            assert batch.selected is not None
            # the head works token by token, so it is given the hidden ones alone: a vocabulary is wide
            features.append(hidden[batch.selected])
            output.last_hidden_state = features[0].unsqueeze(0)
            return output

        handle = self.model.base_model.register_forward_hook(hook)
        try:
            yield features
        finally:
            handle.remove()


class Teacher:
    """The dense model's answers, kept where a view of a sample comes again and memory allows."""

    def __init__(self, reader: Reader, *, autocast: Callable[[], Any], room: int = CACHE_BYTES) -> None:
        self.reader = reader
        self.autocast = autocast
        self.room = room
        self._kept: dict[tuple[int, int], Answer] = {}

    @torch.no_grad()
    def __call__(self, batch: TrainingBatch, view: int | None) -> Answer:
        """The answer to a batch; ``view`` names the augmentation of its samples, None one that will not come again."""
        one_row_each = self.reader.task in ("image-classification", "text-classification")
        keys = [(int(index), view) for index in batch.indices] if view is not None and one_row_each else []
        known = [self._kept.get(key) for key in keys]
        if known and all(known):
            return _joined([answer for answer in known if answer is not None], self._device)
        with self.autocast():
            answer = self.reader(batch)
        answer = Answer(None if answer.logits is None else answer.logits.float(), answer.features.float())
        if keys and self.room >= answer.nbytes:
            self.room -= answer.nbytes
            self._kept |= {key: _row(answer, row) for row, key in enumerate(keys)}
        return answer

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self.reader.model.parameters()).device
        return device


def _row(answer: Answer, row: int) -> Answer:
    logits = None if answer.logits is None else answer.logits[row].cpu()
    return Answer(logits, answer.features[row].cpu())


def _joined(rows: list[Answer], device: torch.device) -> Answer:
    logits = [row.logits for row in rows if row.logits is not None]
    features = torch.stack([row.features for row in rows]).to(device)
    return Answer(torch.stack(logits).to(device) if logits else None, features)
