"""Opening the data of a job, and measuring a model on them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Required, TypedDict, Unpack

import torch
from torch import nn

from vitshrink import processes
from vitshrink.config import DataConfig
from vitshrink.data import (
    BadSamples,
    Batch,
    NothingLeftError,
    Preprocessor,
    Sample,
    SampleSet,
    align_label_lists,
    align_labels,
    open_samples,
)
from vitshrink.data.samples import Drawable
from vitshrink.errors import CheckpointError, DataError
from vitshrink.evaluation import Evaluation, Masking, check_labels, evaluate_each, evaluate_pairs
from vitshrink.fidelity import BERNOULLI, REGRESSION, classification_head
from vitshrink.models import LoadedModel, head_of, task_of
from vitshrink.observer import Job
from vitshrink.sentences import MEAN, Embedding


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """Samples to calibrate on, preprocessed."""

    samples: SampleSet
    batches: list[Batch]
    unread: Sequence[Sample] = ()
    """Chosen with them, and kept from the compression: for a later training to be judged by."""

    @cached_property
    def chosen(self) -> SampleSet:
        """All that were chosen, read or not; one object, so that their contents are hashed once."""
        return replace(self.samples, samples=[*self.samples.samples, *self.unread]) if self.unread else self.samples

    @property
    def tokens(self) -> int | None:
        """Unmasked tokens of texts; None for images, where the model decides how many there are."""
        masks = [batch.mask for batch in self.batches]
        return (
            None if any(mask is None for mask in masks) else sum(int(mask.sum()) for mask in masks if mask is not None)
        )


def open_data(
    data: DataConfig, model: LoadedModel, *, offline: bool, job: Job | None = None, labelled: bool = False
) -> SampleSet:
    """The samples that ``data`` names, of the kind that the model reads.

    ``job`` warns of what was left out and, where labels are wanted (``labelled``), of columns none of which holds them.
    """
    samples = open_samples(
        data.source,
        model.family.modality,
        split=data.split,
        image_column=data.image_column,
        text_column=data.text_column,
        text_pair_column=data.text_pair_column,
        label_column=data.label_column,
        model_labels=_own_labels(model),
        labels=data.labels,
        flags=data.flags,
        offline=offline,
    )
    if job is not None:
        for note in samples.notes:
            if note not in job.warnings:  # calibration and evaluation may share a source
                job.warn(note)
        if labelled and samples.unlabelled and uses_labels(model, samples):
            job.warn(f"{samples.source} is used without labels: {samples.unlabelled}")
    return samples


def uses_labels(model: LoadedModel, samples: SampleSet) -> bool:
    """Whether the model is measured by the labels of samples such as these."""
    task = task_of(model.model)
    if task == "features":  # scores of pairs; a stream is not read to see whether it has any
        return not isinstance(samples.samples, Drawable) and samples.samples[0].text_pair is not None
    return task != "masked-lm"


def read_calibration(
    source: SampleSet,
    preprocessor: Preprocessor,
    job: Job,
    *,
    samples: int,
    seed: int,
    batch_size: int,
    max_bad_samples: int | None = None,
    workers: int | None = None,
    unread: Callable[[int], int] = lambda _chosen: 0,
) -> CalibrationData:
    """Select ``samples`` by seed and preprocess them, all but ``unread`` of so many. Warns where there are fewer."""
    selected = source.select(samples, seed)
    if len(selected) < samples:
        job.warn(f"{source.source} has {len(selected)} samples; --samples asked for {samples}.")
    read = len(selected) - unread(len(selected))
    chosen = replace(selected, samples=selected.samples[:read]) if read < len(selected) else selected
    bad, cut = BadSamples.of(chosen, max_bad_samples), Cut(source.source)
    with job.stage("preprocess", "Reading calibration data", len(chosen)) as advance:
        batches = []
        for batch in cut.counted(preprocessor.batches(chosen, batch_size, bad=bad, workers=workers)):
            batches.append(batch)
            advance(len(batch.keys))
    warn_of_bad(bad, source.source, job)
    cut.warn(preprocessor, job)
    return CalibrationData(chosen, batches, selected.samples[read:])


def hold_out(
    source: SampleSet, job: Job, *, samples: int, calibrated: bool, holdout: int, seed: int
) -> SampleSet | None:
    """``holdout`` samples after the ``samples`` first that this seed selects, which are for calibration.

    A method that is not calibrated leaves those out too where there are others, so that all are held to the same ones.
    Warns, and gives None, when none is left.
    """
    if not holdout:
        return None
    try:
        return source.select(holdout, seed, skip=samples)
    except NothingLeftError:  # asked this way a stream need not be read to its end
        if not calibrated:
            return source.select(holdout, seed)
        job.warn(
            f"{source.source}: all samples were calibrated on, so the fidelity was not measured. "
            "Pass --eval, or fewer --samples."
        )
        return None


@dataclass
class Cut:
    """Counts the texts that were cut to the maximum length."""

    source: str
    samples: int = 0

    def counted(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.samples += batch.truncated
            yield batch

    def warn(self, preprocessor: Preprocessor, job: Job) -> None:
        if self.samples:
            length = preprocessor.description["max_length"]
            job.warn(f"{self.source}: {self.samples} texts were cut to {length} tokens.")


def warn_of_bad(bad: BadSamples, source: str, job: Job) -> None:
    """Name the samples that were left out."""
    if bad.reasons:
        named = "; ".join(f"{key} {reason}" for key, reason in list(bad.reasons.items())[:5])
        job.warn(f"{source}: {len(bad.reasons)} unusable samples were left out: {named}.")


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

    def to_dict(self, preprocessing: Mapping[str, Any] | None) -> dict[str, Any]:
        """The evaluation, and what its data were, as a report has it."""
        return self.evaluation.to_dict() | {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "label_rule": self.label_rule,
            "pooling": self.pooling,
            "similarity": self.similarity,
            "bad_samples": dict(self.bad.reasons),
            "preprocessing": preprocessing,
        }


class Options(TypedDict, total=False):
    """What ``measure`` and ``measure_each`` want to know besides models and data."""

    task: Required[str]
    baseline: Required[nn.Module | None]
    device: Required[torch.device]
    batch_size: Required[int]
    embedding: Embedding
    baseline_embedding: Embedding | None
    seed: int
    labelled: bool
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
    labelled: bool = True,
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
    label_of, rule = labels_of(models[0], samples, task, class_map) if labelled else (None, None)
    mine = replace(samples, samples=processes.share(samples.samples))
    total = len(samples) * (2 if pairs else 1)

    def read(part: SampleSet) -> Iterable[Batch]:
        if not len(part):  # more processes than samples
            return []
        return cut.counted(preprocessor.batches(part, batch_size, bad=bad, workers=workers))

    with job.stage("evaluate", "Evaluating", total) as advance:
        ticks = _scaled(advance, processes.count())
        if pairs:
            evaluations = evaluate_pairs(
                models,
                *(read(_side(mine, first=first)) for first in (True, False)),
                score_of=_number if labelled and samples.labels_are is not None else None,
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
                masking=Masking.from_tokenizer(preprocessor.processor, seed) if task == "masked-lm" else None,
                device=device,
                seed=seed,
                on_batch=ticks,
            )
    if processes.count() > 1:
        shares = processes.gather((bad.reasons, cut.samples))
        reasons = {key: why for share in shares for key, why in share[0].items()}
        bad.reasons = {sample.key: reasons[sample.key] for sample in samples.samples if sample.key in reasons}
        cut.samples = sum(share[1] for share in shares)
        bad.check(samples)
    warn_of_bad(bad, samples.source, job)
    cut.warn(preprocessor, job)
    if label_of is not None and _num_labels(models[0]) > 1:
        check_labels(evaluations[0], _num_labels(models[0]))
    fingerprint = processes.from_main(samples.fingerprint() if processes.is_main() else None)
    pooling = embedding.pooling if task == "features" else None
    similarity = embedding.similarity if pairs else None
    return [
        Measurement(evaluation, samples, samples.source, fingerprint, rule, bad, pooling, similarity)
        for evaluation in evaluations
    ]


def has_pairs(samples: SampleSet) -> bool:
    """Whether the samples are pairs of texts."""
    return any(sample.text_pair is not None for sample in samples.samples[:1])


def require_embedding(embedding: Embedding, samples: SampleSet) -> None:
    """Raises CheckpointError, before any work, where sentences are to be compared and cannot be as the model does."""
    if embedding.problem and has_pairs(samples):
        raise CheckpointError(
            f"{embedding.problem}: the similarity of sentences cannot be measured as this model makes it. Measure it "
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
            f"the baseline makes sentence embeddings by other means than the model: {baseline.pooling}; "
            f"{baseline.similarity}, not {embedding.pooling}; {embedding.similarity}."
        )


def _scaled(advance: Callable[[int], None], factor: int) -> Callable[[int], None]:
    """Progress of all processes, as far as one of them can tell."""
    return lambda steps: advance(factor * steps)


def _num_labels(model: nn.Module) -> int:
    return int(model.config.num_labels)  # type: ignore[union-attr, arg-type]


def labels_of(
    model: nn.Module, samples: SampleSet, task: str, class_map: Path | None
) -> tuple[Callable[[Any], Any] | None, str | None]:
    """From a sample's label to the model's class, or to a score, and the rule by which; None where nothing is labelled.

    Raises DataError for labels that cannot be aligned.
    """
    if samples.labels_are is None or task in ("masked-lm", "features"):
        return None, None
    config: Any = model.config
    head = classification_head(config.problem_type, config.num_labels)
    if head is REGRESSION:
        return _score_of(samples, config.num_labels), "scores of a regression"
    align = align_label_lists if head is BERNOULLI else align_labels
    mapping, rule = align(samples, config.id2label, config.num_labels, class_map)
    return mapping.__getitem__, rule


def _own_labels(model: LoadedModel) -> list[str]:
    """What columns of labels may be called, where a sample has several of them."""
    config: Any = model.model.config
    several = head_of(model.model) in (BERNOULLI, REGRESSION) and config.num_labels > 1
    return list(config.id2label.values()) if several else []


def _score_of(samples: SampleSet, scores: int) -> Callable[[Any], Any]:
    """From a label to a number, or to as many as the model gives. Raises DataError for labels that are neither."""
    if samples.labels_are == "names":
        raise DataError(
            f"{samples.source} has names as labels, and the model gives scores: name the column of the scores."
        )
    if scores == 1 and samples.labels_are in ("lists", "columns"):
        raise DataError(f"{samples.source} has several scores a sample, and the model gives one: name its column.")
    if scores > 1 and samples.labels_are in ("integers", "scores"):
        raise DataError(f"{samples.source} has one score a sample, and the model gives {scores}: list their columns.")
    return _number if scores == 1 else lambda label: tuple(map(_number, label))


def _number(label: Any) -> float:
    try:
        return float(label)
    except (TypeError, ValueError) as error:
        raise DataError(f"the label {label!r} is not a score: name the column of the scores.") from error


def _side(samples: SampleSet, *, first: bool) -> SampleSet:
    """The first or the second sentences of the pairs."""
    sentences = [
        replace(sample, text=sample.text if first else sample.text_pair, text_pair=None) for sample in samples.samples
    ]
    return replace(samples, samples=sentences)
