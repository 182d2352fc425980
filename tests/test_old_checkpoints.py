"""Directories that earlier versions wrote still load, give the same outputs, and pass every check.

They lie in ``fixtures/compressed``, made once by ``fixtures/make.py``; nothing here makes them anew.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import vitshrink
from vitshrink.cli.app import app
from vitshrink.config.options import CompressConfig
from vitshrink.models.structures import registry
from vitshrink.report import Report, render_markdown, report_schema

FOLDER = Path(__file__).parent / "fixtures" / "compressed"
DIRECTORIES = sorted(path.parent for path in FOLDER.glob("*/checkpoint"))
RECIPES = [path for path in DIRECTORIES if (path / "checkpoint" / "recipe.yaml").exists()]

AUTO = {
    "ForImageClassification": transformers.AutoModelForImageClassification,
    "ForImageClassificationWithTeacher": transformers.AutoModelForImageClassification,
    "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
    "Model": transformers.AutoModel,
}

each = pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda path: path.name)


def config_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "checkpoint" / "config.json").read_text())
    return found


def entries_of(directory: Path) -> list[dict[str, Any]]:
    return list(config_of(directory)["quantization_config"]["layers"].values())


def check_output(model: transformers.PreTrainedModel, directory: Path) -> None:
    """Equal up to rounding; where activations become integers, the rounding of one may tip over to the next."""
    inputs = load_file(directory / "expected.safetensors")
    expected = inputs.pop("output")
    with torch.no_grad():
        output: Tensor = model.eval()(**inputs)[0]
    integers = any(entry.get("activations") == "dynamic" for entry in entries_of(directory))
    assert output.shape == expected.shape
    assert (output - expected).norm() <= (1e-2 if integers else 1e-5) * expected.norm()


@each
def test_its_report_is_read_whole_and_fits_the_schema(directory: Path) -> None:
    text = (directory / "checkpoint" / "report.json").read_text(encoding="utf-8")
    report = Report.from_json(text)
    assert report.to_dict() == json.loads(text) | {"schema": 1}
    assert report.model in render_markdown(report)
    schema = pytest.importorskip("jsonschema", reason="comes with vitshrink[dev]")
    schema.validate(report.to_dict(), report_schema())


def run(*words: object) -> str:
    found = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    assert found.exit_code == 0, found.output
    return found.stdout


@each
def test_stock_calls_load_it_and_its_outputs_are_the_old_ones(directory: Path) -> None:
    (architecture,) = config_of(directory)["architectures"]
    auto = next(auto for suffix, auto in AUTO.items() if architecture.endswith(suffix))
    model = auto.from_pretrained(directory / "checkpoint", dtype=torch.float32)
    assert type(model).__name__ == architecture
    check_output(model, directory)


@each
def test_the_strict_loader_takes_it_and_its_outputs_are_the_old_ones(directory: Path) -> None:
    check_output(vitshrink.load(directory / "checkpoint", dtype=torch.float32), directory)


@each
def test_it_verifies(directory: Path) -> None:
    checks = json.loads(run("verify", directory / "checkpoint", "--json"))
    assert {check["name"] for check in checks} >= {"checksums", "load", "outputs", "parameters", "bytes", "macs"}


@each
def test_its_report_is_rendered_again(directory: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(directory / "checkpoint", tmp_path / "copy")
    run("report", copy)
    assert all((copy / name).stat().st_size > 500 for name in ("report.md", "report.html", "README.md"))
    run("verify", copy)


@pytest.mark.parametrize("directory", RECIPES, ids=lambda path: path.name)
def test_its_recipe_is_still_a_job(directory: Path) -> None:
    entries = yaml.safe_load((directory / "checkpoint" / "recipe.yaml").read_text())
    config = CompressConfig.from_mapping(entries)
    assert (config.model, config.output, config.samples) == ("model", "checkpoint", 16)
    report = json.loads((directory / "checkpoint" / "report.json").read_text())
    assert config.method == report["method"]


def test_what_comes_after_a_sentence_encoder_is_still_applied() -> None:
    directory = FOLDER / "sentences"
    data = directory / "pairs.tsv"
    found = json.loads(run("eval", directory / "checkpoint", "--data", data, "--offline", "--device", "cpu", "--json"))
    old = json.loads((directory / "checkpoint" / "report.json").read_text())["evaluation"]
    assert (found["pooling"], found["similarity"]) == (old["pooling"], old["similarity"])
    assert found["evaluation"]["compressed"]["spearman"] == pytest.approx(old["compressed"]["spearman"], abs=1e-3)


def test_every_structure_that_a_checkpoint_may_hold_is_in_one_of_them() -> None:
    """A new one demands a directory of its own: see ``fixtures/make.py``."""
    found = {registry.kind_of(entry) for directory in DIRECTORIES for entry in entries_of(directory)}
    assert set(registry._STRUCTURES) <= found


def test_layers_are_there_in_every_form() -> None:
    entries = [entry for directory in DIRECTORIES for entry in entries_of(directory)]
    forms = {
        (entry.get("bits"), entry.get("activations"), "rank" in entry, "pivot" in entry)
        for entry in entries
        if registry.kind_of(entry) in (registry.LINEAR, "quantized")
    }
    low_rank = {(None, None, True, pivot) for pivot in (False, True)}
    integers = {(8, "dynamic", True, True), (8, "dynamic", False, False), (8, "none", True, False)}
    assert forms >= low_rank | integers | {(4, "none", False, False)}
    assert {entry["form"] for entry in entries if registry.kind_of(entry) == "landmarks"} == {"pooled", "nystrom"}
    assert {entry["scorer"] for entry in entries if registry.kind_of(entry) == "mixed-tokens"} == {"blur", "features"}
