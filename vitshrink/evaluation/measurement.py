"""Opening the data of a job, and measuring a model on them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Required, TypedDict, Unpack

import torch
from torch import nn

from vitshrink.data import (
    BadSamples,
    Batch,
    Preprocessor,
    Sample,
    SampleSet,
    align_label_lists,
    align_labels,
)
from vitshrink.data.opening import Cut, warn_of_bad
from vitshrink.data.pairs import classes_of
from vitshrink.data.remote import RemoteImage
from vitshrink.data.samples import Answers
from vitshrink.data.tags import align_tags
from vitshrink.errors import CheckpointError, DataError
from vitshrink.evaluation import Evaluation, Masking, check_labels, evaluate_dual, evaluate_each, evaluate_pairs
from vitshrink.evaluation.quality import EvaluationRecord
from vitshrink.models.fidelity import BERNOULLI, REGRESSION, classification_head
from vitshrink.models.sentences import MEAN, Embedding
from vitshrink.runtime import processes
from vitshrink.runtime.observer import Job


@dataclass(frozen=True)
class Measurement:
    """An evaluation and how its data were read."""

    evaluation: Evaluation
    samples: SampleSet
    source: str
    fingerprint: str
    label_rule: str | None
    bad: BadSamples
    pooling: str | None = None
    """How one vector was made of a sample's tokens, where the models have no head."""
    similarity: str | None = None
    """How two of them were compared, where the samples are pairs."""

    def record(self, preprocessing: Mapping[str, Any] | None) -> EvaluationRecord:
        """The evaluation, and what its data were, as a report has it."""
        figures = {each.name: getattr(self.evaluation, each.name) for each in fields(self.evaluation)}
        return EvaluationRecord(
            **figures,
            source=self.source,
            fingerprint=self.fingerprint,
            label_rule=self.label_rule,
            pooling=self.pooling,
            similarity=self.similarity,
            bad_samples=dict(self.bad.reasons),
            preprocessing=preprocessing,
        )


class Options(TypedDict, total=False):
    """What ``measure`` and ``measure_each`` want to know besides models and data."""

    task: Required[str]
    baseline: Required[nn.Module | None]
    device: Required[torch.device]
    batch_size: Required[int]
    embedding: Embedding
    baseline_embedding: Embedding | None
    seed: int
    labeled: bool
    class_map: Path | None
    max_bad_samples: int | None
    workers: int | None


def measure(
    model: nn.Module, samples: SampleSet, preprocessor: Preprocessor, job: Job, **options: Unpack[Options]
) -> Measurement:
    """Measure one model: see ``measure_each``."""
    return measure_each([model], samples, preprocessor, job, **options)[0]


def measure_each(
    models: Sequence[nn.Module],
    samples: SampleSet,
    preprocessor: Preprocessor,
    job: Job,
    *,
    task: str,
    baseline: nn.Module | None,
    device: torch.device,
    batch_size: int,
    embedding: Embedding = MEAN,
    baseline_embedding: Embedding | None = None,
    seed: int = 0,
    labeled: bool = True,
    class_map: Path | None = None,
    max_bad_samples: int | None = None,
    workers: int | None = None,
) -> list[Measurement]:
    """Measure models, and their differences from ``baseline``, in one pass; labels are used where there are any.

    Where several processes work on the job each reads its share of the samples, and all of them return the same.

    Raises:
        UsageError: neither labels nor a baseline.
        DataError: labels that cannot be aligned, or look permuted; more unusable samples than allowed.
    """
    bad, cut = BadSamples.of(samples, max_bad_samples), Cut(samples.source)
    pairs = task == "features" and has_pairs(samples)
    if task == "features":
        require_embedding(embedding, samples)
        _remark(embedding, baseline_embedding or embedding, job)
    label_of, rule = labels_of(models[0], samples, task, class_map) if labeled else (None, None)
    mine = replace(samples, samples=processes.share(samples.samples))

    def read(part: SampleSet) -> Iterable[Batch]:
        if not len(part):  # more processes than samples
            return []
        windows = preprocessor.windows(part)
        return cut.counted(preprocessor.batches(windows, batch_size, bad=bad, workers=workers))

    with job.stage("evaluate", "Evaluating", len(samples) * (1 + pairs)) as advance:
        ticks = _scaled(advance, processes.count())
        if task == "image-text" and labeled and (samples.captioned or samples.prompts):
            evaluations = _dual(models, samples, read, baseline=baseline, device=device, seed=seed, on_batch=ticks)
        elif pairs:
            evaluations = evaluate_pairs(
                models,
                *(read(side(mine, first=first)) for first in (True, False)),
                queries=queries_of(samples),
                score_of=_number if labeled and samples.labels_are is not None else None,
                baseline=baseline,
                embedding=embedding,
                baseline_embedding=baseline_embedding,
                device=device,
                seed=seed,
                on_batch=ticks,
            )
        else:
            evaluations = evaluate_each(
                models,
                read(mine),
                task=task,
                label_of=label_of,
                baseline=baseline,
                embedding=embedding,
                baseline_embedding=baseline_embedding,
                queries=queries_of(samples),
                unanswerable=task == "question-answering" and has_unanswerable(samples),
                masking=Masking.from_tokenizer(preprocessor.processor, seed) if task == "masked-lm" else None,
                device=device,
                seed=seed,
                on_batch=ticks,
            )
    if processes.count() > 1:
        _gather(bad, cut, samples)
    warn_of_bad(bad, samples.source, job)
    cut.warn(preprocessor, job)
    if label_of is not None and _num_labels(models[0]) > 1:
        check_labels(evaluations[0], _num_labels(models[0]))
    return _recorded(evaluations, samples, rule, bad, embedding if task == "features" else None, pairs=pairs)


def _recorded(
    evaluations: Sequence[Evaluation],
    samples: SampleSet,
    rule: str | None,
    bad: BadSamples,
    embedding: Embedding | None,
    *,
    pairs: bool,
) -> list[Measurement]:
    """The evaluations with what their data were; ``embedding`` is how models without a head were read."""
    fingerprint = processes.from_main(samples.fingerprint() if processes.is_main() else None)
    pooling = None if embedding is None else embedding.pooling
    similarity = embedding.similarity if embedding is not None and pairs else None
    return [
        Measurement(evaluation, samples, samples.source, fingerprint, rule, bad, pooling, similarity)
        for evaluation in evaluations
    ]


def _dual(
    models: Sequence[nn.Module], samples: SampleSet, read: Callable[[SampleSet], Iterable[Batch]], **options: Any
) -> list[Evaluation]:
    """Of a dual encoder: by the classes of images, or by the pairs that they are with texts."""
    if samples.prompts:
        classes = classes_of(samples)
        known = [sample for sample in samples.samples if sample.key in classes]
        images = replace(samples, samples=processes.share(known))
        texts = replace(samples, samples=processes.share(samples.prompts))
        names = samples.label_names or []
        return evaluate_dual(models, read(images), read(texts), classes=classes, names=names, **options)
    image_of = {id_of(sample): sample.key for sample in reversed(samples.samples)}
    text_of = {sample.text: sample.key for sample in reversed(samples.samples)}
    pairs = [(image_of[id_of(sample)], text_of[sample.text]) for sample in samples.samples]
    first, second = ({pair[side] for pair in pairs} for side in (0, 1))
    sides = (
        [replace(sample, text=None) for sample in samples.samples if sample.key in first],
        [replace(sample, image=None) for sample in samples.samples if sample.key in second],
    )
    images, texts = (replace(samples, samples=processes.share(side)) for side in sides)
    return evaluate_dual(models, read(images), read(texts), pairs=pairs, **options)


def id_of(sample: Sample) -> object:
    """What two samples of the same image have in common."""
    return sample.image if isinstance(sample.image, Path | RemoteImage) else sample.key


def _gather(bad: BadSamples, cut: Cut, samples: SampleSet) -> None:
    """Put together what the processes met in their shares, in place. Raises DataError for too many bad samples."""
    shares = processes.gather((bad.reasons, cut.samples))
    reasons = {key: why for share in shares for key, why in share[0].items()}
    bad.reasons = {sample.key: reasons[sample.key] for sample in samples.samples if sample.key in reasons}
    cut.samples = sum(share[1] for share in shares)
    bad.check(samples)


def has_pairs(samples: SampleSet) -> bool:
    """Whether the samples are pairs of texts."""
    return any(sample.text_pair is not None for sample in samples.samples[:1])


def queries_of(samples: SampleSet) -> dict[str, int] | None:
    """The number of the query that each sample is a passage of, by key; None where the samples have none."""
    numbers: dict[str, int] = {}
    found = {
        sample.key: numbers.setdefault(sample.query, len(numbers))
        for sample in samples.samples
        if sample.query is not None
    }
    return found if len(found) == len(samples) else None


def has_unanswerable(samples: SampleSet) -> bool:
    """Whether some of the questions have no answer in their context."""
    return any(isinstance(sample.label, Answers) and not sample.label.texts for sample in samples.samples)


def _itself(label: Any) -> Any:
    return label


def require_embedding(embedding: Embedding, samples: SampleSet) -> None:
    """Raises CheckpointError, before any work, where sentences are to be compared and cannot be as the model does."""
    if embedding.problem and has_pairs(samples):
        raise CheckpointError(
            f"{embedding.problem}: vitshrink cannot compute the sentence similarity of this model. Measure it "
            "with sentence-transformers, or give single texts."
        )


def _remark(embedding: Embedding, baseline: Embedding, job: Job) -> None:
    """Say what a sentence's vectors are not made by."""
    for problem in {embedding.problem, baseline.problem} - {None}:
        job.warn(f"{problem}: pooled features were not compared.")
    for remark in embedding.remarks:
        job.warn(f"sentence embeddings: {remark}.")
    if (baseline.pooling, baseline.similarity) != (embedding.pooling, embedding.similarity):
        job.warn(
            "model and baseline compute sentence embeddings in different ways: the baseline uses "
            f"{baseline.pooling}; {baseline.similarity}, and the model uses {embedding.pooling}; "
            f"{embedding.similarity}."
        )


def _scaled(advance: Callable[[int], None], factor: int) -> Callable[[int], None]:
    """Progress of all processes, as far as one of them can tell."""
    return lambda steps: advance(factor * steps)


def _num_labels(model: nn.Module) -> int:
    return int(model.config.num_labels)  # type: ignore[union-attr, arg-type]


def labels_of(
    model: nn.Module, samples: SampleSet, task: str, class_map: Path | None
) -> tuple[Callable[[Any], Any] | None, str | None]:
    """From a sample's label to the model's class, or to a score, and the rule by which; None where nothing is labeled.

    Raises DataError for labels that cannot be aligned.
    """
    if samples.labels_are is None or task in ("masked-lm", "features", "image-text"):
        return None, rule_of(samples) if task == "image-text" else None
    config: Any = model.config
    if task == "token-classification":
        tags, rule = align_tags(samples, config.id2label, config.num_labels, class_map)
        return tags.__getitem__, rule
    if task == "multiple-choice":
        return _itself, "the index of the right choice, from 0"
    if task == "question-answering":
        return _itself, "answers that occur in the context"
    head = classification_head(config.problem_type, config.num_labels)
    if head is REGRESSION:
        return _score_of(samples, config.num_labels), "scores of a regression"
    align = align_label_lists if head is BERNOULLI else align_labels
    mapping, rule = align(samples, config.id2label, config.num_labels, class_map)
    return mapping.__getitem__, rule


def rule_of(samples: SampleSet) -> str | None:
    """How a dual encoder tells the classes of images."""
    return f"classes by texts such as {samples.prompts[0].text!r}" if samples.prompts else None


def _score_of(samples: SampleSet, scores: int) -> Callable[[Any], Any]:
    """From a label to a number, or to as many as the model gives. Raises DataError for labels that are neither."""
    if samples.labels_are == "names":
        raise DataError(
            f"{samples.source} has names as labels, but the model gives scores: name the column with the scores."
        )
    if scores == 1 and samples.labels_are in ("lists", "columns"):
        raise DataError(f"{samples.source} has several scores per sample, but the model gives one: name its column.")
    if scores > 1 and samples.labels_are in ("integers", "scores"):
        raise DataError(f"{samples.source} has one score per sample, but the model gives {scores}: list their columns.")
    return _number if scores == 1 else lambda label: tuple(map(_number, label))


def _number(label: Any) -> float:
    try:
        return float(label)
    except (TypeError, ValueError) as error:
        raise DataError(f"the label {label!r} is not a score: name the column with the scores.") from error


def side(samples: SampleSet, *, first: bool) -> SampleSet:
    """The first or the second sentences of the pairs."""
    sentences = [
        replace(sample, text=sample.text if first else sample.text_pair, text_pair=None) for sample in samples.samples
    ]
    return replace(samples, samples=sentences)
