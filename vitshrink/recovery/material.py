"""What a compressed model is trained on."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitshrink.config.options import DataConfig, FinetuneConfig
from vitshrink.data import Batch, SampleSet
from vitshrink.data.opening import CalibrationData, open_data
from vitshrink.errors import UsageError
from vitshrink.evaluation.measurement import labels_of
from vitshrink.models.loading import LoadedModel
from vitshrink.models.tasks import task_of
from vitshrink.runtime.observer import Job


@dataclass(frozen=True, eq=False)
class Material:
    """Samples, how their labels are understood, and those that were preprocessed already."""

    samples: SampleSet
    label_of: Callable[[Any], Any] | None = None
    read: Sequence[Batch] = ()
    seen: frozenset[str] = frozenset()
    """Marks of samples that the model was fitted to before: they say less of what training gains than others."""

    def identity(self) -> str:
        """SHA-256 of the samples and, where they are learned, of what their labels mean to the model."""
        if self.label_of is None:
            return self.samples.fingerprint()
        meant = [self.label_of(sample.label) for sample in self.samples.samples]
        return hashlib.sha256(f"{self.samples.fingerprint()} {meant!r}".encode(errors="surrogatepass")).hexdigest()


def open_material(
    config: FinetuneConfig,
    data: DataConfig | None,
    model: LoadedModel,
    calibration: CalibrationData | None = None,
    *,
    job: Job,
    seen: frozenset[str] = frozenset(),
    class_map: Path | None = None,
    seed: int = 0,
    offline: bool = False,
) -> Material:
    """The samples of ``data``, or else those of the calibration; labels are aligned where the objective needs them.

    Raises:
        UsageError: neither is there.
        DataError: no such data, or labels that are not the model's.
    """
    if data is not None:
        samples = open_data(data, model, offline=offline, job=job, labeled=config.objective == "supervised")
    elif calibration is not None:
        samples = calibration.chosen
    else:
        raise UsageError("recovery needs training samples: pass --calibration, or --finetune-option data=FOLDER.")
    samples = samples.at_most(config.samples, seed).read_apart()
    label_of = None
    if config.objective == "supervised":
        label_of, _ = labels_of(model.model, samples, task_of(model.model), class_map)
    read = calibration.batches if calibration is not None and data is None else ()
    return Material(samples, label_of, read, seen if calibration is None else seen.union(calibration.samples.marks))
