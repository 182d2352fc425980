"""The two things that a compressed model can be trained for: the dense model's answers, or labels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from vitshrink.models.fidelity import REGRESSION
from vitshrink.recovery.answers import Reader, Teacher
from vitshrink.recovery.augmentation import Augmentation
from vitshrink.recovery.decatt import HeadOutputs
from vitshrink.recovery.hidden import BlockOutputs
from vitshrink.recovery.objectives import Distillation, Supervision
from vitshrink.recovery.samples import TrainingBatch, TrainingSet
from vitshrink.runtime.modes import evaluating

HELD_OUT = -1
"""The view of a sample by which a model is judged: as it is, where the model was not fitted to just that."""


@dataclass
class Criterion:
    """A batch to its loss; the held-out samples to their plain ones.

    ``teacher`` is None where only labels count.
    """

    accelerator: Accelerator
    reader: Reader
    teacher: Teacher | None
    objective: Distillation | Supervision
    augmentation: Augmentation
    data: TrainingSet
    held_out: Sequence[int]
    batch_size: int
    augment: bool
    familiar: bool
    """Whether the model was fitted to the held-out samples: other views of them judge it then."""
    views: int | None
    decatt: float = 0.0
    heads: HeadOutputs | None = None
    features: float = 0.0
    blocks: BlockOutputs | None = None
    training_mode: Callable[[], None] = lambda: None

    def training_loss(self, batch: TrainingBatch, epoch: int) -> Tensor:
        """The loss (), from which gradients flow."""
        view = epoch if self.views is None else epoch % self.views
        if self.augment:
            batch = self.augmentation.apply(batch, view)
            known = None if self.views is None or self.augmentation.mixing else view
        else:
            batch = self.augmentation.hide_only(batch, view)
            known = 0
        if self.blocks is not None:
            known = None  # what is kept of an answer is not what the blocks gave
        self.training_mode()
        loss = self._rows(self.objective, batch, known).mean()
        if self.blocks is not None:
            loss = loss + self.features * self.blocks.error(batch.mask)
        if self.heads is not None:
            loss = loss + self.decatt * self.heads.correlation(batch.mask)
        return loss

    @torch.no_grad()
    def held_out_losses(self) -> list[float]:
        """The plain loss of every row of the held-out samples, the same in every process."""
        with evaluating(self.reader.model):
            return self._of_held_out(lambda batch: self._rows(self.objective.plain, batch, HELD_OUT))

    @torch.no_grad()
    def spread(self) -> float:
        """The mean loss of the best answer that is the same for every held-out sample, before it is scaled."""
        assert self.teacher is not None
        teacher, head = self.teacher, self.objective.head
        if head is REGRESSION:  # its constant answer is the mean over all of them
            answers = self._of_held_out(lambda batch: teacher(batch, HELD_OUT))
            return float(head.spread(torch.tensor(answers)).mean())
        losses = self._of_held_out(lambda batch: head.spread(teacher(batch, HELD_OUT).float()))
        return float(torch.tensor(losses).mean()) if losses else 0.0

    def _of_held_out(self, rows: Callable[[TrainingBatch], Tensor]) -> list[Any]:
        found: list[Any] = []
        with self.accelerator.split_between_processes(list(self.held_out)) as own:
            for start in range(0, len(own), self.batch_size):
                if items := self.data.__getitems__(own[start : start + self.batch_size]):
                    batch = self._held_out(self.data.collate(items)).to(self.accelerator.device)
                    found += rows(batch).float().tolist()
        return list(gather_object(found))

    def _held_out(self, batch: TrainingBatch) -> TrainingBatch:
        if self.familiar:
            return replace(self.augmentation, mixing=0.0).apply(batch, HELD_OUT)
        return self.augmentation.hide_only(batch, HELD_OUT)

    def _rows(self, objective: Distillation | Supervision, batch: TrainingBatch, view: int | None) -> Tensor:
        dense: Tensor | None = None
        if self.teacher is not None and objective.asks_dense:
            dense = self.teacher(batch, view)
        answer = self.reader(batch)
        if isinstance(objective, Distillation):
            assert dense is not None
            return objective.loss(answer, dense)
        assert batch.labels is not None
        return objective.loss(answer, batch.labels, dense)
