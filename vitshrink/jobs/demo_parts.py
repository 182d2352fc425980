"""What the demo does to its model, and what it leaves out and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vitshrink.config.options import CompressConfig, DataConfig
from vitshrink.config.quantize import QuantizeJob
from vitshrink.errors import DependencyError
from vitshrink.jobs.compress import compress
from vitshrink.jobs.digits import CALIBRATION_IMAGES
from vitshrink.jobs.evaluate import evaluate_checkpoint
from vitshrink.jobs.quantize import quantize_checkpoint
from vitshrink.methods import attention_methods, available_methods
from vitshrink.models.runtimes import find_runtime
from vitshrink.report import Report
from vitshrink.runtime.observer import Observer

KEEP = 0.5
BATCH_SIZE = 64
"""Of the batches that are timed: of one image most of the time is PyTorch's own."""

RUNTIMES = ("openvino", "onnxruntime")
"""What multiplies static integers fast; the first that is there is used."""


@dataclass(frozen=True)
class Place:
    """Where the demo finds things and puts them."""

    model: Path
    digits: Path
    compressed: Path
    seed: int


@dataclass(frozen=True)
class Part:
    """One model to make, and the entries of its job that matter."""

    name: str
    """Of its folder."""
    command: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    """Another part whose result is the model to start from."""
    runtime: str | None = None
    """Where both models are timed; PyTorch if none."""

    def __str__(self) -> str:
        flags = " ".join(f"--{name.replace('_', '-')} {_shown(value)}" for name, value in self.settings.items())
        return f"{self.command} {flags}" + (f", of {self.source}" if self.source else "")


@dataclass(frozen=True)
class Made:
    """What a part came to."""

    part: Part
    directory: Path
    report: Report
    """Whose times are of both models in turn, in batches of ``BATCH_SIZE``."""


def parts(methods: Sequence[str] | None = None) -> list[Part]:
    """All of them, with ``methods`` of those for linear layers, or every one."""
    runtime = static_runtime()
    by_method = [Part(name, "compress", {"keep": (KEEP,), "method": name}) for name in methods or available_methods()]
    return [
        Part("bits-100kB", "compress", {"target_size": "100kB"}),
        Part("bits-60kB", "compress", {"target_size": "60kB"}),
        Part("int8", "quantize", {"weights": "int8", "rounding": "nearest"}),
        Part("int4", "quantize", {"weights": "int4", "rounding": "nearest"}),
        *by_method,
        Part("narrow", "compress", {"keep": (KEEP,), "forms": "narrow"}),
        Part("narrower", "compress", {"keep": (KEEP / 2,), "forms": "narrow"}),
        *([] if runtime is None else [Part("static", "quantize", {"activations": "static"}, "narrow", runtime)]),
    ]


def left_out(methods: Sequence[str] | None = None) -> list[str]:
    """What the tool has beside these, each with the reason why the demo does without it."""
    unused = sorted({*available_methods()} - {*(methods or available_methods())})
    reasons = [
        f"--method {', '.join(attention_methods())}: they change attention only, a third of this model",
        "--target-latency, --tokens merge, --tokens mixed, --landmarks: with 16 patches per image they gain too little",
        "--finetune: the demo trains nothing after compression",
    ]
    if static_runtime() is None:
        reasons.append('quantize --activations static: needs a runtime, pip install "vitshrink[onnx]" or "[openvino]"')
    return ([f"--method {', '.join(unused)}: not requested"] if unused else []) + reasons


def static_runtime() -> str | None:
    """The runtime in which static integers are timed, if one is installed."""
    for name in RUNTIMES:
        try:
            find_runtime(name)
        except DependencyError:
            continue
        return name
    return None


def make(part: Part, place: Place, observer: Observer) -> Made:
    """Do it, and time both models. Raises what the commands raise."""
    output = place.compressed / part.name
    source = place.model if part.source is None else place.compressed / part.source
    if part.command == "quantize":
        report = quantize_checkpoint(_quantization(part, place, source, output), observer).report
        timed = evaluate_checkpoint(
            str(output),
            DataConfig(str(place.digits / "val")),
            baseline=str(place.model),
            limit=BATCH_SIZE,
            latency=(BATCH_SIZE,),
            runtime=part.runtime,
            number_of_threads=1,
            offline=True,
            observer=observer,
        )
        return Made(part, output, replace(report, latency=timed.latency_record))
    config = CompressConfig(
        model=str(source),
        output=str(output),
        calibration=str(place.digits / "calibration"),
        samples=CALIBRATION_IMAGES,
        eval=str(place.digits / "val"),
        latency=(BATCH_SIZE,),
        threads=1,
        seed=place.seed,
        offline=True,
        **part.settings,
    )
    (result,) = compress(config, observer)
    return Made(part, output, result.report)


def _quantization(part: Part, place: Place, source: Path, output: Path) -> QuantizeJob:
    settings: dict[str, Any] = dict(part.settings)
    if part.runtime is not None:
        settings |= {"calibration": str(place.digits / "calibration"), "samples": CALIBRATION_IMAGES}
    return QuantizeJob(
        model=str(source),
        output=str(output),
        baseline=str(place.model),
        eval=str(place.digits / "val"),
        seed=place.seed,
        offline=True,
        **settings,
    )


def _shown(value: Any) -> str:
    return str(value[0]) if isinstance(value, tuple) else str(value)
