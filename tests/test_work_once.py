"""What a job reads and copies: every checkpoint directory once, and the model at most twice."""

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import vitshrink
from vitshrink.config.options import CompressConfig, DataConfig, FinetuneConfig, FinetuneJob
from vitshrink.config.quantize import QuantizeJob
from vitshrink.jobs.compress import CompressionResult, compress
from vitshrink.jobs.evaluate import evaluate_checkpoint
from vitshrink.jobs.export import export
from vitshrink.jobs.finetune import finetune_checkpoint
from vitshrink.jobs.quantize import quantize_checkpoint
from vitshrink.models import source, views
from vitshrink.report import figures

CLASSIFIER = "ViTForImageClassification"


class Seen:
    """Counts directories by the role they have in the job: its inputs by their paths, parts of its output by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, output: Path) -> None:
        self.output, self.monkeypatch = output, monkeypatch
        self.examined = Counter[str]()
        self.read = Counter[str]()
        self.copies = 0
        self._watch(source, "_examine", lambda directory: self.examined.update([self._role(directory)]))
        self._watch(views, "_changed", lambda model, change: self._copied(model if change is torch.Tensor.clone else 0))
        self._watch(copy, "deepcopy", self._copied)
        load = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

        def from_pretrained(cls: type, pretrained_model_name_or_path: Path, **options: Any) -> Any:
            self.read[self._role(pretrained_model_name_or_path)] += 1
            return load(cls, pretrained_model_name_or_path, **options)

        monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))

    def _watch(self, owner: Any, name: str, note: Callable[..., object]) -> None:
        original = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            note(*arguments)
            return original(*arguments, **options)

        self.monkeypatch.setattr(owner, name, watched)

    def _copied(self, what: object, *_memo: object) -> None:
        self.copies += isinstance(what, PreTrainedModel)

    def _role(self, directory: Path) -> str:
        staged = next((each for each in (directory, directory.parent) if each.name.startswith(".out.")), None)
        return str(directory) if staged is None else f"output {directory.relative_to(staged)}"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Seen:
    monkeypatch.setattr(figures, "available", lambda: False)
    return Seen(monkeypatch, tmp_path / "out")


@pytest.fixture(scope="module")
def small(compressed: Callable[..., CompressionResult]) -> Path:
    directory = compressed(CLASSIFIER, method="svd", keep=(0.7,)).directory
    assert directory is not None
    return directory


@pytest.mark.parametrize(
    ("keep", "more"),
    [
        ((0.8,), {}),
        ((0.8, 0.7), {}),
        ((0.8,), {"method": "curvature"}),
        ((0.8,), {"quantize": "int8", "dtype": "float16"}),
    ],
)
def test_compress(
    keep: tuple[float, ...], more: dict[str, Any], vit_directory: Path, learned_images: Path, seen: Seen
) -> None:
    entries = {"method": "whitened", "calibration": str(learned_images), "samples": 8, "holdout": 4} | more
    compress(CompressConfig(str(vit_directory), str(seen.output), keep=keep, **entries))
    outputs = [f"output keep-{each}" for each in keep] if len(keep) > 1 else ["output ."]
    assert seen.examined == seen.read == Counter([str(vit_directory), *outputs])
    assert seen.copies <= 2 * len(keep)


def test_quantize(small: Path, vit_directory: Path, learned_images: Path, seen: Seen) -> None:
    quantize_checkpoint(
        QuantizeJob(str(small), str(seen.output), baseline=str(vit_directory), eval=str(learned_images))
    )
    assert seen.examined == seen.read == Counter([str(small), str(vit_directory), "output ."])
    assert seen.copies <= 2


def test_finetune(small: Path, vit_directory: Path, learned_images: Path, seen: Seen) -> None:
    training = FinetuneConfig(data=str(learned_images), epochs=1, batch_size=8)
    job = FinetuneJob(
        str(small), str(seen.output), finetune=training, teacher=str(vit_directory), eval=str(learned_images)
    )
    finetune_checkpoint(job)
    assert seen.examined == seen.read == Counter([str(small), str(vit_directory), "output ."])
    assert seen.copies <= 2


@pytest.mark.parametrize("form", ["dense", "torch"])
def test_export(form: str, small: Path, seen: Seen) -> None:
    export(str(small), str(seen.output), form)
    outputs = ["output ."] if form == "dense" else []
    assert seen.examined == seen.read == Counter([str(small), *outputs])
    assert seen.copies <= 2


def test_eval(small: Path, vit_directory: Path, learned_images: Path, seen: Seen) -> None:
    evaluate_checkpoint(str(small), DataConfig(str(learned_images)), baseline=str(vit_directory))
    assert seen.examined == seen.read == Counter([str(small), str(vit_directory)])
    assert seen.copies == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compress_in_memory(dtype: str, vit_directory: Path, flat_images: Path, seen: Seen) -> None:
    model = transformers.ViTForImageClassification.from_pretrained(vit_directory)
    vitshrink.compress(model, flat_images, keep=0.8, method="whitened", samples=8, holdout=4, dtype=dtype)
    assert seen.copies <= 2
