"""What every job does at its start: a model and the one it is compared with are opened once, and the data with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from transformers import PreTrainedModel

from vitshrink.config.options import CompressConfig, DataConfig, Preprocessing
from vitshrink.config.quantize import QuantizeJob
from vitshrink.data import Batch, Preprocessor, SampleSet, overlap
from vitshrink.data.opening import open_data
from vitshrink.errors import UsageError
from vitshrink.evaluation.measurement import Measurement, labels_of, measure_each, require_embedding
from vitshrink.models.exported import exported_file, load_exported
from vitshrink.models.families import require_dtype
from vitshrink.models.geometry import image_shape
from vitshrink.models.loading import LoadedModel, load_dense, require_attention
from vitshrink.models.resolution import set_resolution
from vitshrink.models.targets import blocks_of
from vitshrink.models.tasks import task_of
from vitshrink.runtime import processes
from vitshrink.runtime.device import find_device
from vitshrink.runtime.observer import Job
from vitshrink.runtime.offloading import offload
from vitshrink.statistics.digests import data_digest, model_digest


@dataclass(frozen=True)
class Settings:
    """How a job opens and measures models."""

    device: str = "auto"
    offload: bool = False
    """Whether blocks are on the device while they run, and all else on the CPU."""
    attention: str = "sdpa"
    offline: bool = False
    resolution: int | None = None
    """Pixels of an image, if not the model's."""
    max_length: int | None = None
    """Tokens of a text, if not the model's."""
    preprocess: Preprocessing = "checkpoint"
    class_map: Path | None = None
    batch_size: int = 32
    seed: int = 0
    max_bad_samples: int | None = None
    workers: int | None = None

    @classmethod
    def of(cls, config: CompressConfig | QuantizeJob) -> Self:
        """Those of a job; one that only rounds has no attention and no resolution of its own."""
        return cls(
            device=config.device,
            offload=getattr(config, "offload", cls.offload),
            attention=getattr(config, "attention", cls.attention),
            offline=config.offline,
            resolution=getattr(config, "resolution", cls.resolution),
            max_length=config.max_length,
            preprocess=config.preprocess,
            class_map=Path(config.class_map) if config.class_map else None,
            batch_size=config.batch_size or cls.batch_size,
            seed=config.seed,
            max_bad_samples=config.max_bad_samples,
            workers=config.workers,
        )


@dataclass(frozen=True, eq=False)
class Session:
    """A model that was opened for a job, with what it is compared with, and how both are measured."""

    settings: Settings
    job: Job
    device: torch.device
    source: LoadedModel
    """On the CPU, until a job moves it."""
    baseline: LoadedModel | None = None
    """What the job compares with, where that is not the source itself: the dense model, or the teacher."""

    @classmethod
    def open(
        cls,
        model: str,
        settings: Settings,
        job: Job,
        *,
        baseline: str | None = None,
        allow_compressed: bool = True,
        exported: bool = False,
        title: str = "Loading the model",
    ) -> Self:
        """Load a checkpoint or, with ``exported``, what was exported, and a baseline that it can be compared with.

        Raises:
            CheckpointError, DependencyError: as what reads the files.
            UsageError: a device, attention or resolution that cannot be had, or models that cannot be compared.
        """
        with job.stage("load", title), processes.together():
            if exported and settings.device not in ("auto", "cpu") and _is_exported(model, baseline):
                raise UsageError(f"--device {settings.device}: exported files run on the CPU only.")
            device = find_device(settings.device)
            require_attention(settings.attention, device)
            home = _home(device) if settings.offload else device
            session = cls(settings, job, home, _loaded(model, settings, job, allow_compressed, exported))
            session.place(session.source.model)
            if baseline is None:
                return session
            session = session.beside(_loaded(baseline, settings, job, exported=exported))
            assert session.baseline is not None
            session.place(session.baseline.model)
            return session

    def place(self, model: PreTrainedModel) -> None:
        """Have the blocks of a model, which is on the CPU, run on the device, where that is asked for."""
        if self.settings.offload:
            offload(blocks_of(model), find_device(self.settings.device))

    def load(self, path_or_id: str, title: str) -> LoadedModel:
        """Another checkpoint, opened as the model was."""
        with self.job.stage("load", title):
            return _loaded(path_or_id, self.settings, self.job)

    def beside(self, baseline: LoadedModel) -> Self:
        """The session with something to compare with. Raises UsageError where the outputs mean other things."""
        check_comparable(self.source, baseline)
        return replace(self, baseline=baseline)

    def dtype(self, name: str | None) -> torch.dtype:
        """The type that a result is stored in: of this name, or the source's.

        Raises CheckpointError where the model does not run in it.
        """
        found: torch.dtype = getattr(torch, name) if name else self.source.source_dtype
        require_dtype(self.source.model, found)
        return found

    def runs_in(self, name: str | None) -> torch.dtype:
        """The type that a result is loaded in: of this name, or the source's, though it may be stored in a narrower."""
        found: torch.dtype = getattr(torch, name) if name else self.source.source.runs_in
        return found

    def require_same(self, options: Mapping[str, object], **data: SampleSet | Sequence[Batch] | None) -> None:
        """Raises UsageError where other processes, on other machines perhaps, read something else, or otherwise."""
        if processes.started():
            models = {"the model": self.source, "the baseline": self.baseline}
            processes.require_same(
                {name: None if each is None else model_digest(each.model) for name, each in models.items()}
                | {f"{name} data": None if each is None else _digest(each) for name, each in data.items()}
                | {f"--{name.replace('_', '-')}": value for name, value in options.items()}
                | {"the kind of device": self.device.type}
            )

    def preprocessor(self) -> Preprocessor:
        """How samples become the model's inputs. Raises CheckpointError and UsageError."""
        return Preprocessor.from_checkpoint(
            self.source.directory,
            self.source.family.modality,
            task=self.source.task,
            config=self.source.model.config,
            max_length=self.settings.max_length,
            style=self.settings.preprocess,
            offline=self.settings.offline,
            resolution=self.settings.resolution,
        )

    def samples(self, data: DataConfig) -> SampleSet:
        """Samples whose labels do not count. Raises DataError."""
        return open_data(data, self.source, offline=self.settings.offline, job=self.job)

    def evaluation_samples(self, data: DataConfig, limit: int | None) -> SampleSet:
        """At most ``limit`` samples to evaluate on, looked at before any work that they would spoil.

        Raises:
            DataError: samples that cannot be read, or labels that cannot be aligned.
            CheckpointError: pairs of sentences, which this model's embeddings cannot compare.
        """
        samples = open_data(data, self.source, offline=self.settings.offline, job=self.job, labeled=True)
        samples = samples.at_most(limit, self.settings.seed)
        require_embedding(self.source.embedding, samples)
        labels_of(self.source.model, samples, self.source.task, self.settings.class_map)
        return samples

    def warn_of_overlap(self, used: SampleSet, samples: SampleSet | None, how: str) -> None:
        """Say how many of the samples that judge were used before."""
        shared = 0 if samples is None else overlap(used, samples)
        if samples is not None and shared:
            self.job.warn(f"{shared} of the {len(samples)} evaluation samples {how}: the figures may be too good.")

    def measure(
        self, model: PreTrainedModel, samples: SampleSet, preprocessor: Preprocessor, *, against: LoadedModel | None
    ) -> Measurement:
        """Measure one model: see ``measure_each``."""
        return self.measure_each([model], samples, preprocessor, against=against)[0]

    def measure_each(
        self,
        models: Sequence[PreTrainedModel],
        samples: SampleSet,
        preprocessor: Preprocessor,
        *,
        against: LoadedModel | None,
        job: Job | None = None,
        labeled: bool = True,
    ) -> Sequence[Measurement]:
        """Measure models in one pass, in which what they are compared with (``against``) runs once.

        ``job`` is told, if not that of the session. Raises as ``measurement.measure_each``.
        """
        return measure_each(
            models,
            samples,
            preprocessor,
            job or self.job,
            task=self.source.task,
            baseline=None if against is None else against.model,
            device=self.device,
            batch_size=self.settings.batch_size,
            embedding=self.source.embedding,
            baseline_embedding=None if against is None else against.embedding,
            seed=self.settings.seed,
            labeled=labeled,
            class_map=self.settings.class_map,
            max_bad_samples=self.settings.max_bad_samples,
            workers=self.settings.workers,
        )


def _loaded(
    path_or_id: str, settings: Settings, job: Job, allow_compressed: bool = True, exported: bool = False
) -> LoadedModel:
    if exported and (file := exported_file(path_or_id)) is not None:
        return load_exported(file)
    loaded = load_dense(
        path_or_id,
        offline=settings.offline,
        allow_compressed=allow_compressed,
        attention=settings.attention,
        warn=job.warn,
    )
    if settings.resolution is not None:
        set_resolution(loaded.model, settings.resolution)
    return loaded


def _home(device: torch.device) -> torch.device:
    if device.type == "cpu":
        raise UsageError("--offload spares the memory of a GPU, and this job runs on the CPU: remove --offload.")
    return torch.device("cpu")


def _is_exported(*names: str | None) -> bool:
    return any(name is not None and exported_file(name) is not None for name in names)


def _digest(data: SampleSet | Sequence[Batch]) -> str:
    """Of what a model reads or, if samples were not read yet, of their names, labels and texts."""
    return data.outline() if isinstance(data, SampleSet) else data_digest(data)


def _width(loaded: LoadedModel) -> int | None:
    return getattr(loaded.model.config, "hidden_size", None) if task_of(loaded.model) == "features" else None


def _image_size(loaded: LoadedModel) -> tuple[int, int] | None:
    return image_shape(loaded.model.config)[1:] if loaded.family.modality == "image" else None


def check_comparable(model: LoadedModel, baseline: LoadedModel) -> None:
    """Raises UsageError when the outputs of the two models do not stand for the same things."""
    for what, of in (
        ("task", lambda loaded: task_of(loaded.model)),
        ("kind of input", lambda loaded: loaded.family.modality),
        ("number of classes", lambda loaded: loaded.model.config.num_labels),
        ("vocabulary size", lambda loaded: getattr(loaded.model.config, "vocab_size", None)),
        ("width", _width),
        ("image size", _image_size),
    ):
        if of(model) != of(baseline):
            raise UsageError(
                f"{baseline.directory} cannot be the baseline of {model.directory}: the {what} differs "
                f"({of(baseline)} and {of(model)})."
            )
