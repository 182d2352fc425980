"""One batch through the models: what is kept of it, a row of scalars a sample."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vitshrink.errors import DataError, NumericsError
from vitshrink.evaluation import metrics
from vitshrink.evaluation.masking import Masking
from vitshrink.models.fidelity import (
    BERNOULLI,
    FEATURES,
    REGRESSION,
    SOFTMAX,
    classification_head,
    feature_rows,
    measured,
)
from vitshrink.models.sentences import Embedding, masked_mean


class Batch(Protocol):
    """Encoded samples, as ``vitshrink.data`` yields them."""

    @property
    def inputs(self) -> dict[str, Tensor]: ...

    @property
    def mask(self) -> Tensor | None:
        """(batch, tokens), True for real tokens; None when all are."""

    @property
    def labels(self) -> list[Any]: ...

    @property
    def keys(self) -> list[str]: ...


Columns = dict[str, Tensor]
"""Named columns of one value a sample, each (samples,) unless said otherwise.

``dense.top1`` and the like belong to one model, ``kl`` and the like compare the two. ``units`` counts what a sample
contributes to a proportion: 1, or its hidden tokens. Predictions and targets of a regression are (samples, outputs),
``dense.chosen`` and ``truth`` of a multi-label classifier bool (samples, labels).
"""

Models = Mapping[str, nn.Module]
"""``dense`` and ``compressed``, or one of the two."""

LabelOf = Callable[[Any], Any]
"""From the label of a sample to a class index, or to a number for a regression."""


class Examination(Protocol):
    """One batch under examination: what each model says of it, and what follows from that."""

    def outputs(self, role: str, model: nn.Module) -> Tensor: ...

    def columns(self, outputs: Mapping[str, Tensor]) -> Columns: ...


Step = Callable[[Batch], Examination]


@dataclass(frozen=True)
class _Classification:
    batch: Batch
    label_of: LabelOf | None
    problem_type: str | None

    def outputs(self, role: str, model: nn.Module) -> Tensor:
        return finite(role, forward(model, self.batch.inputs).logits, self.batch.keys)

    def columns(self, outputs: Mapping[str, Tensor]) -> Columns:
        width, device = next((rows.shape[-1], rows.device) for rows in outputs.values())
        head = classification_head(self.problem_type, width)
        if head is REGRESSION:
            return self._numbers(outputs, width)
        columns = self._labels(outputs, width, device) if head is BERNOULLI else self._classes(outputs, width, device)
        return columns | {"units": torch.ones(len(self.batch.keys), dtype=torch.long)}

    def _numbers(self, outputs: Mapping[str, Tensor], width: int) -> Columns:
        columns = {f"{role}.prediction": rows for role, rows in outputs.items()}
        return columns | ({} if self.label_of is None else {"target": _scores(self.batch, self.label_of, width)})

    def _classes(self, outputs: Mapping[str, Tensor], width: int, device: torch.device) -> Columns:
        labels = None if self.label_of is None else _classes(self.batch, self.label_of, width).to(device)
        columns = {f"{role}.class": SOFTMAX.decisions(rows) for role, rows in outputs.items()}
        return columns | hits(outputs, labels) | ({} if labels is None else {"label": labels})

    def _labels(self, outputs: Mapping[str, Tensor], width: int, device: torch.device) -> Columns:
        chosen = {role: BERNOULLI.decisions(rows) for role, rows in outputs.items()}
        columns = {f"{role}.chosen": labels for role, labels in chosen.items()}
        if self.label_of is not None:
            columns["truth"] = _label_sets(self.batch, self.label_of, width).to(device)
        if len(chosen) == 2:
            same = chosen["dense"] == chosen["compressed"].to(device)
            columns |= {"agreement": same.all(-1), "label_agreement": same.double().mean(-1)}
            columns["kl"] = measured(BERNOULLI, outputs["dense"], outputs["compressed"].to(device))
        return columns


def classification_step(label_of: LabelOf | None, problem_type: str | None = None) -> Step:
    """For models with a head of logits; ``problem_type`` is that of transformers, None where the config has none."""
    return lambda batch: _Classification(batch, label_of, problem_type)


class _MaskedTokens:
    def __init__(self, batch: Batch, masking: Masking) -> None:
        tokens = batch.inputs["input_ids"]
        self.hidden = masking.positions(tokens, batch.mask, batch.keys)
        self.owner = self.hidden.nonzero()[:, 0]
        self.keys = batch.keys
        self.labels = tokens[self.hidden]
        self.inputs = {**batch.inputs, "input_ids": tokens.masked_fill(self.hidden, masking.mask_token)}

    def outputs(self, role: str, model: nn.Module) -> Tensor:
        keys = [self.keys[row] for row in self.owner.tolist()]
        return finite(role, _masked_logits(model, self.inputs, self.hidden), keys)

    def columns(self, outputs: Mapping[str, Tensor]) -> Columns:
        device = next(iter(outputs.values())).device
        sums = torch.zeros(len(self.keys), dtype=torch.float64, device=device)
        rows = hits(outputs, self.labels.to(device))
        columns = {name: sums.index_add(0, self.owner.to(device), values.double()) for name, values in rows.items()}
        return columns | {"units": self.hidden.sum(1)}


def masked_lm_step(masking: Masking) -> Step:
    """For masked language models: the hidden tokens are the labels."""
    return lambda batch: _MaskedTokens(batch, masking)


Embeddings = Mapping[str, Embedding]
"""By role, how each model makes one vector of the tokens of a sample."""


@dataclass(frozen=True)
class _Features:
    batch: Batch
    embeddings: Embeddings

    def outputs(self, role: str, model: nn.Module) -> Tensor:
        return finite(role, forward(model, self.batch.inputs).last_hidden_state.double(), self.batch.keys).cpu()

    def columns(self, outputs: Mapping[str, Tensor]) -> Columns:
        pooled = _pooled(outputs, self.batch.mask, self.embeddings)
        vectors = {f"{role}.pooled": each.float() for role, each in pooled.items()}
        return vectors | _cosines(outputs, pooled, self.batch.mask, final=self._final)

    @property
    def _final(self) -> bool:
        """Whether the vectors of samples are all that counts."""
        return all(embedding.known for embedding in self.embeddings.values())


def features_step(embeddings: Embeddings) -> Step:
    """For two headless models: how alike their last hidden states are, and the vectors made of these."""
    return lambda batch: _Features(batch, embeddings)


@dataclass(frozen=True)
class _Sentences(_Features):
    score_of: LabelOf | None

    def columns(self, outputs: Mapping[str, Tensor]) -> Columns:
        pooled = _pooled(outputs, self.batch.mask, self.embeddings)
        columns = {f"{role}.pooled": vectors for role, vectors in pooled.items()}
        if self.score_of is not None:
            columns["target"] = _scores(self.batch, self.score_of, 1)
        return columns | (_cosines(outputs, pooled, self.batch.mask, final=self._final) if len(outputs) == 2 else {})


def sentence_step(embeddings: Embeddings, score_of: LabelOf | None) -> Step:
    """For headless text models: one vector a sentence, columns ``dense.pooled`` (samples, width)."""
    return lambda batch: _Sentences(batch, embeddings, score_of)


def pair_columns(first: Columns, second: Columns, embeddings: Embeddings) -> Columns:
    """From the columns of the two sentences of each pair, in the same order: ``dense.prediction``, their similarity."""
    columns = {name: first[name] for name in ("target",) if name in first}
    for name in first.keys() & second.keys():
        if name.endswith(".pooled"):
            role = name.removesuffix(".pooled")
            columns[f"{role}.prediction"] = embeddings[role].compare(first[name], second[name]).unsqueeze(-1)
        elif name != "target":
            columns[name] = (first[name] + second[name]) / 2
    return columns


def forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """The outputs of a model for inputs on any device."""
    parameter = next(model.parameters())
    return model(
        **{
            name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
    )


def _masked_logits(model: nn.Module, inputs: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """Logits (hidden tokens, vocabulary). The head works token by token, so it is given the hidden ones alone."""

    def select(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        states = output.last_hidden_state
        output.last_hidden_state = states[hidden.to(states.device)].unsqueeze(0)
        return output

    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module):  # an exported model: whole, or not at all
        whole: Tensor = forward(model, inputs).logits
        return whole[hidden.to(whole.device)]
    handle = base.register_forward_hook(select)
    try:
        logits: Tensor = forward(model, inputs).logits.squeeze(0)
    finally:
        handle.remove()
    return logits


def finite(role: str, values: Tensor, keys: list[str]) -> Tensor:
    """The values unchanged, a row a key. Raises NumericsError naming the first sample with a NaN or an infinity."""
    bad = ~values.flatten(1).isfinite().all(1)
    if bad.any():
        raise NumericsError(
            f"the {role} model gives NaN or infinite outputs for {keys[int(bad.nonzero()[0])]} "
            f"({int(bad.sum())} of {len(bad)} in its batch). Evaluate in float32, or check the checkpoint's weights."
        )
    return values


def hits(logits: Mapping[str, Tensor], labels: Tensor | None) -> Columns:
    """From logits (rows, classes): right or wrong for each model and, where there are two, how far apart they are."""
    columns: Columns = {}
    wide = next(iter(logits.values())).shape[-1] > 5
    for role, rows in logits.items():
        if labels is not None:
            columns[f"{role}.top1"] = SOFTMAX.decisions(rows) == labels
            if wide:
                columns[f"{role}.top5"] = metrics.top_k_hits(rows, labels, 5)
    if len(logits) == 2:
        dense, compressed = logits["dense"], logits["compressed"].to(logits["dense"].device)
        columns["agreement"] = SOFTMAX.decisions(dense) == SOFTMAX.decisions(compressed)
        columns["kl"] = measured(SOFTMAX, dense, compressed)
        if wide:
            columns["top5_overlap"] = metrics.top_k_overlap(dense, compressed, 5)
    return columns


def _pooled(features: Mapping[str, Tensor], mask: Tensor | None, embeddings: Embeddings) -> dict[str, Tensor]:
    """One vector a sample by role; none where a model makes it in a way that cannot be computed."""
    if any(embeddings[role].problem for role in features):
        return {}
    return {role: embeddings[role](tokens, mask) for role, tokens in features.items()}


def _cosines(
    features: Mapping[str, Tensor], pooled: Mapping[str, Tensor], mask: Tensor | None, *, final: bool
) -> Columns:
    """How far two models' features (batch, tokens, width) are apart, and cosines: of real tokens, and of the vectors.

    ``pooled`` are vectors made of the features, which are all that counts where they are ``final``.
    """
    dense, compressed = features["dense"], features["compressed"]
    others = dense.shape[1] != compressed.shape[1]
    if final and pooled["dense"].shape == pooled["compressed"].shape:
        rows, other_rows = pooled["dense"], pooled["compressed"]
    else:
        rows, other_rows = (feature_rows(each, mask, first_token=others) for each in (dense, compressed))
    if others:  # other patches: only the first token stands for the same thing
        dense, compressed = dense[:, :1], compressed[:, :1]
    tokens = torch.cosine_similarity(dense, compressed, dim=-1)
    columns = {
        "feature_cosine": masked_mean(tokens.unsqueeze(-1), mask).squeeze(-1),
        "divergence": FEATURES.divergence(rows, other_rows),
        "spread": FEATURES.spread(rows),
    }
    if pooled and pooled["dense"].shape == pooled["compressed"].shape:
        columns["pooled_cosine"] = torch.cosine_similarity(pooled["dense"], pooled["compressed"], dim=-1)
    return columns


def _classes(batch: Batch, label_of: LabelOf, num_labels: int) -> Tensor:
    classes = mapped(batch, label_of)
    for key, label, index in zip(batch.keys, batch.labels, classes, strict=True):
        if type(index) is not int or not 0 <= index < num_labels:
            raise DataError(
                f"{key}: its label {label!r} means class {index!r}, but the model has the classes 0 to "
                f"{num_labels - 1}."
            )
    return torch.tensor(classes, dtype=torch.long)


def _label_sets(batch: Batch, labels_of: LabelOf, num_labels: int) -> Tensor:
    """Which labels apply, bool (samples, labels)."""
    sets = mapped(batch, labels_of)
    for key, label, found in zip(batch.keys, batch.labels, sets, strict=True):
        if not isinstance(found, tuple) or len(found) != num_labels or not set(found) <= {0, 1}:
            raise DataError(f"{key}: its label {label!r} does not say which of the model's {num_labels} labels apply.")
    return torch.tensor(sets, dtype=torch.bool).reshape(-1, num_labels)


def _scores(batch: Batch, score_of: LabelOf, width: int) -> Tensor:
    """Float64 (samples, width)."""
    found = mapped(batch, score_of)
    for key, score in zip(batch.keys, found, strict=True):
        if (len(score) if isinstance(score, tuple) else 1) != width:
            raise DataError(f"{key}: its label {score!r} is not a list of {width} numbers, which this model needs.")
    scores = torch.tensor(found, dtype=torch.float64).reshape(-1, width)
    if not (finite := scores.isfinite().all(1)).all():
        raise DataError(f"{batch.keys[int((~finite).nonzero()[0])]}: its score is not a finite number.")
    return scores


def mapped(batch: Batch, of: LabelOf) -> list[Any]:
    """What the labels of a batch stand for. Raises DataError, which names the sample."""
    mapped = []
    for key, label in zip(batch.keys, batch.labels, strict=True):
        try:
            mapped.append(of(label))
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"{key}: its label {label!r} cannot be used: correct or remove the sample.") from error
    return mapped
