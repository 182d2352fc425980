"""Which samples train the model, and which judge it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from vitshrink.config.options import FinetuneConfig
from vitshrink.data import Preprocessor
from vitshrink.errors import DataError
from vitshrink.recovery.material import Material
from vitshrink.recovery.training_set import TrainingSet
from vitshrink.runtime.observer import Job

LEAST_HELD_OUT = 8
MOST_HELD_OUT = 512


@dataclass(frozen=True, eq=False)
class Split:
    """The samples of a training, by their indices in ``data``."""

    data: TrainingSet
    training: Sequence[int]
    held_out: Sequence[int]
    """They choose the best state."""
    familiar: bool
    """Whether the model was fitted to the held-out samples before."""


def held_out_count(usable: int, validation: float, source: str) -> int:
    """How many of so many samples judge what training gains. Raises DataError where they are too few."""
    if usable < 2 * LEAST_HELD_OUT:
        raise DataError(
            f"{source} has {usable} usable samples: recovery needs at least {2 * LEAST_HELD_OUT}, and "
            f"{LEAST_HELD_OUT} of them are held out. A few hundred unlabeled samples are enough."
        )
    return min(MOST_HELD_OUT, max(LEAST_HELD_OUT, round(validation * usable)))


def read_and_split(
    material: Material,
    preprocessor: Preprocessor,
    config: FinetuneConfig,
    job: Job,
    *,
    seed: int,
    max_bad_samples: int | None,
) -> Split:
    """Read the samples of ``material``, as many as memory holds, and divide them.

    Samples that the model was fitted to flatter it, and hide what training gains: others are held out where there are
    any, though they be half as many.

    Raises:
        DataError: too few samples, or too many unusable ones.
    """
    data = _read(material, preprocessor, config, job, max_bad_samples)
    usable = data.usable()
    count = held_out_count(len(usable), config.validation, data.samples.source)
    unseen = set(data.unseen(material.seen))
    familiar = len(unseen) < max(LEAST_HELD_OUT, count // 2)
    shuffled = list(usable)
    random.Random(seed).shuffle(shuffled)
    judging = [i for i in shuffled if familiar or i in unseen][:count]
    training = set(usable).difference(judging)
    return Split(data, [i for i in shuffled if i in training], judging, familiar)


def _read(
    material: Material, preprocessor: Preprocessor, config: FinetuneConfig, job: Job, max_bad_samples: int | None
) -> TrainingSet:
    labels = None
    if config.objective == "supervised" and material.label_of is not None:
        labels = [material.label_of(sample.label) for sample in material.samples.samples]
    data = TrainingSet(material.samples, preprocessor, labels=labels, max_bad_samples=max_bad_samples)
    data.take(material.read)
    if data.missing():
        with job.stage("training data", "Reading training data", len(data.missing())) as advance:
            data.fill(config.batch_size, advance)
    return data
