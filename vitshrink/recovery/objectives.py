"""What training makes small."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitshrink.config.options import FinetuneConfig
from vitshrink.models.fidelity import BERNOULLI, REGRESSION, SPANS, Head

Term = Callable[[Tensor | None], Tensor]
"""What a technique adds to the loss of the batch that was just run, (); takes its mask (batch, tokens) or None."""


@dataclass(frozen=True)
class Distillation:
    """The divergence of the head from the dense model's answers, as ``vitshrink.models.fidelity`` has it.

    ``scale`` is what a relative error is a share of, the mean spread of the dense model's answers; 1 for nats.
    """

    head: Head
    temperature: float = 1.0
    scale: float = 1.0

    asks_dense = True

    @property
    def plain(self) -> "Distillation":
        """By which a model is judged."""
        return Distillation(self.head, scale=self.scale)

    def loss(self, answer: Tensor, dense: Tensor) -> Tensor:
        """One value for each row."""
        return self.head.divergence(dense.float(), answer.float(), self.temperature) / self.scale


@dataclass(frozen=True)
class Supervision:
    """The loss that transformers trains the head with, ``distillation`` of it replaced by the divergence.

    That is cross-entropy with the labels for one class of several and with the ends of an answer, the same of yes and
    no for labels on their own, and the squared error for numbers. ``smoothing`` moves that part of every label to all
    classes alike.
    """

    head: Head
    smoothing: float = 0.1
    distillation: float = 0.0
    temperature: float = 1.0
    scale: float = 1.0

    @property
    def asks_dense(self) -> bool:
        return self.distillation > 0

    @property
    def plain(self) -> "Supervision":
        """By which a model is judged."""
        return Supervision(self.head, smoothing=0.0)

    def loss(self, answer: Tensor, labels: Tensor, dense: Tensor | None) -> Tensor:
        """One value for each row."""
        answer = answer.float()
        if self.head is REGRESSION:
            loss = (answer - labels.float().reshape(answer.shape)).square().mean(-1)
        elif self.head is SPANS:
            ends = zip(answer.chunk(2, -1), labels.unbind(-1), strict=True)
            first, last = (F.cross_entropy(logits, token, reduction="none") for logits, token in ends)
            loss = (first + last) / 2
        elif self.head is BERNOULLI:
            smooth = torch.lerp(labels.float(), torch.full_like(answer, 0.5), self.smoothing)
            loss = F.binary_cross_entropy_with_logits(answer, smooth, reduction="none").mean(-1)
        else:
            loss = F.cross_entropy(answer, labels, reduction="none", label_smoothing=self.smoothing)
        if dense is None:
            return loss
        divergence = Distillation(self.head, self.temperature, self.scale).loss(answer, dense)
        return torch.lerp(loss, divergence, self.distillation)


Objective = Distillation | Supervision


def objective_of(config: FinetuneConfig, head: Head, scale: float) -> Objective:
    """The objective of ``config`` for a model with this head; ``scale`` is the unit of a relative error."""
    if config.objective == "distill":
        return Distillation(head, config.temperature, scale)
    return Supervision(head, config.label_smoothing, config.distillation or 0.0, config.temperature, scale)
