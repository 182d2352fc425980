"""Run models over batches and collect the figures.

Memory stays bounded: a batch leaves one row of scalars a sample (for sentence pairs, one vector a sentence).
Where several processes work on the job each passes its own share of the samples, and every one of them returns the
figures of the whole.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Required, TypedDict, Unpack

import torch
from torch import Tensor, nn

from vitshrink.errors import DataError, UsageError, VitshrinkError
from vitshrink.evaluation import duals
from vitshrink.evaluation.answer_rows import answer_step, whole_contexts
from vitshrink.evaluation.duals import vectors_step
from vitshrink.evaluation.masking import Masking
from vitshrink.evaluation.quality import Accuracy, Evaluation
from vitshrink.evaluation.rows import (
    Batch,
    Columns,
    LabelOf,
    Models,
    Step,
    classification_step,
    features_step,
    masked_lm_step,
    pair_columns,
    sentence_step,
)
from vitshrink.evaluation.scores import summarize
from vitshrink.evaluation.token_rows import token_step
from vitshrink.models import cost
from vitshrink.models.sentences import MEAN, Embedding
from vitshrink.models.structures import structure_of
from vitshrink.runtime import processes
from vitshrink.runtime.modes import evaluating

OTHER_CLASSES = ("masked-lm", "token-classification", "multiple-choice")
"""Tasks whose classes are not those that labels of samples name."""

OnBatch = Callable[[int], None]
"""Told how many samples were done since its last call."""


class Options(TypedDict, total=False):
    """What ``evaluate`` and ``evaluate_each`` want to know besides models and batches."""

    task: Required[str]
    label_of: LabelOf | None
    baseline: nn.Module | None
    embedding: Embedding
    baseline_embedding: Embedding | None
    masking: Masking | None
    unanswerable: bool
    queries: Mapping[str, int] | None
    device: torch.device | str | None
    seed: int
    on_batch: OnBatch | None


def evaluate(model: nn.Module, batches: Iterable[Batch], **options: Unpack[Options]) -> Evaluation:
    """Measure one model: see ``evaluate_each``."""
    return evaluate_each([model], batches, **options)[0]


def evaluate_each(
    models: Sequence[nn.Module],
    batches: Iterable[Batch],
    *,
    task: str,
    label_of: LabelOf | None = None,
    baseline: nn.Module | None = None,
    embedding: Embedding = MEAN,
    baseline_embedding: Embedding | None = None,
    masking: Masking | None = None,
    unanswerable: bool = False,
    queries: Mapping[str, int] | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    on_batch: OnBatch | None = None,
) -> list[Evaluation]:
    """Measure models, and their differences from the dense ``baseline``, which runs once for all of them.

    ``task`` is one that ``task_of`` gives a model. ``label_of`` turns the label of a sample into a class index, into
    one for each of its words (a tuple) for a token classifier, into 0 and 1 for each label of a multi-label head (a
    tuple), or into a number (a tuple where there are several outputs) for a regression; without it only the fidelity to
    the baseline is measured. The task ``masked-lm`` needs ``masking`` and no labels. ``embedding`` is how headless
    models make one vector of a sample, and ``baseline_embedding`` how the baseline does, if otherwise. ``unanswerable``
    says that some questions have no answer, so that a model may give none. ``queries`` are those that the samples are
    passages of, by number and key: a regression is then scored by how it ranks them. ``seed`` drives the resampling of
    the intervals. The models are moved to ``device``, run in evaluation mode, and get the modes of their modules back.

    Raises:
        UsageError: there is nothing to measure: neither labels nor a baseline.
        DataError: no sample at all, or a label that the model does not know.
        NumericsError: outputs that are not finite.
        VitshrinkError: one sample alone does not fit into the device's memory.
    """
    if task in ("image-classification", "text-classification"):
        _require(label_of is not None or baseline is not None, "the data have no labels")
        step = classification_step(label_of, _problem_type(models[0]))
    elif task == "token-classification":
        _require(label_of is not None or baseline is not None, "the data have no tags")
        step = token_step(label_of, _class_names(models[0], task))
    elif task == "multiple-choice":
        _require(label_of is not None or baseline is not None, "the data have no labels")
        step = classification_step(label_of, "single_label_classification")
    elif task == "question-answering":
        _require(label_of is not None or baseline is not None, "the data have no answers")
        step = answer_step(label_of)
    elif task == "masked-lm":
        if masking is None:
            raise ValueError("the task 'masked-lm' needs masking=Masking.from_tokenizer(tokenizer)")
        step = masked_lm_step(masking)
    elif task == "features":
        _require(baseline is not None, "the model has no head")
        step = features_step(_embeddings(embedding, baseline_embedding))
    elif task == "image-text":
        _require(baseline is not None, "the samples have neither captions nor classes")
        step = vectors_step()
    else:
        raise ValueError(f"unknown task {task!r}")
    with _inference([*models, *([] if baseline is None else [baseline])], device):
        keys, columns = _rows(step, [_by_role(model, baseline) for model in models], batches, on_batch)
    if task == "question-answering":
        whole = [whole_contexts(keys, each, unanswerable=unanswerable) for each in columns]
        keys, columns = whole[0][0], [each for _, each in whole]
    return [
        summarize(task, keys, each | _queries(queries, keys), _class_names(model, task), seed)
        for model, each in zip(models, columns, strict=True)
    ]


def evaluate_pairs(
    models: Sequence[nn.Module],
    first: Iterable[Batch],
    second: Iterable[Batch],
    *,
    score_of: LabelOf | None = float,
    queries: Mapping[str, int] | None = None,
    baseline: nn.Module | None = None,
    embedding: Embedding = MEAN,
    baseline_embedding: Embedding | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    on_batch: OnBatch | None = None,
) -> list[Evaluation]:
    """Sentence similarity of headless text models: their embeddings compared, Spearman with the scores.

    ``first`` and ``second`` hold the two sentences of the pairs, in any order, under the same keys; a pair of which
    one sentence was unusable is left out. The score is the label of the first. Without ``score_of`` only the
    fidelity to the baseline is measured. ``on_batch`` counts sentences. Otherwise as ``evaluate_each``.
    """
    _require(score_of is not None or baseline is not None, "the pairs have no scores")
    comparisons = [_by_role(model, baseline) for model in models]
    embeddings = _embeddings(embedding, baseline_embedding)
    with _inference([*models, *([] if baseline is None else [baseline])], device):
        first_keys, first_columns = _rows(sentence_step(embeddings, score_of), comparisons, first, on_batch)
        second_keys, second_columns = _rows(sentence_step(embeddings, None), comparisons, second, on_batch)
    keys = sorted(set(first_keys) & set(second_keys))
    if not keys:
        raise DataError("no sentence has a partner: the two sides of the pairs share no key.")
    return [
        summarize(
            "similarity",
            keys,
            pair_columns(_select(one, first_keys, keys), _select(other, second_keys, keys), embeddings)
            | _queries(queries, keys),
            {},
            seed,
        )
        for one, other in zip(first_columns, second_columns, strict=True)
    ]


def evaluate_dual(
    models: Sequence[nn.Module],
    images: Iterable[Batch],
    texts: Iterable[Batch],
    *,
    pairs: Sequence[tuple[str, str]] = (),
    classes: Mapping[str, int] | None = None,
    names: Sequence[str] = (),
    baseline: nn.Module | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    on_batch: OnBatch | None = None,
) -> list[Evaluation]:
    """Dual encoders, by how often the nearest of some texts is the right one for an image.

    Either ``pairs`` of the keys of an image and a text belong together, or ``classes`` says which class an image, by
    its key, is of; then the keys of texts begin with the class that they stand for and a bar, and ``names`` are those
    of the classes. A pair of which one side was unusable is left out. Otherwise as ``evaluate_each``.
    """
    comparisons = [_by_role(model, baseline) for model in models]
    with _inference([*models, *([] if baseline is None else [baseline])], device):
        text_keys, text_columns = _rows(vectors_step(), comparisons, texts, on_batch)
        keys, image_columns = _rows(vectors_step(), comparisons, images, on_batch)
    scale = float(models[0].logit_scale.detach().exp())  # type: ignore[operator]
    found = []
    for left, right in zip(image_columns, text_columns, strict=True):
        if classes is not None:
            labels = torch.tensor([classes[key] for key in keys])
            told = torch.tensor([int(key.partition("|")[0]) for key in text_keys])
            columns = duals.of_classes(left, right, told, labels, scale)
            found.append(summarize("image-text", keys, columns, dict(enumerate(names)), seed))
            continue
        rows, others = ({key: row for row, key in enumerate(each)} for each in (keys, text_keys))
        kept = [(one, other) for one, other in pairs if one in rows and other in others]
        if not kept:
            raise DataError("no pair of an image and a text is left: in each pair, one side cannot be used.")
        columns = duals.of_pairs(left, right, [(rows[one], others[other]) for one, other in kept])
        found.append(summarize("image-text", [one for one, _ in kept], columns, {}, seed))
    return found


def check_labels(evaluation: Evaluation, num_labels: int) -> None:
    """Stop where the dense model does no better than chance: the labels are then not the model's.

    "No better" is below three times chance and less than ten points above it, with enough samples to tell it from
    ten points more. Raises DataError.
    """
    scores = evaluation.dense
    if not isinstance(scores, Accuracy) or evaluation.task in OTHER_CLASSES:
        return
    chance = 1 / num_labels
    limit = min(3 * chance, chance + 0.1)
    if scores.top1 < limit and scores.interval.high < limit + 0.1:
        raise DataError(
            f"labels look permuted: the dense model has {scores.correct} of {evaluation.samples} samples right "
            f"({scores.top1:.1%}), and guessing among {num_labels} classes gives {chance:.1%}. Check which class "
            "each label or folder means, or pass --class-map FILE."
        )


def _by_role(model: nn.Module, baseline: nn.Module | None) -> dict[str, nn.Module]:
    if baseline is not None:
        return {"dense": baseline, "compressed": model}
    compressed = any(structure_of(module) is not None for module in model.modules())
    return {"compressed" if compressed else "dense": model}


def _embeddings(model: Embedding, baseline: Embedding | None) -> dict[str, Embedding]:
    return {"dense": baseline or model, "compressed": model}


def _require(measurable: bool, why: str) -> None:
    if not measurable:
        raise UsageError(
            f"nothing to measure: {why} and there is no model to compare with. Pass the dense model as "
            "--baseline, or use labeled data."
        )


@contextmanager
def _inference(models: Sequence[nn.Module], device: torch.device | str | None) -> Iterator[None]:
    with evaluating(*models):
        for model in models if device is not None else ():
            model.to(device)
        with torch.inference_mode():
            yield


def _problem_type(model: nn.Module) -> str | None:
    """What its config says of a classification head; an exported model has one too, a bare module may not."""
    return getattr(getattr(model, "config", None), "problem_type", None)


def _class_names(model: nn.Module, task: str) -> dict[int, str]:
    if task == "multiple-choice":
        return {}  # the places of choices have no names
    names: Mapping[Any, Any] = getattr(getattr(model, "config", None), "id2label", None) or {}
    return {int(index): str(name) for index, name in names.items()}


def _queries(queries: Mapping[str, int] | None, keys: Sequence[str]) -> Columns:
    return {} if queries is None else {"query": torch.tensor([queries[key] for key in keys])}


def _select(columns: Columns, keys: list[str], wanted: list[str]) -> Columns:
    row = {key: i for i, key in enumerate(keys)}
    rows = torch.tensor([row[key] for key in wanted])
    return {name: values[rows] for name, values in columns.items()}


def _rows(
    step: Step, comparisons: Sequence[Models], batches: Iterable[Batch], on_batch: OnBatch | None
) -> tuple[list[str], list[Columns]]:
    """The keys of all samples, sorted, and for each comparison their columns."""
    keys: list[str] = []
    pieces: list[list[Columns]] = []
    limit: int | None = None
    for whole in batches:
        waiting = _parts(whole, limit)
        while waiting:
            batch = waiting.pop(0)
            piece = _run(step, comparisons, batch)
            if piece is None:
                limit = len(batch.keys) // 2
                waiting = [part for left in (batch, *waiting) for part in _parts(left, limit)]
                continue
            keys += batch.keys
            pieces.append(piece)
            if on_batch is not None:
                on_batch(len(batch.keys))
    shares = processes.gather((keys, pieces))
    keys = [key for share in shares for key in share[0]]
    pieces = [piece for share in shares for piece in share[1]]
    if not keys:
        raise DataError("there is no sample to evaluate on: the data set is empty, or no sample is readable.")
    # sorted, so that sums and resamples depend neither on the number of processes nor on the order of the batches
    order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))
    return [keys[i] for i in order.tolist()], [
        {name: torch.cat([columns[name] for columns in each])[order] for name in each[0]}
        for each in zip(*pieces, strict=True)
    ]


def _run(step: Step, comparisons: Sequence[Models], batch: Batch) -> list[Columns] | None:
    """The columns of the batch on the CPU, a set a comparison, or None when it does not fit into memory."""
    try:
        examination = step(batch)
        dense: Tensor | None = None
        found = []
        for models in comparisons:
            outputs = {}
            for role, model in models.items():
                if role == "dense" and dense is not None:
                    outputs[role] = dense  # one model for all comparisons: what it said of this batch is known
                    continue
                outputs[role] = examination.outputs(role, model)
                dense = outputs[role] if role == "dense" else dense
            found.append({name: values.cpu() for name, values in examination.columns(outputs).items()})
        return found
    except (MemoryError, RuntimeError) as error:
        if not cost.is_out_of_memory(error):
            raise
        if len(batch.keys) == 1:
            raise VitshrinkError(
                f"out of memory with a batch of one sample, {batch.keys[0]}. Free memory on the device, or use "
                "--device cpu or a smaller --dtype."
            ) from error
    # only here, where the exception no longer holds the tensors of the failed batch
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


@dataclass(frozen=True, eq=False)
class _Part:
    inputs: dict[str, Tensor]
    mask: Tensor | None
    labels: list[Any]
    keys: list[str]
    places: Tensor | None


def _parts(batch: Batch, size: int | None) -> list[Batch]:
    if size is None or len(batch.keys) <= size:
        return [batch]
    return [
        _Part(
            inputs={name: value[start : start + size] for name, value in batch.inputs.items()},
            mask=None if batch.mask is None else batch.mask[start : start + size],
            labels=batch.labels[start : start + size],
            keys=batch.keys[start : start + size],
            places=None if (places := getattr(batch, "places", None)) is None else places[start : start + size],
        )
        for start in range(0, len(batch.keys), size)
    ]
