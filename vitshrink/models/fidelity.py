"""How far apart the outputs of two models are: one notion for each kind of head.

Reports show the mean ``divergence`` of a head, bounds limit it, recovery makes it small, and curvature and repairs
follow its second derivative, which is the second moment of ``probe``. Outputs are compared row by row: a row holds the
logits of a sample, those of a hidden token, or the features of a sample (``feature_rows``).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

OUTSIDE = -1e4
"""The logit of what cannot be: no probability in any type, and no infinity to compute with."""

_CHUNK = 1 << 22  # numbers held at a time where a result is built in pieces


class Head(ABC):
    """What the outputs of a model mean."""

    measure: ClassVar[str]
    """Name of the divergence in reports: ``kl``, in nats, or ``relative_error``, a share of ``spread``."""

    @abstractmethod
    def divergence(self, dense: Tensor, other: Tensor, temperature: float = 1.0) -> Tensor:
        """How far ``other`` (rows, width) is from ``dense``, (rows,); zero where they are equal.

        ``temperature`` divides logits, and its square keeps the size of the gradients (Hinton, Vinyals and Dean,
        arXiv 1503.02531).
        """

    @abstractmethod
    def probe(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """A random v like ``rows`` whose E[v vᵀ] is the second derivative of the divergence, up to a factor."""

    def constant(self, dense: Tensor) -> Tensor:
        """The best of those answers (rows, width) that are the same for every row."""
        return torch.zeros_like(dense)

    def spread(self, dense: Tensor) -> Tensor:
        """What ``constant`` loses, (rows,): relative errors are shares of its mean."""
        return self.divergence(dense, self.constant(dense))

    def decisions(self, _rows: Tensor) -> Tensor | None:
        """What a user reads off the rows: a class (rows,), or yes and no (rows, labels). None for plain numbers."""
        return None


class Softmax(Head):
    """One class of several: KL(dense ‖ other) of the softmax, in nats."""

    measure = "kl"

    def divergence(self, dense: Tensor, other: Tensor, temperature: float = 1.0) -> Tensor:
        log_p, log_q = ((logits / temperature).log_softmax(-1) for logits in (dense, other))
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1) * temperature**2

    def probe(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """E[v vᵀ] = diag(p) − p pᵀ, the Fisher information of the softmax.

        A label drawn from the softmax has the same second moment, but nearly always is the one class that a confident
        model predicts, and then says nothing; this v is as long for every draw: v = √p ∘ (ξ − √p √pᵀ ξ), ξ = ±1.
        """
        q = rows.detach().float().softmax(-1).sqrt()
        xi = signs(q, generator)
        return q * (xi - q * (q * xi).sum(-1, keepdim=True))

    def decisions(self, rows: Tensor) -> Tensor:
        return rows.argmax(-1)


class Spans(Head):
    """Where a part of a text begins and where it ends, one softmax each: the sum of their KL, in nats.

    A row holds the logits of the beginning and those of the end side by side, with ``OUTSIDE`` where neither may be.
    """

    measure = "kl"

    def divergence(self, dense: Tensor, other: Tensor, temperature: float = 1.0) -> Tensor:
        pairs = zip(dense.chunk(2, -1), other.chunk(2, -1), strict=True)
        first, last = (SOFTMAX.divergence(*pair, temperature) for pair in pairs)
        return first + last

    def probe(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Two of the softmax, independent of each other."""
        return torch.cat([SOFTMAX.probe(side, generator) for side in rows.chunk(2, -1)], -1)

    def constant(self, dense: Tensor) -> Tensor:
        return torch.where(dense > OUTSIDE, torch.zeros_like(dense), dense)


class Bernoulli(Head):
    """Any number of several labels, each yes or no on its own: KL of the sigmoids, summed over labels, in nats."""

    measure = "kl"

    def divergence(self, dense: Tensor, other: Tensor, temperature: float = 1.0) -> Tensor:
        p, q = dense / temperature, other / temperature
        # log σ(x) and log σ(−x), which is that of no
        terms = (torch.sigmoid(s * p) * (F.logsigmoid(s * p) - F.logsigmoid(s * q)) for s in (1, -1))
        return sum(terms, torch.zeros_like(p)).sum(-1) * temperature**2

    def probe(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """E[v vᵀ] = diag(p (1 − p)), the Fisher information of independent labels."""
        p = rows.detach().float().sigmoid()
        return (p * (1 - p)).sqrt() * signs(p, generator)

    def decisions(self, rows: Tensor) -> Tensor:
        """Yes where the sigmoid is above one half, as pipelines do."""
        return rows > 0


class Regression(Head):
    """Plain numbers: their squared error, as a share of the variance of the dense model's."""

    measure = "relative_error"

    def divergence(self, dense: Tensor, other: Tensor, temperature: float = 1.0) -> Tensor:  # noqa: ARG002
        return (dense - other).square().sum(-1)

    def probe(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        return signs(rows.detach().float(), generator)

    def constant(self, dense: Tensor) -> Tensor:
        return dense.mean(0).expand_as(dense)


class Features(Regression):
    """Hidden states of a headless model as ``feature_rows``: their squared error, as a share of their own squares."""

    def constant(self, dense: Tensor) -> Tensor:
        return torch.zeros_like(dense)


SOFTMAX, SPANS, BERNOULLI, REGRESSION, FEATURES = Softmax(), Spans(), Bernoulli(), Regression(), Features()

PROBLEM_TYPES: Mapping[str, Head] = {
    "regression": REGRESSION,
    "single_label_classification": SOFTMAX,
    "multi_label_classification": BERNOULLI,
}
"""The head by ``problem_type`` of a config."""


def classification_head(problem_type: str | None, outputs: int) -> Head:
    """The head of a sequence or image classifier, by ``problem_type`` of its config.

    As in transformers, one output alone is a regression where the config says nothing else; a softmax over one class
    would be constant.
    """
    if outputs == 1 and problem_type != "multi_label_classification":
        return REGRESSION
    return PROBLEM_TYPES[problem_type or "single_label_classification"]


def head_for(task: str, config: Any, outputs: int) -> Head:
    """The head of a model for ``task`` that gives so many ``outputs``; ``config`` may be None."""
    if task in ("features", "image-text"):
        return FEATURES
    if task in ("masked-lm", "token-classification", "multiple-choice"):
        return SOFTMAX
    if task == "question-answering":
        return SPANS
    return classification_head(getattr(config, "problem_type", None), outputs)


def feature_rows(hidden: Tensor, mask: Tensor | None, *, first_token: bool = False) -> Tensor:
    """Hidden states (samples, tokens, width) as rows: the tokens times √(1/n), then their mean; padding counts nothing.

    The squared distance of two rows is the mean over the tokens of the squared distance of their states, plus the
    squared distance of the pooled states. ``first_token`` compares no other, where two models have different ones.
    """
    hidden = hidden.float() if hidden.dtype in (torch.float16, torch.bfloat16) else hidden
    real = torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask.to(hidden.device)
    weight = (real / real.sum(1, keepdim=True).clamp_min(1)).to(hidden.dtype)[..., None]
    tokens = hidden[:, 0] if first_token else (hidden * weight.sqrt()).flatten(1)
    return torch.cat([tokens, (hidden * weight).sum(1)], 1)


@torch.no_grad()
def measured(head: Head, dense: Tensor, other: Tensor) -> Tensor:
    """``divergence`` in float64, in pieces that fit into memory; (rows,), never below zero."""
    rows = max(1, _CHUNK // dense.shape[-1])
    pieces = zip(torch.split(dense, rows), torch.split(other, rows), strict=True)
    # equal distributions may come out at -1e-17
    return torch.cat([head.divergence(p.double(), q.double()).clamp_min(0) for p, q in pieces])


def signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """±1 at random, from a generator on the CPU so that every device draws the same."""
    return torch.randint(0, 2, like.shape, generator=generator).mul_(2).sub_(1).to(like)
