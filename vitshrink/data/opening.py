"""Opening the data of a job: to calibrate on, to hold out, to evaluate on."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from vitshrink.config.options import DataConfig
from vitshrink.data import (
    BadSamples,
    Batch,
    NothingLeftError,
    Preprocessor,
    Sample,
    SampleSet,
    open_samples,
)
from vitshrink.data.layouts import LAYOUTS
from vitshrink.data.pairs import open_pairs, texts_flag
from vitshrink.data.samples import Drawable
from vitshrink.errors import UsageError
from vitshrink.models.fidelity import BERNOULLI, REGRESSION
from vitshrink.models.loading import LoadedModel
from vitshrink.models.tasks import head_of, task_of
from vitshrink.runtime.observer import Job


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
    data: DataConfig, model: LoadedModel, *, offline: bool, job: Job | None = None, labeled: bool = False
) -> SampleSet:
    """The samples that ``data`` names, of the kind that the model reads.

    ``job`` warns of what was left out and, where labels are wanted (``labeled``), of columns none of which holds them.
    """
    for flag, given in ((texts_flag(data), data.texts), ("--template", data.templates)):
        if given and model.task != "image-text":
            raise UsageError(
                f"{flag} works with CLIP and SigLIP only, not with {type(model.model).__name__}: remove it."
            )
    if model.task == "image-text":
        return _told(open_pairs(data, labeled=labeled, offline=offline), model, job, labeled=labeled)
    samples = open_samples(
        data.source,
        model.family.modality,
        split=data.split,
        image_column=data.image_column,
        text_column=data.text_column,
        text_pair_column=data.text_pair_column,
        label_column=data.label_column,
        model_labels=_own_labels(model),
        layout=task_of(model.model) if task_of(model.model) in LAYOUTS else None,
        labels=data.labels,
        flags=data.flags,
        offline=offline,
    )
    return _told(replace(samples, apart=model.embedding.known), model, job, labeled=labeled)


def _told(samples: SampleSet, model: LoadedModel, job: Job | None, *, labeled: bool) -> SampleSet:
    """The samples, once ``job`` has been told what there is to know of them."""
    if job is not None:
        for note in samples.notes:
            if note not in job.warnings:  # calibration and evaluation may share a source
                job.warn(note)
        if labeled and samples.unlabeled and uses_labels(model, samples):
            job.warn(f"{samples.source} is used without labels: {samples.unlabeled}")
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
    read_now = chosen.read_apart()
    bad, cut = BadSamples.of(read_now, max_bad_samples), Cut(source.source)
    with job.stage("preprocess", "Reading calibration data", len(read_now)) as advance:
        batches = []
        for batch in cut.counted(preprocessor.batches(read_now, batch_size, bad=bad, workers=workers)):
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
            f"{source.source}: all samples were used for calibration, so the fidelity was not measured. Pass "
            "--eval, or fewer --samples."
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
        job.warn(f"{source}: {len(bad.reasons)} unusable samples were skipped: {named}.")


def _own_labels(model: LoadedModel) -> list[str]:
    """What columns of labels may be called, where a sample has several of them."""
    config: Any = model.model.config
    several = head_of(model.model) in (BERNOULLI, REGRESSION) and config.num_labels > 1
    return list(config.id2label.values()) if several else []
