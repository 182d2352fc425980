"""What training makes small."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Distillation:
    """KL(dense ‖ compressed) of the logits, in nats.

    A regression is compared by the squared error of its scores over their variance, a ``headless`` model by the
    relative error of its features. ``temperature`` divides the logits; its square keeps the size of the gradients
    (Hinton, Vinyals and Dean, arXiv 1503.02531).
    """

    temperature: float = 1.0
    headless: bool = False

    asks_dense = True

    @property
    def plain(self) -> "Distillation":
        """By which a model is judged."""
        return Distillation(headless=self.headless)

    def loss(self, answer: Tensor, dense: Tensor) -> Tensor:
        """One value for each row."""
        return relative_error(answer, dense) if self.headless else divergence(answer, dense, self.temperature)


@dataclass(frozen=True)
class Supervision:
    """Cross-entropy with the labels, smoothed, ``distillation`` of it replaced by the divergence from the dense model.

    The loss of a regression is the squared error.
    """

    smoothing: float = 0.1
    distillation: float = 0.0
    temperature: float = 1.0

    @property
    def asks_dense(self) -> bool:
        return self.distillation > 0

    @property
    def plain(self) -> "Supervision":
        """By which a model is judged."""
        return Supervision(smoothing=0.0)

    def loss(self, answer: Tensor, labels: Tensor, dense: Tensor | None) -> Tensor:
        """One value for each row."""
        logits = answer.float()
        if logits.shape[-1] == 1:
            loss = (logits.squeeze(-1) - labels.float()).square()
        else:
            loss = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.smoothing)
        if dense is None:
            return loss
        return torch.lerp(loss, divergence(logits, dense, self.temperature), self.distillation)


def divergence(logits: Tensor, dense: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(dense ‖ logits) of each row; of scores (rows, 1) the squared difference over their variance."""
    logits, dense = logits.float(), dense.float()
    if logits.shape[-1] == 1:
        scale = dense.var().clamp_min(1e-12) if len(dense) > 1 else dense.new_ones(())
        return (logits - dense).square().squeeze(-1) / scale
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (dense, logits))
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1) * temperature**2


def relative_error(features: Tensor, dense: Tensor) -> Tensor:
    """|features − dense|² of each row over the mean of |dense|²."""
    features, dense = features.float(), dense.float()
    return (features - dense).square().sum(-1) / dense.square().sum(-1).mean().clamp_min(1e-12)
