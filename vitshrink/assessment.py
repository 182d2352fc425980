"""``evaluate_checkpoint``: one model, dense or compressed, measured on a data set, alone or beside its baseline."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitshrink import cost
from vitshrink.checkpoint import file_bytes
from vitshrink.config import DataConfig
from vitshrink.cost import Latency
from vitshrink.data import Preprocessor
from vitshrink.description import example_inputs
from vitshrink.errors import UsageError
from vitshrink.measurement import Measurement, measure, open_data
from vitshrink.models import LoadedModel, load_dense, task_of
from vitshrink.observer import Job, Observer, Silent
from vitshrink.onnx_model import SUFFIX, load_onnx, onnx_bytes, onnx_numbers
from vitshrink.pipeline import find_device


@dataclass(frozen=True)
class Assessment:
    """What ``vitshrink eval`` found."""

    model: str
    baseline: str | None
    measurement: Measurement
    preprocessing: Mapping[str, Any]
    parameters: int
    bytes: int
    timings: Mapping[str, float]
    warnings: list[str]
    latency: Mapping[str, Latency] | None = None
    """Of the baseline (``dense``) and the model (``compressed``), timed in turn."""

    @property
    def latency_ratio(self) -> float | None:
        """Median time of a pass over that of the baseline."""
        return None if self.latency is None else self.latency["compressed"].median / self.latency["dense"].median

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "baseline": self.baseline,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "latency": None if self.latency is None else {role: t.to_dict() for role, t in self.latency.items()},
            "evaluation": self.measurement.evaluation.to_dict(),
            "source": self.measurement.source,
            "fingerprint": self.measurement.fingerprint,
            "label_rule": self.measurement.label_rule,
            "bad_samples": dict(self.measurement.bad.reasons),
            "preprocessing": dict(self.preprocessing),
            "timings": dict(self.timings),
            "warnings": self.warnings,
        }


def evaluate_checkpoint(
    model: str,
    data: DataConfig,
    *,
    baseline: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    class_map: Path | None = None,
    max_bad_samples: int | None = None,
    device: str = "auto",
    seed: int = 0,
    offline: bool = False,
    timed: bool = False,
    observer: Observer | None = None,
) -> Assessment:
    """Measure a model on ``data`` and, with a ``baseline``, its difference from that on the same samples.

    ``limit`` samples are drawn by ``seed``. Weights are read in the type they are stored in and computed in float32.
    With ``timed``, passes of the two models are timed in turn.

    Raises:
        CheckpointError, DataError, UsageError: as the parts that read the model and the data.
    """
    job = Job(observer or Silent())
    with job.stage("load", "Loading"):
        loaded = open_model(model, device, offline=offline)
        reference = open_model(baseline, device, offline=offline) if baseline else None
    if reference is not None:
        _check_comparable(loaded, reference)
    preprocessor = Preprocessor.from_checkpoint(
        loaded.directory, loaded.family.modality, max_length=max_length, offline=offline
    )
    samples = open_data(data, loaded, offline=offline)
    if limit is not None and limit < len(samples):
        samples = samples.select(limit, seed)
    measurement = measure(
        loaded.model,
        samples,
        preprocessor,
        job,
        task=task_of(loaded.model),
        baseline=None if reference is None else reference.model,
        device=find_device(device),
        batch_size=batch_size,
        seed=seed,
        class_map=class_map,
        max_bad_samples=max_bad_samples,
    )
    latency = None
    if timed and reference is not None:
        with job.stage("latency", "Timing"):
            models = {"dense": reference.model, "compressed": loaded.model}
            latency = cost.latency(models, example_inputs(loaded.model))
    return Assessment(
        model,
        baseline,
        measurement,
        preprocessor.description,
        *_stored(model, loaded),
        job.timings,
        job.warnings,
        latency,
    )


def open_model(path_or_id: str, device: str, *, offline: bool) -> LoadedModel:
    """A checkpoint, or the ONNX file of one. Raises CheckpointError, DependencyError and UsageError."""
    if not path_or_id.endswith(SUFFIX):
        return load_dense(path_or_id, offline=offline, allow_compressed=True)
    if device not in ("auto", "cpu"):
        raise UsageError(f"--device {device}: an ONNX file is run on the CPU here.")
    return load_onnx(Path(path_or_id))


def _stored(path_or_id: str, loaded: LoadedModel) -> tuple[int, int]:
    """Numbers and bytes of the weight files."""
    if path_or_id.endswith(SUFFIX):
        return onnx_numbers(Path(path_or_id)), onnx_bytes(Path(path_or_id))
    return cost.parameters(loaded.model), file_bytes(loaded.directory)


def _check_comparable(model: LoadedModel, baseline: LoadedModel) -> None:
    """Raises UsageError when the outputs of the two models do not stand for the same things."""
    for what, of in (
        ("task", lambda loaded: task_of(loaded.model)),
        ("kind of input", lambda loaded: loaded.family.modality),
        ("number of classes", lambda loaded: loaded.model.config.num_labels),
        ("vocabulary size", lambda loaded: getattr(loaded.model.config, "vocab_size", None)),
        ("width", lambda loaded: loaded.model.config.hidden_size if task_of(loaded.model) == "features" else None),
        ("image size", lambda loaded: getattr(loaded.model.config, "image_size", None)),
    ):
        if of(model) != of(baseline):
            raise UsageError(
                f"{baseline.directory} cannot be the baseline of {model.directory}: the {what} differs, "
                f"{of(baseline)} against {of(model)}."
            )
