"""What a compressed model is trained for and judged by: the dense model's answers, or labels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.models.fidelity import REGRESSION, Head
from vitshrink.models.targets import blocks_of
from vitshrink.recovery.answers import Reader, Teacher
from vitshrink.recovery.objectives import Distillation, Objective, Term
from vitshrink.recovery.techniques.augmentation import Augmentation
from vitshrink.recovery.training_set import TrainingBatch, TrainingSet
from vitshrink.runtime.modes import evaluating

HELD_OUT = -1
"""The view of a sample by which a model is judged: as it is, where the model was not fitted to just that."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What the model says of a batch, and the dense model beside it; ``teacher`` is None where only labels count."""

    reader: Reader
    teacher: Teacher | None

    def losses(self, objective: Objective, batch: TrainingBatch, view: int | None) -> Tensor:
        """One loss for each row; ``view`` is as in ``Teacher``."""
        dense: Tensor | None = None
        if self.teacher is not None and objective.asks_dense:
            dense = self.teacher(batch, view)
        answer = self.reader(batch)
        if isinstance(objective, Distillation):
            assert dense is not None
            return objective.loss(answer, dense)
        assert batch.labels is not None
        return objective.loss(answer, batch.labels, dense)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The samples that choose the best state; each process runs a share of them, and all get the rows of all."""

    accelerator: Accelerator
    data: TrainingSet
    indices: Sequence[int]
    batch_size: int
    augmentation: Augmentation
    familiar: bool
    """Whether the model was fitted to these samples: other views of them judge it then."""

    @torch.no_grad()
    def losses(self, answers: Answers, objective: Objective) -> list[float]:
        """The plain loss of every row, the same in every process."""
        with evaluating(answers.reader.model):
            return self._rows(lambda batch: answers.losses(objective.plain, batch, HELD_OUT))

    @torch.no_grad()
    def spread(self, teacher: Teacher, head: Head) -> float:
        """The mean loss of the best answer that is the same for every sample: one pass of the dense model."""
        if head is REGRESSION:  # its constant answer is the mean over all of them
            answers = self._rows(lambda batch: teacher(batch, HELD_OUT))
            return float(head.spread(torch.tensor(answers)).mean())
        losses = self._rows(lambda batch: head.spread(teacher(batch, HELD_OUT).float()))
        return float(torch.tensor(losses).mean()) if losses else 0.0

    def _rows(self, of: Callable[[TrainingBatch], Tensor]) -> list[Any]:
        found: list[Any] = []
        with self.accelerator.split_between_processes(list(self.indices)) as own:
            for start in range(0, len(own), self.batch_size):
                if items := self.data.__getitems__(own[start : start + self.batch_size]):
                    batch = self._seen(self.data.collate(items)).to(self.accelerator.device)
                    found += of(batch).float().tolist()
        return list(gather_object(found))

    def _seen(self, batch: TrainingBatch) -> TrainingBatch:
        if self.familiar:
            return replace(self.augmentation, mixing=0.0).apply(batch, HELD_OUT)
        return self.augmentation.hide_only(batch, HELD_OUT)


@dataclass(frozen=True, eq=False)
class Criterion:
    """A batch to the loss that gradients flow from."""

    answers: Answers
    objective: Objective
    augmentation: Augmentation
    augment: bool
    views: int | None
    """Different augmentations of a sample; None: new ones in each epoch."""
    dropout: bool
    terms: Sequence[Term] = ()
    dense_anew: bool = False
    """Whether the terms read what happens inside the dense model: it then has to run, though its answer is known."""

    def training_loss(self, batch: TrainingBatch, epoch: int) -> Tensor:
        """The loss ()."""
        view = epoch if self.views is None else epoch % self.views
        if self.augment:
            batch = self.augmentation.apply(batch, view)
            known = None if self.views is None or self.augmentation.mixing else view
        else:
            batch = self.augmentation.hide_only(batch, view)
            known = 0
        train_mode(self.answers.reader.model, dropout=self.dropout)
        loss = self.answers.losses(self.objective, batch, None if self.dense_anew else known).mean()
        for term in self.terms:
            loss = loss + term(batch.token_mask)
        return loss


def train_mode(model: PreTrainedModel, *, dropout: bool) -> None:
    """Training mode, but where the dense model is the target without the noise of dropout."""
    model.train(dropout)
    model.training = True
    for block in blocks_of(model):
        block.training = True  # where transformers looks whether to recompute activations
