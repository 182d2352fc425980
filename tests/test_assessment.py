"""``evaluate_checkpoint``: dense and compressed alike, and gates on the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from typer.testing import CliRunner

from vitshrink import cost
from vitshrink.assessment import evaluate_checkpoint
from vitshrink.cli.app import app
from vitshrink.config import DataConfig
from vitshrink.errors import CheckpointError, DataError, UsageError
from vitshrink.gates import Gates
from vitshrink.pipeline import CompressionResult

Compressed = Callable[..., CompressionResult]
CLASSIFIER = "ViTForImageClassification"


@pytest.fixture(scope="module")
def small(compressed: Compressed) -> Path:
    directory = compressed(CLASSIFIER, method="svd", keep=(0.6,)).directory
    assert directory is not None
    return directory


# Evaluation


def test_a_dense_model_is_measured_alone(vit_directory: Path, learned_images: Path) -> None:
    found = evaluate_checkpoint(str(vit_directory), DataConfig(str(learned_images)))
    evaluation = found.measurement.evaluation
    assert evaluation.dense is not None
    assert evaluation.dense["correct"] == 34
    assert evaluation.compressed is None
    assert evaluation.fidelity is None
    assert found.parameters == cost.parameters(tiny.build(CLASSIFIER))
    assert found.bytes == (vit_directory / "model.safetensors").stat().st_size
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["evaluation"]["samples"] == 40


def test_a_compressed_model_is_measured_beside_its_baseline(
    small: Path, vit_directory: Path, learned_images: Path
) -> None:
    found = evaluate_checkpoint(str(small), DataConfig(str(learned_images)), baseline=str(vit_directory))
    evaluation = found.measurement.evaluation
    assert evaluation.dense is not None
    assert evaluation.dense["correct"] == 34
    assert evaluation.compressed is not None
    assert evaluation.difference is not None
    assert evaluation.difference["drop"] == pytest.approx((34 - evaluation.compressed["correct"]) / 40)
    assert found.parameters < cost.parameters(tiny.build(CLASSIFIER))
    alone = evaluate_checkpoint(str(small), DataConfig(str(learned_images)))
    assert alone.measurement.evaluation.compressed == evaluation.compressed


def test_a_model_beside_itself_loses_nothing(vit_directory: Path, learned_images: Path) -> None:
    found = evaluate_checkpoint(str(vit_directory), DataConfig(str(learned_images)), baseline=str(vit_directory))
    evaluation = found.measurement.evaluation.to_dict()
    assert evaluation["difference"]["drop"] == 0
    assert evaluation["fidelity"]["kl"] == pytest.approx(0, abs=1e-12)
    Gates(min_accuracy=85, max_drop=0, max_kl=1e-9).check(evaluation)


def test_a_limit_draws_by_seed(vit_directory: Path, learned_images: Path) -> None:
    def fingerprint(seed: int) -> str:
        found = evaluate_checkpoint(str(vit_directory), DataConfig(str(learned_images)), limit=15, seed=seed)
        assert found.measurement.evaluation.samples == 15
        return found.measurement.fingerprint

    assert fingerprint(0) == fingerprint(0) != fingerprint(1)


def test_half_precision_weights_are_computed_in_float32(tmp_path: Path, learned_images: Path) -> None:
    model = tiny.write(CLASSIFIER, tmp_path / "model", dtype=torch.float16)
    found = evaluate_checkpoint(str(model), DataConfig(str(learned_images)))
    assert found.measurement.evaluation.dense is not None
    assert abs(found.measurement.evaluation.dense["correct"] - 34) <= 1


@pytest.mark.parametrize(
    ("baseline", "said"),
    [
        ("BertForSequenceClassification", "the task differs, text-classification against image-classification"),
        ("ViTModel", "the task differs, features against image-classification"),
    ],
)
def test_models_for_different_things_are_not_compared(
    checkpoint: Callable[[str], Path], small: Path, flat_images: Path, baseline: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        evaluate_checkpoint(str(small), DataConfig(str(flat_images)), baseline=str(checkpoint(baseline)))


def test_models_of_different_classes_are_not_compared(small: Path, flat_images: Path, tmp_path: Path) -> None:
    model = tiny.build(CLASSIFIER)
    model.config.num_labels = 7
    type(model)(model.config).save_pretrained(tmp_path / "seven")
    tiny.write_processor(tmp_path / "seven")
    with pytest.raises(UsageError, match="number of classes differs, 7 against 4"):
        evaluate_checkpoint(str(small), DataConfig(str(flat_images)), baseline=str(tmp_path / "seven"))


def test_feature_models_of_different_widths_are_not_compared(
    checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    model = tiny.build("BertModel")
    model.config.hidden_size = 16
    type(model)(model.config).save_pretrained(tmp_path / "narrow")
    tiny.write_tokenizer(tmp_path / "narrow")
    with pytest.raises(UsageError, match="width differs, 16 against 32"):
        evaluate_checkpoint(str(checkpoint("BertModel")), DataConfig(str(text_file)), baseline=str(tmp_path / "narrow"))


def test_labels_that_look_permuted_stop_the_evaluation(
    vit_directory: Path, learned_images: Path, tmp_path: Path
) -> None:
    for index, name in enumerate(tiny.IMAGE_CLASSES):
        (tmp_path / tiny.IMAGE_CLASSES[(index + 1) % 4]).symlink_to(learned_images / name)
    with pytest.raises(DataError, match="labels look permuted"):
        evaluate_checkpoint(str(vit_directory), DataConfig(str(tmp_path)))


def test_a_wrong_model_or_baseline_is_named(small: Path, flat_images: Path, tmp_path: Path) -> None:
    for entries in ({"model": str(tmp_path / "none")}, {"model": str(small), "baseline": str(tmp_path / "none")}):
        with pytest.raises(CheckpointError, match="none"):
            evaluate_checkpoint(data=DataConfig(str(flat_images)), **entries)


# The command


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in ("eval", *arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_a_missed_gate_exits_with_3_after_the_figures(small: Path, vit_directory: Path, learned_images: Path) -> None:
    flags = (small, "--baseline", vit_directory, "--data", learned_images, "--json")
    code, stdout, stderr = run(*flags, "--max-kl", "1e-6", "--min-accuracy", "100")
    assert code == 3
    assert json.loads(stdout)["evaluation"]["samples"] == 40
    assert stderr.startswith("error: --min-accuracy 100 is missed by ")
    assert "--max-kl 1e-06 is missed by " in stderr
    code, _, stderr = run(*flags, "--max-kl", "100", "--max-drop", "100", "--min-accuracy", "0")
    assert (code, stderr) == (0, "")


def test_a_gate_that_cannot_be_judged_exits_with_2(small: Path, learned_images: Path, flat_images: Path) -> None:
    code, stdout, stderr = run(small, "--data", learned_images, "--max-drop", "1")
    assert (code, stdout) == (2, "")
    assert "--baseline" in stderr
    code, _, stderr = run(small, "--data", flat_images)
    assert code == 2
    assert "nothing to measure" in stderr


def test_the_table_shows_a_dense_model_too(vit_directory: Path, learned_images: Path) -> None:
    code, stdout, _ = run(vit_directory, "--data", learned_images, "--quiet")
    assert code == 0
    assert "0.8500" in stdout
    assert "labels: class names; 4 of 4 classes occur" in stdout
