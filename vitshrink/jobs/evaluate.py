"""``evaluate_checkpoint``: one model, dense or compressed, measured on a data set, alone or beside its baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

from torch import nn

from vitshrink._version import __version__
from vitshrink.config.options import DataConfig, Preprocessing
from vitshrink.data.opening import uses_labels
from vitshrink.errors import UsageError
from vitshrink.evaluation.measurement import Measurement
from vitshrink.evaluation.quality import EvaluationRecord
from vitshrink.jobs.description import latency_record
from vitshrink.jobs.session import Session, Settings
from vitshrink.models import cost
from vitshrink.models.example import example_inputs
from vitshrink.models.exported import exported_file, numbers_of
from vitshrink.models.loading import LoadedModel
from vitshrink.models.maps import approximate_maps, landmarks_of
from vitshrink.models.onnx_model import OnnxModel
from vitshrink.models.resolution import mix_tokens
from vitshrink.models.runtimes import Runtime, find_runtime, require_running, running
from vitshrink.models.structures import structure_of
from vitshrink.models.structures.landmarks import Landmarks
from vitshrink.models.structures.tokens import MixedTokens
from vitshrink.report import evaluation_columns, latency_columns
from vitshrink.report.costs import LatencyRecord
from vitshrink.runtime import processes
from vitshrink.runtime.modes import threads
from vitshrink.runtime.observer import Job, Observer, Silent
from vitshrink.runtime.records import plain


@final
@dataclass(frozen=True)
class Footprint:
    """What one model needs, whatever it is measured on."""

    parameters: int
    bytes: int
    """Of the weight files."""
    memory: int | None
    """Bytes of the weights in memory, in the type they are computed in; None where another runtime holds them."""
    macs: int | None
    """Of one sample; None where another runtime runs it."""

    @classmethod
    def of(cls, loaded: LoadedModel) -> "Footprint":
        model, nbytes = loaded.model, loaded.source.nbytes
        if isinstance(model, OnnxModel):
            return cls(numbers_of(model.file.path), nbytes, None, None)
        return cls(
            cost.parameters(model),
            nbytes,
            cost.memory_bytes(model),
            cost.macs(model, example_inputs(model)),
        )


@final
@dataclass(frozen=True)
class Assessment:
    """What ``vitshrink eval`` found."""

    model: str
    baseline: str | None
    measurement: Measurement
    preprocessing: Mapping[str, Any]
    footprint: Footprint
    baseline_footprint: Footprint | None
    tokens: MixedTokens | None
    """The tokens that the model ran with, asked for or its own; None where it had all of them."""
    landmarks: Landmarks | None
    """Likewise."""
    latency: Sequence[Mapping[str, cost.Latency]]
    """By batch size: of the model (``compressed``) and the baseline (``dense``), timed in turn."""
    peak_memory: int
    """Bytes: allocated on the GPU, or else resident in this process."""
    seed: int
    timings: Mapping[str, float]
    warnings: list[str]

    @property
    def evaluation(self) -> EvaluationRecord:
        """What was measured, and on which data."""
        return self.measurement.record(self.preprocessing)

    @property
    def latency_record(self) -> LatencyRecord | None:
        """The times as in a report; None if not timed."""
        return latency_record(self.latency)

    @property
    def latency_ratio(self) -> float | None:
        """Median time of a pass over that of the baseline, at the first of the batch sizes; None if not timed."""
        timed = self.latency_record
        return None if timed is None else timed.ratio

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "baseline": self.baseline,
            **asdict(self.footprint),
            "baseline_footprint": None if self.baseline_footprint is None else asdict(self.baseline_footprint),
            "tokens": None if self.tokens is None else self.tokens.to_dict(),
            "landmarks": None if self.landmarks is None else self.landmarks.to_dict(),
            "latency": plain(self.latency_record),
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
        row = {
            "vitshrink": __version__,
            "model": self.model,
            "baseline": self.baseline,
            "parameters": self.footprint.parameters,
            "bytes": self.footprint.bytes,
            "macs": self.footprint.macs,
            "token_budget": self.tokens and self.tokens.budget,
            "landmarks": self.landmarks and self.landmarks.landmarks,
            "seed": self.seed,
            "warnings": len(self.warnings),
            **latency_columns(self.latency_record),
            **evaluation_columns(self.evaluation),
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
    runtime: str | None = None,
    number_of_threads: int | None = None,
    device: str = "auto",
    offload: bool = False,
    seed: int = 0,
    offline: bool = False,
    resolution: int | None = None,
    tokens: MixedTokens | None = None,
    landmarks: int | None = None,
    landmark_form: str = "pooled",
    observer: Observer | None = None,
) -> Assessment:
    """Evaluate a model on ``data`` and, with a ``baseline``, compare both on the same samples.

    Weights are read in their stored type and computed in float32. If a launcher started several processes, each
    measures its share of the samples.

    Args:
        model: checkpoint directory, Hub id or exported model.
        data: where the samples come from.
        baseline: model to compare with, of any of these kinds.
        limit: maximum number of samples, drawn with ``seed``.
        batch_size: samples per batch.
        max_length: maximum number of tokens in a text.
        preprocess: ``checkpoint``, or ``timm`` for the preprocessing of timm.
        class_map: file that maps class names to class indices.
        max_bad_samples: maximum number of unreadable samples; 1 % of them by default.
        workers: threads that decode images.
        latency: batch sizes to time, both models in turn.
        runtime: runtime for the timing, into which the models are exported; by default they run as they are.
        number_of_threads: CPU threads for the timing.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` …
        offload: keep models on the CPU, and their blocks on the device while they run.
        seed: seed of the samples, the masks and the intervals.
        offline: never use the network.
        resolution: image size in pixels, for both models.
        tokens: mixed-resolution tokens of the model, not of the baseline.
        landmarks: number of landmarks of the model, not of the baseline.
        landmark_form: ``pooled`` or ``nystrom``.
        observer: receives progress and warnings.

    Raises:
        CheckpointError: a model that cannot be read.
        DataError: samples or labels that cannot be used.
        UsageError: options that are wrong.
    """
    asked = {"--resolution": resolution, "--tokens mixed": tokens, "--landmarks": landmarks}
    for flag in (name for name, value in asked.items() if value is not None):
        if exported_file(model) is not None:
            raise UsageError(
                f"{flag}: {model} is an exported file and cannot be changed. Use the flag with compress, then "
                "export the result."
            )
    timed_in = None if runtime is None else find_runtime(runtime)
    job = Job(observer or Silent())
    settings = Settings(
        device=device,
        offload=offload,
        offline=offline,
        resolution=resolution,
        max_length=max_length,
        preprocess=preprocess,
        class_map=class_map,
        batch_size=batch_size,
        seed=seed,
        max_bad_samples=max_bad_samples,
        workers=workers,
    )
    session = Session.open(model, settings, job, baseline=baseline, exported=True, title="Loading")
    loaded, reference = session.source, session.baseline
    if tokens is not None:
        mix_tokens(loaded.model, tokens)
    if landmarks is not None:
        approximate_maps(loaded.model, landmarks_of(loaded.model, landmarks, landmark_form))
    for each in (loaded, reference):
        if timed_in is not None and each is not None:
            require_running(each.model, timed_in)
    with processes.together():
        preprocessor = session.preprocessor()
        samples = session.evaluation_samples(data, limit)
    if reference is None and samples.labels_are is None and samples.unlabeled and uses_labels(loaded, samples):
        raise UsageError(
            f"{samples.source} has no labels, and there is no --baseline to compare with: {samples.unlabeled}"
        )
    session.require_same({"batch-size": batch_size, "seed": seed, "limit": limit}, evaluation=samples)
    measurement = session.measure(loaded.model, samples, preprocessor, against=reference)
    peak_memory = max(processes.gather(cost.peak_memory_bytes(session.device)))
    with job.stage("cost", "Measuring cost"):
        footprint = Footprint.of(loaded)
        other = None if reference is None else Footprint.of(reference)
        with threads(number_of_threads):
            timed = processes.by_main(partial(_time, loaded, reference, latency, timed_in))
    return Assessment(
        model,
        baseline,
        measurement,
        preprocessor.description,
        footprint,
        other,
        *_approximations_of(loaded.model),
        timed,
        peak_memory,
        seed,
        job.timings,
        job.warnings,
    )


def _approximations_of(model: nn.Module) -> tuple[MixedTokens | None, Landmarks | None]:
    """As a compressed checkpoint would have them."""
    found = [spec for module in model.modules() if (spec := structure_of(module)) is not None]
    tokens = next((spec for spec in found if isinstance(spec, MixedTokens)), None)
    return tokens, next((spec for spec in found if isinstance(spec, Landmarks)), None)


def _time(
    model: LoadedModel, baseline: LoadedModel | None, batch_sizes: Sequence[int], runtime: Runtime | None
) -> list[dict[str, cost.Latency]]:
    if not batch_sizes:
        return []
    loaded = {} if baseline is None else {"dense": baseline.model}
    models = {
        name: each if runtime is None else running(each, runtime)
        for name, each in (loaded | {"compressed": model.model}).items()
    }
    return cost.latency_by_batch_size(models, lambda size: example_inputs(model.model, size), batch_sizes)
