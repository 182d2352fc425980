"""What the outputs of a model say of a batch, as the rows by which two models are compared.

A row holds the logits of a sample or of a token that counts, or the features of a sample. ``fidelity`` says how far two
rows are apart; what a row is, and of which sample, is said here, once for curvature, training and evaluation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.models.fidelity import OUTSIDE, feature_rows
from vitshrink.models.sentences import Embedding
from vitshrink.models.tasks import task_of


class Asked(Protocol):
    """A batch of samples: which of its tokens are real."""

    @property
    def mask(self) -> Tensor | None:
        """(batch, tokens), True for real tokens; None when all are."""


class Reading:
    """A row of logits a sample."""

    probes: ClassVar[int] = 1
    """Random directions of a row for which gradients are taken, where few samples have to tell much."""

    def rows(self, outputs: Any, batch: Asked) -> Tensor:  # noqa: ARG002
        """(rows, width), at least in float32."""
        return wide(outputs["logits"])

    def owners(self, outputs: Any, batch: Asked) -> Tensor | None:  # noqa: ARG002
        """The sample of each row, (rows,); None where each sample has one."""
        return None


class Tokens(Reading):
    """A row of logits for each token that counts: the first of every word, or all real ones where no word is known."""

    def rows(self, outputs: Any, batch: Asked) -> Tensor:
        logits: Tensor = outputs["logits"]
        return wide(logits[asked_tokens(batch, logits)])

    def owners(self, outputs: Any, batch: Asked) -> Tensor:
        return asked_tokens(batch, outputs["logits"]).nonzero()[:, 0]


class Ends(Reading):
    """The logits of the beginning and of the end of an answer, side by side: in the context, or at the first token."""

    def rows(self, outputs: Any, batch: Asked) -> Tensor:
        ends = [wide(outputs[name]) for name in ("start_logits", "end_logits")]
        asked = asked_tokens(batch, ends[0])
        return torch.cat([logits.masked_fill(~asked, OUTSIDE) for logits in ends], -1)


class Hidden(Reading):
    """The ``feature_rows`` of a headless model."""

    def rows(self, outputs: Any, batch: Asked) -> Tensor:
        return feature_rows(outputs["last_hidden_state"], batch.mask)


@dataclass(frozen=True, eq=False)
class Sentences(Reading):
    """The final vector of each sentence, as the modules after the transformer make it.

    One direction of one vector says little of a sentence. Measured: benchmarks/results/sentence-probes.md.
    """

    probes = 4
    embedding: Embedding

    def rows(self, outputs: Any, batch: Asked) -> Tensor:
        return self.embedding(wide(outputs["last_hidden_state"]), batch.mask)


class Towers(Reading):
    """The vector, of length 1, that a dual encoder makes of an image or of a text."""

    probes = Sentences.probes

    def rows(self, outputs: Any, batch: Asked) -> Tensor:  # noqa: ARG002
        return wide(outputs["embeds"])


_READINGS: Mapping[str, Reading] = {
    "features": Hidden(),
    "image-text": Towers(),
    "token-classification": Tokens(),
    "question-answering": Ends(),
}
_LOGITS = Reading()
_ATTRIBUTE = "_vitshrink_embedding"


def read_as(model: PreTrainedModel, embedding: Embedding) -> None:
    """Let a headless model be read as its checkpoint says, where it does, from now on and in all views and copies."""
    if embedding.known:
        setattr(model, _ATTRIBUTE, embedding)


def embedding_read(model: PreTrainedModel) -> Embedding | None:
    """How a model is read that makes sentence embeddings."""
    return getattr(model, _ATTRIBUTE, None)


def plainly_read(model: PreTrainedModel) -> None:
    """Undo ``read_as``: what is handed to a user holds nothing but the model."""
    model.__dict__.pop(_ATTRIBUTE, None)


def reading_of(model: PreTrainedModel) -> Reading:
    """How the outputs of a model are read."""
    embedding = embedding_read(model)
    if embedding is not None:
        return Sentences(embedding)
    return _READINGS.get(task_of(model), _LOGITS)


def asked_tokens(batch: Asked, like: Tensor) -> Tensor:
    """Which tokens a head answers for, bool (batch, tokens), on the device of its outputs (batch, tokens, …)."""
    places: Tensor | None = getattr(batch, "places", None)
    if places is not None:
        return (places[..., 0] >= 0).to(like.device)
    if batch.mask is not None:
        return batch.mask.bool().to(like.device)
    return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)


def wide(values: Tensor) -> Tensor:
    """In float32 where they are shorter."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
