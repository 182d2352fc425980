"""``vitshrink finetune`` and ``vitshrink compress --finetune``: what is written, and what is refused."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from typer.testing import CliRunner

import vitshrink
from vitshrink.cli.app import app
from vitshrink.config.options import CompressConfig, FinetuneConfig, FinetuneJob
from vitshrink.data import open_samples
from vitshrink.errors import UsageError
from vitshrink.jobs.compress import CompressionResult
from vitshrink.models import cost
from vitshrink.report import Report

QUICK = {"epochs": 1.0, "batch_size": 8, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def small(compressed: Callable[..., CompressionResult]) -> Path:
    directory = compressed("ViTForImageClassification", keep=(0.7,)).directory
    assert directory is not None
    return directory


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_compress_trains_and_says_so(compressed: Callable[..., CompressionResult], class_images: Path) -> None:
    for finetune in (
        FinetuneConfig(**QUICK),
        FinetuneConfig("supervised", data=str(class_images), **QUICK),
    ):
        result = compressed("ViTForImageClassification", keep=(0.7,), finetune=finetune)
        assert result.directory is not None
        report = Report.read(result.directory)
        assert report.recovery is not None
        assert report.recovery.objective == finetune.objective
        assert report.recovery.after <= report.recovery.before
        assert len(report.recovery.history) == 2
        assert "## Recovery" in (result.directory / "report.md").read_text(encoding="utf-8")
        recipe = yaml.safe_load((result.directory / "recipe.yaml").read_text())
        assert CompressConfig.from_mapping(recipe).finetune == finetune
        assert cost.parameters(vitshrink.load(result.directory)) == report.parameters.compressed


def test_finetune_writes_the_same_sizes_and_an_updated_report(
    small: Path, vit_directory: Path, flat_images: Path, learned_images: Path, tmp_path: Path
) -> None:
    flags = ["--epochs", 1, "--batch-size", 8, "--learning-rate", 1e-3, "--offline", "--quiet"]
    out = tmp_path / "out"
    result = run(
        *("finetune", small, out, "--teacher", vit_directory, "--data", flat_images, "--eval", learned_images, *flags)
    )
    assert result.exit_code == 0, result.stderr
    before, after = Report.read(small), Report.read(out)
    assert before.recovery is None
    assert after.recovery is not None
    assert (after.method, after.parameters, after.layers) == (before.method, before.parameters, before.layers)
    assert after.evaluation is not None
    assert after.evaluation.source == str(learned_images)
    assert cost.parameters(vitshrink.load(out)) == cost.parameters(vitshrink.load(small))
    again = tmp_path / "again"
    result = run("finetune", small, again, "--config", out / "recipe.yaml", "--quiet")
    assert result.exit_code == 0, result.stderr
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_labels_need_no_teacher_and_a_lost_report_is_made_anew(small: Path, class_images: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in small.iterdir():
        if not file.name.startswith("report"):
            (copied / file.name).write_bytes(file.read_bytes())
    result = run(
        *("finetune", copied, tmp_path / "out", "--objective", "supervised", "--data", class_images),
        *("--epochs", 1, "--json", "--offline"),
    )
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["recovery"]["objective"] == "supervised"
    assert document["layers"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "--teacher"),
        (("--teacher", "TEACHER", "--objective", "guess"), 2, "distill"),
        (("--teacher", "TEACHER", "--epochs", "0"), 2, "epochs"),
        (("--teacher", "TEACHER", "--attention", "flash_attention_2", "--device", "cpu"), 2, "CUDA"),
        (("--teacher", "TEACHER", "--reversible", "--gradient-checkpointing"), 2, "gradient_checkpointing"),
        (("--objective", "supervised"), 2, "labels"),
        (("--teacher", "TEACHER", "--bdia", "--features", "1"), 2, "features"),
        (("--teacher", "TEACHER", "--bdia", "--gamma", "0.3"), 2, "0.5, 0.25, 0.125"),
        (("--teacher", "TEACHER", "--momentum"), 2, "bdia"),
        (("--teacher", "TEACHER", "--objective", "supervised", "--features", "1"), 2, "--distillation"),
        (("--teacher", "BERT"), 2, "baseline"),
    ],
)
def test_what_makes_no_sense_ends_before_any_work(
    words: tuple[str, ...],
    code: int,
    said: str,
    small: Path,
    vit_directory: Path,
    bert_directory: Path,
    flat_images: Path,
    tmp_path: Path,
) -> None:
    places = {"TEACHER": vit_directory, "BERT": bert_directory}
    out = tmp_path / "out"
    result = run("finetune", small, out, "--data", flat_images, "--offline", *(places.get(w, w) for w in words))
    assert result.exit_code == code
    assert said in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_has_nothing_to_recover(vit_directory: Path, flat_images: Path, tmp_path: Path) -> None:
    result = run("finetune", vit_directory, tmp_path / "out", "--teacher", vit_directory, "--data", flat_images)
    assert result.exit_code == 1
    assert "not compressed" in " ".join(result.stderr.split())
    result = run("finetune", vit_directory, tmp_path / "out", "--teacher", vit_directory)
    assert result.exit_code == 2
    assert "--data" in result.stderr


def test_options_of_compress_are_the_flags_of_finetune() -> None:
    job = CompressConfig("m", "o", keep=(0.5,), finetune=FinetuneConfig("supervised", epochs=3.0, bdia=True))
    words = shlex.split(job.command())
    assert words[words.index("--finetune") + 1] == "supervised"
    assert {"epochs=3.0", "bdia=true"} <= set(words)
    assert CompressConfig.from_mapping(yaml.safe_load(job.to_yaml())) == job
    with pytest.raises(UsageError, match="Did you mean 'epochs'"):
        CompressConfig.from_mapping({"model": "m", "output": "o", "keep": 0.5, "finetune": {"epoch": 1}})
    flat = {"model": "m", "output": "o", "data": "d", "minutes": 5}
    nested = {"model": "m", "output": "o", "finetune": {"data": "d", "minutes": 5}}
    assert FinetuneJob.from_mapping(flat) == FinetuneJob.from_mapping(nested)
    assert "--minutes 5.0" in FinetuneJob.from_mapping(flat).command()


def test_integer_weights_are_not_trained(small: Path, vit_directory: Path, flat_images: Path, tmp_path: Path) -> None:
    result = run("quantize", small, tmp_path / "int8", "--offline", "--quiet")
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "out"
    result = run("finetune", tmp_path / "int8", out, "--teacher", vit_directory, "--data", flat_images, "--offline")
    assert result.exit_code == 1
    assert "is quantized, and quantized models cannot be trained: train the model it" in " ".join(result.stderr.split())
    assert not out.exists()


def test_labels_that_the_model_does_not_have_end_it_before_training(
    small: Path, class_images: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    for file in class_images.rglob("*.png"):
        place = data / file.relative_to(class_images)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
    next(data.iterdir()).rename(data / "no such class")
    out = tmp_path / "out"
    for words in (("--data", data), ("--data", class_images, "--eval", data)):
        result = run("finetune", small, out, "--objective", "supervised", *words, "--offline")
        assert result.exit_code == 1
        assert "no such class" in " ".join(result.stderr.split())
        assert "Recovering" not in result.stderr
        assert not out.exists()


def test_the_teacher_sees_at_the_resolution_of_the_small_model_and_its_own_tokens(
    compressed: Callable[..., CompressionResult], vit_directory: Path, flat_images: Path, tmp_path: Path
) -> None:
    other = compressed(
        "ViTForImageClassification",
        method="svd",
        resolution=64,
        tokens="mixed",
        token_budget=40,
        finetune=FinetuneConfig(**QUICK),
    )
    assert other.directory is not None
    assert other.report.recovery is not None
    words = ("--teacher", vit_directory, "--data", flat_images, "--eval", flat_images, "--offline")
    out = tmp_path / "out"
    result = run("finetune", other.directory, out, *words, "--epochs", 1, "--batch-size", 8)
    assert result.exit_code == 0, result.stderr
    assert "images of 64 pixels" in " ".join(result.stderr.split())
    assert vitshrink.load(out).config.image_size == 64
    refused = run("finetune", other.directory, tmp_path / "blocks", *words, "--blockwise", 1)
    assert refused.exit_code == 2
    assert "mixed tokens" in " ".join(refused.stderr.split())


def test_fewer_samples_are_trained_on_than_calibrated(compressed: Callable[..., CompressionResult]) -> None:
    result = compressed(
        "ViTForImageClassification", samples=22, holdout=2, method="svd", finetune=FinetuneConfig(samples=17, **QUICK)
    )
    assert result.report.recovery is not None
    assert result.report.recovery.samples + result.report.recovery.held_out == 17


def test_compression_does_not_see_the_samples_that_judge_the_training(
    compressed: Callable[..., CompressionResult], vit_directory: Path, flat_images: Path, tmp_path: Path
) -> None:
    result = compressed("ViTForImageClassification", samples=22, holdout=2, finetune=FinetuneConfig(**QUICK))
    report = result.report
    assert report.recovery is not None
    assert report.calibration is not None
    assert (report.recovery.samples, report.recovery.held_out) == (14, 8)
    assert report.calibration.samples == 14
    assert not report.recovery.familiar
    assert len(set(report.fitted_to.split())) == 14

    flags = ["--teacher", vit_directory, "--epochs", 1, "--batch-size", 8, "--learning-rate", 1e-3, "--quiet"]
    out = tmp_path / "again"
    done = run("finetune", result.directory, out, "--data", flat_images, *flags)
    assert done.exit_code == 0, done.stderr
    again = Report.read(out)
    assert again.recovery is not None
    assert not again.recovery.familiar, "the report of the compressed directory names what it was fitted to"
    assert set(report.fitted_to.split()) < set(again.fitted_to.split())
    held_out = set(open_samples(flat_images, "image").marks) - set(again.fitted_to.split())
    assert len(held_out) == again.recovery.held_out
    assert not held_out & set(report.fitted_to.split())


def test_too_few_samples_to_judge_by_end_it_before_the_compression(
    vit_directory: Path, flat_images: Path, tmp_path: Path
) -> None:
    refused = run(
        *("compress", vit_directory, tmp_path / "out", "--keep", 0.7, "--calibration", flat_images, "--samples", 15),
        *("--finetune", "distill"),
    )
    assert refused.exit_code == 1
    assert "15 usable samples: recovery needs at least 16" in " ".join(refused.stderr.split())
    assert not (tmp_path / "out").exists()


def test_the_evaluation_data_may_have_columns_of_other_names(
    compressed: Callable[..., CompressionResult], checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    name = "BertForSequenceClassification"
    small = compressed(name, keep=(0.7,)).directory
    sentences = text_file.read_text().splitlines()
    training, labeled = tmp_path / "training.jsonl", tmp_path / "labeled.jsonl"
    training.write_text("".join(json.dumps({"words": s, "sentence": "no"}) + "\n" for s in sentences))
    rows = [{"said": s, "text": "no", "kind": tiny.TEXT_CLASSES[i % 2]} for i, s in enumerate(sentences[:20])]
    labeled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--epochs", 1, "--batch-size", 8, "--text-column", "words", "--eval-text-column", "said", "--json"]
    result = run(
        *("finetune", small, tmp_path / "out", "--teacher", checkpoint(name), "--data", training, "--eval", labeled),
        *(*flags, "--eval-label-column", "kind"),
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["evaluation"]["samples"] == 20
    refused = run(
        *("finetune", small, tmp_path / "no", "--teacher", checkpoint(name), "--data", training, "--eval", labeled),
        *("--text-column", "words", "--eval-text-column", "sayd"),
    )
    assert refused.exit_code != 0
    assert "labeled.jsonl has no column 'sayd'. Did you mean 'said'?" in refused.stderr
