"""``evaluate_checkpoint``: dense and compressed alike, and gates on the command line."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_processes import run_together
from typer.testing import CliRunner

from vitshrink.cli.app import app
from vitshrink.config.options import DataConfig
from vitshrink.errors import CheckpointError, DataError, UsageError
from vitshrink.evaluation.gates import Gates
from vitshrink.jobs.compress import CompressionResult
from vitshrink.jobs.evaluate import evaluate_checkpoint
from vitshrink.models import cost

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
    assert evaluation.dense.correct == 34
    assert evaluation.compressed is None
    assert evaluation.fidelity is None
    assert found.footprint.parameters == cost.parameters(tiny.build(CLASSIFIER))
    assert found.footprint.bytes == (vit_directory / "model.safetensors").stat().st_size
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["evaluation"]["samples"] == 40


def test_a_compressed_model_is_measured_beside_its_baseline(
    small: Path, vit_directory: Path, learned_images: Path
) -> None:
    found = evaluate_checkpoint(str(small), DataConfig(str(learned_images)), baseline=str(vit_directory))
    evaluation = found.measurement.evaluation
    assert evaluation.dense is not None
    assert evaluation.dense.correct == 34
    assert evaluation.compressed is not None
    assert evaluation.difference is not None
    assert evaluation.difference.drop == pytest.approx((34 - evaluation.compressed.correct) / 40)
    assert found.footprint.parameters < cost.parameters(tiny.build(CLASSIFIER))
    alone = evaluate_checkpoint(str(small), DataConfig(str(learned_images)))
    assert alone.measurement.evaluation.compressed == evaluation.compressed


def test_a_model_beside_itself_loses_nothing(vit_directory: Path, learned_images: Path) -> None:
    found = evaluate_checkpoint(str(vit_directory), DataConfig(str(learned_images)), baseline=str(vit_directory))
    evaluation = found.measurement.evaluation
    assert evaluation.difference.drop == 0
    assert evaluation.fidelity.kl == pytest.approx(0, abs=1e-12)
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
    assert abs(found.measurement.evaluation.dense.correct - 34) <= 1


@pytest.mark.parametrize(
    ("baseline", "said"),
    [
        ("BertForSequenceClassification", r"the task differs \(text-classification and image-classification\)"),
        ("ViTModel", r"the task differs \(features and image-classification\)"),
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
    with pytest.raises(UsageError, match=r"number of classes differs \(7 and 4\)"):
        evaluate_checkpoint(str(small), DataConfig(str(flat_images)), baseline=str(tmp_path / "seven"))


def test_feature_models_of_different_widths_are_not_compared(
    checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    model = tiny.build("BertModel")
    model.config.hidden_size = 16
    type(model)(model.config).save_pretrained(tmp_path / "narrow")
    tiny.write_tokenizer(tmp_path / "narrow")
    with pytest.raises(UsageError, match=r"width differs \(16 and 32\)"):
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
        with pytest.raises(CheckpointError, match=rf"no such folder: '{re.escape(str(tmp_path / 'none'))}'"):
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
    code, _, stderr = run(*flags, "--max-kl", "100", "--max-drop", "100", "--max-changed", "100", "--min-accuracy", "0")
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
    assert "85.0 %" in stdout
    assert "preprocessing: resize to 32 × 32, bilinear; mean 0.5 0.5 0.5" in stdout
    assert "labels: class names; 4 of 4 classes occur" in stdout


def test_the_table_shows_both_models_their_cost_and_whether_the_change_is_real(
    small: Path, vit_directory: Path, learned_images: Path
) -> None:
    flags = ("--latency", "1", "--latency", "3", "--workers", "0", "--batch-size", "7", "--quiet")
    code, stdout, _ = run(small, "--baseline", vit_directory, "--data", learned_images, *flags)
    assert code == 0
    lines = {line.split("  ")[0]: line for line in stdout.splitlines()}
    for name in (
        "Top-1",
        "95 % interval",
        "Same prediction as dense",
        "Is the change significant?",
        "Latency, batch of 3",
    ):
        assert name in lines
    assert lines["Parameters"].rstrip().endswith("% kept")
    assert "Throughput, batch of 3" in lines
    assert "Throughput, batch of 1" not in lines
    assert "–  " not in stdout


def test_figures_are_appended_to_a_table(
    small: Path, vit_directory: Path, learned_images: Path, tmp_path: Path
) -> None:
    file = tmp_path / "results.csv"
    for flags in ((vit_directory,), (small, "--baseline", vit_directory, "--latency", "2")):
        assert run(*flags, "--data", learned_images, "--csv", file, "--json")[0] == 0
    alone, compared = list(csv.DictReader(file.read_text().splitlines()))
    assert float(alone["score"]) == 0.85
    assert (alone["baseline"], alone["drop"], alone["kl"]) == ("", "", "")
    assert float(compared["dense_score"]) == 0.85
    assert float(compared["drop"]) == pytest.approx(0.85 - float(compared["score"]))
    assert float(compared["kept"]) == int(compared["parameters"]) / int(alone["parameters"])
    assert compared["latency_batch_size"] == "2"
    assert alone["fingerprint"] == compared["fingerprint"]
    code, stdout, stderr = run(vit_directory, "--data", learned_images, "--csv", tmp_path / "no" / "results.csv")
    assert (code, stdout) == (1, "")
    assert "Evaluating" not in stderr


@pytest.mark.parametrize(
    ("entries", "flags", "tokens", "landmarks", "said"),
    [
        ({}, [], None, None, ()),
        (
            {"tokens": "mixed", "token_budget": 7},
            ["--tokens", "mixed", "--token-budget", "7"],
            {"budget": 7, "levels": 2, "scorer": "blur"},
            None,
            ("at most 7 patches of 2 sizes, by blur",),
        ),
        (
            {"landmarks": 4, "landmark_form": "nystrom"},
            ["--landmarks", "4", "--landmark-form", "nystrom"],
            None,
            {"landmarks": 4, "special": 1, "form": "nystrom"},
            ("4 landmarks, nystrom",),
        ),
    ],
)
def test_the_tokens_and_landmarks_of_a_run_are_named_whoever_asked_for_them(
    compressed: Compressed,
    vit_directory: Path,
    learned_images: Path,
    tmp_path: Path,
    entries: dict[str, Any],
    flags: list[str],
    tokens: dict[str, Any] | None,
    landmarks: dict[str, Any] | None,
    said: tuple[str, ...],
) -> None:
    file = tmp_path / "results.csv"
    result = compressed(CLASSIFIER, method="svd", keep=(0.6,) if not entries else (), **entries)
    assert result.directory is not None
    for model, own in ((vit_directory, flags), (result.directory, [])):
        code, stdout, _ = run(model, "--data", learned_images, *own, "--csv", file, "--json")
        assert code == 0
        document = json.loads(stdout)
        assert (document["tokens"], document["landmarks"]) == (tokens, landmarks)
    budget, windows = str((tokens or {}).get("budget", "")), str((landmarks or {}).get("landmarks", ""))
    rows = csv.DictReader(file.read_text().splitlines())
    assert [(row["token_budget"], row["landmarks"]) for row in rows] == [(budget, windows)] * 2
    shown = " ".join(run(vit_directory, "--data", learned_images, *flags)[1].split())
    assert all(words in shown for words in said)
    assert said or ("tokens:" not in shown and "attention maps:" not in shown)


def test_timm_geometry_is_recorded_and_changes_what_the_model_sees(vit_directory: Path, learned_images: Path) -> None:
    data = DataConfig(str(learned_images))
    own, timm = (evaluate_checkpoint(str(vit_directory), data, preprocess=style) for style in ("checkpoint", "timm"))
    assert timm.preprocessing["geometry"] == "timm"
    assert timm.preprocessing["size"] == {"shortest_edge": 35}
    assert timm.measurement.evaluation != own.measurement.evaluation
    assert timm.measurement.fingerprint == own.measurement.fingerprint


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--image-column", "picture"), "--image-column picture: .* folder of images"),
        (("--label-column", "label"), "--label-column label: .* folder of images"),
        (("--text-column", "text"), "--text-column text: the model reads image samples"),
        (("--labels", "truth.txt"), "class folders"),
    ],
)
def test_a_flag_that_could_only_be_ignored_is_refused(
    vit_directory: Path, learned_images: Path, flags: tuple[str, ...], said: str
) -> None:
    code, stdout, stderr = run(vit_directory, "--data", learned_images, *flags)
    assert (code, stdout) == (2, "")
    assert re.search(said, stderr)


@pytest.mark.slow
def test_two_processes_print_once_what_one_prints(
    small: Path, vit_directory: Path, learned_images: Path, tmp_path: Path
) -> None:
    csv_file = tmp_path / "results.csv"
    flags = ("--baseline", vit_directory, "--data", learned_images, "--json", "--csv", csv_file)
    main, other = run_together("-m", "vitshrink", "eval", *map(str, (small, *flags)))
    assert (main.returncode, other.returncode, other.stdout) == (0, 0, ""), (main, other)
    code, stdout, _ = run(small, *flags)
    assert code == 0
    together, alone = json.loads(main.stdout), json.loads(stdout)
    for changing in ("timings", "peak_memory"):
        del together[changing], alone[changing]
    assert together == alone
    assert len(csv_file.read_text().splitlines()) == 3
