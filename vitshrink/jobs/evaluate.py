"""``evaluate_checkpoint``: one model, dense or compressed, measured on a data set, alone or beside its baseline."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from vitshrink._version import __version__
from vitshrink.config.options import DataConfig, Preprocessing
from vitshrink.data import Preprocessor
from vitshrink.data.opening import open_data, uses_labels
from vitshrink.errors import UsageError
from vitshrink.evaluation.measurement import Measurement, measure
from vitshrink.jobs.description import latency_entries
from vitshrink.models import cost
from vitshrink.models.checkpoint import file_bytes
from vitshrink.models.example import example_inputs
from vitshrink.models.families import task_of
from vitshrink.models.geometry import sides
from vitshrink.models.loading import LoadedModel, load_dense
from vitshrink.models.maps import approximate_maps, landmarks_of
from vitshrink.models.onnx_model import SUFFIX, load_onnx, onnx_bytes, onnx_numbers
from vitshrink.models.resolution import mix_tokens, set_resolution
from vitshrink.models.structures import structure_of
from vitshrink.models.structures.landmarks import Landmarks
from vitshrink.models.structures.tokens import MixedTokens
from vitshrink.report import evaluation_columns, latency_columns
from vitshrink.runtime import processes
from vitshrink.runtime.device import find_device
from vitshrink.runtime.observer import Job, Observer, Silent


@dataclass(frozen=True)
class Footprint:
    """What one model needs, whatever it is measured on."""

    parameters: int
    bytes: int
    """Of the weight files."""
    memory: int | None
    """Bytes of the weights in memory, in the type they are computed in; None where onnxruntime holds them."""
    macs: int | None
    """Of one sample; None where onnxruntime runs it."""

    @classmethod
    def of(cls, path_or_id: str, loaded: LoadedModel) -> "Footprint":
        if path_or_id.endswith(SUFFIX):
            return cls(onnx_numbers(Path(path_or_id)), onnx_bytes(Path(path_or_id)), None, None)
        model = loaded.model
        return cls(
            cost.parameters(model),
            file_bytes(loaded.directory),
            cost.memory_bytes(model),
            cost.macs(model, example_inputs(model)),
        )


@dataclass(frozen=True)
class Assessment:
    """What ``vitshrink eval`` found."""

    model: str
    baseline: str | None
    measurement: Measurement
    preprocessing: Mapping[str, Any]
    footprint: Footprint
    baseline_footprint: Footprint | None
    options: Mapping[str, Mapping[str, Any] | None]
    """``tokens`` and ``landmarks`` that the model ran with, asked for or its own; None where it had all of them."""
    latency: Sequence[Mapping[str, cost.Latency]]
    """By batch size: of the model (``compressed``) and the baseline (``dense``), timed in turn."""
    peak_memory: int
    """Bytes: allocated on the GPU, or else resident in this process."""
    seed: int
    timings: Mapping[str, float]
    warnings: list[str]

    @property
    def latency_ratio(self) -> float | None:
        """Median time of a pass over that of the baseline, at the first of the batch sizes; None if not timed."""
        timed = next(iter(self.latency), {})
        return timed["compressed"].median / timed["dense"].median if "dense" in timed else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "baseline": self.baseline,
            **asdict(self.footprint),
            "baseline_footprint": None if self.baseline_footprint is None else asdict(self.baseline_footprint),
            **self.options,
            "latency": latency_entries(self.latency) if self.latency else None,
            "peak_memory": self.peak_memory,
            "evaluation": self.measurement.evaluation.to_dict(),
            "source": self.measurement.source,
            "fingerprint": self.measurement.fingerprint,
            "label_rule": self.measurement.label_rule,
            "pooling": self.measurement.pooling,
            "similarity": self.measurement.similarity,
            "bad_samples": dict(self.measurement.bad.reasons),
            "preprocessing": dict(self.preprocessing),
            "seed": self.seed,
            "timings": dict(self.timings),
            "warnings": self.warnings,
        }

    def to_row(self) -> dict[str, Any]:
        """What ``append_rows`` takes."""
        document = self.to_dict()
        described = {
            name: document[name] for name in ("source", "fingerprint", "pooling", "similarity", "preprocessing")
        }
        row = {
            "vitshrink": __version__,
            "model": self.model,
            "baseline": self.baseline,
            "parameters": self.footprint.parameters,
            "bytes": self.footprint.bytes,
            "macs": self.footprint.macs,
            "token_budget": (self.options["tokens"] or {}).get("budget"),
            "landmarks": (self.options["landmarks"] or {}).get("landmarks"),
            "seed": self.seed,
            "warnings": len(self.warnings),
            **latency_columns(document["latency"] or {}),
            **evaluation_columns(document["evaluation"] | described),
        }
        if self.baseline_footprint is not None:
            row |= {
                "kept": self.footprint.parameters / self.baseline_footprint.parameters,
                "dense_parameters": self.baseline_footprint.parameters,
                "dense_bytes": self.baseline_footprint.bytes,
                "dense_macs": self.baseline_footprint.macs,
            }
        return row


def evaluate_checkpoint(
    model: str,
    data: DataConfig,
    *,
    baseline: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    preprocess: Preprocessing = "checkpoint",
    class_map: Path | None = None,
    max_bad_samples: int | None = None,
    workers: int | None = None,
    latency: Sequence[int] = (),
    device: str = "auto",
    seed: int = 0,
    offline: bool = False,
    resolution: int | None = None,
    tokens: MixedTokens | None = None,
    landmarks: int | None = None,
    landmark_form: str = "pooled",
    observer: Observer | None = None,
) -> Assessment:
    """Measure a model on ``data`` and, with a ``baseline``, its difference from that on the same samples.

    ``tokens`` and ``landmarks`` are those of the model alone, ``resolution`` is that of both.
    ``limit`` samples are drawn by ``seed``. Weights are read in the type they are stored in and computed in float32.
    ``latency`` are batch sizes to time. Where several processes work on the job each measures its share of the samples.

    Raises:
        CheckpointError, DataError, UsageError: as the parts that read the model and the data.
    """
    asked = {"--resolution": resolution, "--tokens mixed": tokens, "--landmarks": landmarks}
    for flag in (name for name, value in asked.items() if value is not None):
        if model.endswith(SUFFIX):
            raise UsageError(f"{flag}: {model} is as it was exported. Ask for it in compress, and export that.")
    job = Job(observer or Silent())
    with job.stage("load", "Loading"):
        loaded = open_model(model, device, offline=offline, warn=job.warn)
        reference = open_model(baseline, device, offline=offline, warn=job.warn) if baseline else None
        for each in (loaded, reference):
            if each is not None and resolution is not None:
                set_resolution(each.model, resolution)
        if tokens is not None:
            mix_tokens(loaded.model, tokens)
        if landmarks is not None:
            approximate_maps(loaded.model, landmarks_of(loaded.model, landmarks, landmark_form))
    if reference is not None:
        check_comparable(loaded, reference)
    preprocessor = Preprocessor.from_checkpoint(
        loaded.directory,
        loaded.family.modality,
        config=loaded.model.config,
        max_length=max_length,
        style=preprocess,
        offline=offline,
        resolution=resolution,
    )
    samples = open_data(data, loaded, offline=offline, job=job, labelled=True).at_most(limit, seed)
    if reference is None and samples.labels_are is None and samples.unlabelled and uses_labels(loaded, samples):
        raise UsageError(
            f"{samples.source} has no labels, and there is no --baseline to compare with: {samples.unlabelled}"
        )
    where = find_device(device)
    measurement = measure(
        loaded.model,
        samples,
        preprocessor,
        job,
        task=task_of(loaded.model),
        baseline=None if reference is None else reference.model,
        device=where,
        batch_size=batch_size,
        embedding=loaded.embedding,
        baseline_embedding=None if reference is None else reference.embedding,
        seed=seed,
        class_map=class_map,
        max_bad_samples=max_bad_samples,
        workers=workers,
    )
    peak_memory = max(processes.gather(cost.peak_memory_bytes(where)))
    with job.stage("cost", "Measuring cost"):
        footprint = Footprint.of(model, loaded)
        other = None if baseline is None or reference is None else Footprint.of(baseline, reference)
        timed = processes.by_main(partial(_time, loaded, reference, latency))
    return Assessment(
        model,
        baseline,
        measurement,
        preprocessor.description,
        footprint,
        other,
        _options_of(loaded.model),
        timed,
        peak_memory,
        seed,
        job.timings,
        job.warnings,
    )


def open_model(path_or_id: str, device: str, *, offline: bool, warn: Callable[[str], object]) -> LoadedModel:
    """A checkpoint, or the ONNX file of one. Raises CheckpointError, DependencyError and UsageError."""
    if not path_or_id.endswith(SUFFIX):
        return load_dense(path_or_id, offline=offline, allow_compressed=True, warn=warn)
    if device not in ("auto", "cpu"):
        raise UsageError(f"--device {device}: an ONNX file is run on the CPU here.")
    return load_onnx(Path(path_or_id))


def _options_of(model: nn.Module) -> dict[str, dict[str, Any] | None]:
    """As a compressed checkpoint would name them."""
    found = {type(spec): spec.to_dict() for module in model.modules() if (spec := structure_of(module)) is not None}
    return {"tokens": found.get(MixedTokens), "landmarks": found.get(Landmarks)}


def _time(
    model: LoadedModel, baseline: LoadedModel | None, batch_sizes: Sequence[int]
) -> list[dict[str, cost.Latency]]:
    models = {} if baseline is None else {"dense": baseline.model}
    return cost.latency_by_batch_size(
        models | {"compressed": model.model}, lambda size: example_inputs(model.model, size), batch_sizes
    )


def _image_size(loaded: LoadedModel) -> tuple[int, int] | None:
    return sides(loaded.model.config.image_size) if loaded.family.modality == "image" else None


def check_comparable(model: LoadedModel, baseline: LoadedModel) -> None:
    """Raises UsageError when the outputs of the two models do not stand for the same things."""
    for what, of in (
        ("task", lambda loaded: task_of(loaded.model)),
        ("kind of input", lambda loaded: loaded.family.modality),
        ("number of classes", lambda loaded: loaded.model.config.num_labels),
        ("vocabulary size", lambda loaded: getattr(loaded.model.config, "vocab_size", None)),
        ("width", lambda loaded: loaded.model.config.hidden_size if task_of(loaded.model) == "features" else None),
        ("image size", _image_size),
    ):
        if of(model) != of(baseline):
            raise UsageError(
                f"{baseline.directory} cannot be the baseline of {model.directory}: the {what} differs, "
                f"{of(baseline)} against {of(model)}."
            )
