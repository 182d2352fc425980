"""The commands, with flags that go together: each gives the command lines of one case."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tiny

from .checkpoint import Checkpoint
from .data import Data
from .oddity import Outcome
from .place import Place


@dataclass(frozen=True)
class Job:
    """What a command line can be made of."""

    checkpoint: Checkpoint
    place: Place
    data: Data
    number: int = 0
    """Of the run: each writes elsewhere."""

    @property
    def model(self) -> str:
        return self._given(self.place.inside(self.place.model))

    @property
    def source(self) -> str:
        return self._given(self.data.path)

    @property
    def output(self) -> Path:
        return self.place.output_path(self.number)

    @property
    def out(self) -> str:
        return self._given(self.output)

    def beside(self, name: str) -> Path:
        """Another output."""
        return self.output.with_name(f"{name}-{self.number}" if self.number else name)

    def _given(self, path: Path) -> str:
        given = self.place.given(path)
        return f"./{given}" if given.startswith("-") else given

    def calibration(self, samples: int) -> list[str]:
        """Flags of samples to calibrate on, few of them."""
        numbers = ["--samples", str(samples), "--holdout", "2"]
        return ["--calibration", self.source, *numbers, *self.data.flags, *self.bad]

    @property
    def evaluation(self) -> list[str]:
        columns = [flag.replace("--", "--eval-", 1) if flag.startswith("--") else flag for flag in self.data.flags]
        return ["--eval", self.source, *columns]

    @property
    def bad(self) -> list[str]:
        """Put up with as many as there are."""
        return ["--max-bad-samples", str(self.data.bad)] if self.data.bad else []


Lines = list[list[str]]


@dataclass(frozen=True)
class Command:
    lines: Callable[[Job], Lines]
    """The command lines one after the other; the last one is what the case is about."""
    writes: Literal["compressed", "dense", "other", "nothing"] = "compressed"
    """What the output is, which decides how it is looked at."""
    only: tuple[str, ...] = ()
    reads: bool = True
    """Whether there are data."""
    evaluates: bool = False
    """Whether the report or stdout has figures of all samples."""
    outcome: Outcome = "works"
    """What has to come of it where nothing is odd."""
    may_leave: bool = False
    """Whether there is an output where it fails, too: the results of a sweep."""

    def suits(self, architecture: str) -> bool:
        return not self.only or any(part in architecture for part in self.only)


def _compress(*flags: str, evaluated: bool = False, samples: int = 6) -> Callable[[Job], Lines]:
    def lines(job: Job) -> Lines:
        parts = [*(job.calibration(samples) if samples else []), *(job.evaluation if evaluated else [])]
        return [["compress", job.model, job.out, *flags, *parts]]

    return lines


def _small(job: Job, *flags: str) -> list[str]:
    """The command line that makes a compressed model beside the output."""
    return ["compress", job.model, job.place.given(job.beside("small")), "--method", "svd", "--keep", "0.8", *flags]


def _evaluate(job: Job) -> Lines:
    baseline = [] if job.data.labeled or "MaskedLM" in job.checkpoint.architecture else ["--baseline", job.model]
    return [["eval", job.model, "--data", job.source, *job.data.flags, *job.bad, *baseline, "--json"]]


def _evaluate_compressed(job: Job) -> Lines:
    small = job.place.given(job.beside("small"))
    flags = ["--data", job.source, *job.data.flags, *job.bad, "--baseline", job.model, "--json"]
    return [_small(job), ["eval", small, *flags]]


def _finetune(*flags: str) -> Callable[[Job], Lines]:
    def lines(job: Job) -> Lines:
        small = job.place.given(job.beside("small"))
        parts = ["--teacher", job.model, "--data", job.source, *job.data.flags, *job.bad, "--epochs", "1"]
        return [_small(job), ["finetune", small, job.out, *parts, "--batch-size", "4", *flags]]

    return lines


def _export(form: str) -> Callable[[Job], Lines]:
    def lines(job: Job) -> Lines:
        return [_small(job), ["export", job.place.given(job.beside("small")), job.out, "--to", form]]

    return lines


def _sweep(job: Job) -> Lines:
    file = job.beside("sweep.yaml")
    values = {"calibration": job.source, "samples": 6, "holdout": 3, "refine": 0, "eval": job.source}
    defaults = "\n".join(f"  {name}: {yaml_string(value)}" for name, value in values.items())
    file.write_bytes(
        f"output: {yaml_string(job.out)}\ndefaults:\n{defaults}\nmatrix:\n  model: [{yaml_string(job.model)}]\n"
        "  method: [svd, whitened]\n  keep: [0.8]\n".encode()
    )
    return [["sweep", job.place.given(file)]]


def yaml_string(value: object) -> str:
    """A value as YAML, names that are not UTF-8 included: in double quotes everything can be escaped."""
    if isinstance(value, int):
        return str(value)
    escaped = "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08X}" for c in str(value))
    return f'"{escaped}"'


def _training(objective: str) -> tuple[str, ...]:
    return ("--finetune", objective, "--finetune-option", "epochs=1")


def _quantize(job: Job) -> Lines:
    return [["quantize", job.model, job.out, "--weights", "int8"]]


def _quantize_and_evaluate(job: Job) -> Lines:
    return [[*_quantize(job)[0], "--baseline", job.model, "--eval", job.source, *job.data.flags]]


def _quantize_by_data(job: Job) -> Lines:
    return [["quantize", job.model, job.out, "--bits", "6", *job.calibration(6), *job.evaluation]]


def _inspect(job: Job) -> Lines:
    return [["inspect", job.model, "--calibration", job.source, "--samples", "6", *job.data.flags]]


def _frontier(job: Job) -> Lines:
    few = ("--samples", "6", "--holdout", "4", "--points", "4", "--measured", "2")
    return [["frontier", job.model, "--calibration", job.source, *few, *job.data.flags]]


def _report(job: Job) -> Lines:
    return [_small(job), ["report", job.place.given(job.beside("small")), "--html", f"{job.out}.html"]]


_METHODS = ("svd", "asvd", "whitened", "pca", "curvature", "mixed-rank")
_ATTENTION_METHODS = ("cholesky", "qk-joint", "vo-joint", "heads-joint", "tensor")
_ONCE = ("--refine", "0")
_IMAGES = tiny.IMAGE_MODELS

COMMANDS: dict[str, Command] = {
    **{f"compress-{name}": Command(_compress("--method", name, "--keep", "0.7", *_ONCE)) for name in _METHODS},
    **{
        f"compress-{name}": Command(_compress("--method", name, "--keep", "0.95", *_ONCE))
        for name in _ATTENTION_METHODS
    },
    "compress-eval": Command(_compress("--method", "whitened", "--keep", "0.8", evaluated=True), evaluates=True),
    "compress-eval-alone": Command(
        _compress("--method", "svd", "--rank", "8", evaluated=True, samples=0), evaluates=True
    ),
    "compress-refined": Command(_compress("--keep", "0.7")),
    "compress-two-sizes": Command(_compress("--method", "svd", "--keep", "0.8", "--keep", "0.6"), "other"),
    "compress-variance": Command(_compress("--explained-variance", "0.9", *_ONCE)),
    "compress-max-kl": Command(_compress("--max-kl", "0.5", *_ONCE), outcome="either"),
    "compress-max-changed": Command(_compress("--max-changed", "60", *_ONCE), outcome="either"),
    "compress-target-size": Command(_compress("--target-size", "90KB", *_ONCE), outcome="either"),
    "compress-int8": Command(_compress("--quantize", "int8", "--rank", "8", *_ONCE)),
    "compress-int4": Command(_compress("--quantize", "int4", "--rank", "8", *_ONCE)),
    "compress-float16": Command(_compress("--dtype", "float16", "--rank", "8", *_ONCE)),
    "compress-distilled": Command(_compress("--method", "svd", "--keep", "0.8", *_training("distill"), samples=18)),
    "compress-supervised": Command(
        _compress("--method", "svd", "--keep", "0.8", *_training("supervised"), samples=18), only=("Classification",)
    ),
    "compress-tokens": Command(_compress("--tokens", "mixed", "--token-budget", "10"), only=_IMAGES),
    "compress-landmarks": Command(_compress("--landmarks", "4"), only=_IMAGES),
    "compress-resolution": Command(_compress("--resolution", "48", "--keep", "0.8", *_ONCE), only=_IMAGES),
    "compress-dry-run": Command(_compress("--keep", "0.7", *_ONCE, "--dry-run"), "nothing"),
    "eval": Command(_evaluate, "nothing", evaluates=True),
    "eval-compressed": Command(_evaluate_compressed, "nothing", evaluates=True),
    "finetune": Command(_finetune()),
    "finetune-supervised": Command(_finetune("--objective", "supervised"), only=("Classification",)),
    "quantize": Command(_quantize, reads=False),
    "quantize-calibrated": Command(_quantize_by_data, evaluates=True, outcome="either"),
    "quantize-eval": Command(_quantize_and_evaluate, evaluates=True),
    "export-onnx": Command(_export("onnx"), "other", reads=False),
    "export-torch": Command(_export("torch"), "other", reads=False),
    "export-dense": Command(_export("dense"), "dense", reads=False),
    "inspect": Command(lambda job: [["inspect", job.model, "--json"]], "nothing", reads=False),
    "inspect-calibrated": Command(_inspect, "nothing"),
    "frontier": Command(_frontier, "nothing"),
    "report": Command(_report, "other", reads=False),
    "verify-of-a-dense-model": Command(lambda job: [["verify", job.model]], "nothing", reads=False, outcome="refused"),
    "sweep": Command(_sweep, "other", may_leave=True),
    "methods": Command(lambda _job: [["methods"]], "nothing", reads=False),
}
