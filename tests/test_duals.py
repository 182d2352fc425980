"""Dual encoders: both towers in one job, and the measures that people quote of them."""

import json
from pathlib import Path

import kinds
import pytest
import tiny
import torch
import transformers
from heads import Found, assert_a_bound_is_kept, evaluated, run
from torch import Tensor

from vitshrink.config.options import CompressConfig
from vitshrink.errors import CheckpointError, DataError
from vitshrink.evaluation.duals import of_classes, of_pairs
from vitshrink.jobs.compress import compress
from vitshrink.models.checkpoint import load
from vitshrink.models.families import family_named
from vitshrink.report.record import Report

each_dual = pytest.mark.parametrize("name", kinds.DUALS)


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time of a job on a tiny model; they have tests of their own."""
    monkeypatch.setattr("vitshrink.report.figures.available", lambda: False)


def job(name: str, folder: Path, **entries: object) -> Report:
    """Compress a tiny dual encoder into ``folder / out``."""
    source = kinds.write(name, folder / "model")
    settings = {"samples": 8, "holdout": 4, "batch_size": 4, "calibration": str(kinds.write_captions(folder))}
    (result,) = compress(CompressConfig(str(source), str(folder / "out"), **settings | entries))
    return result.report


def both(name: str) -> dict[str, torch.Tensor]:
    """An image and a text."""
    inputs = tiny.inputs("ViTModel") | tiny.inputs("BertModel")
    return inputs if name == "CLIPModel" else {key: inputs[key] for key in ("pixel_values", "input_ids")}


@each_dual
@pytest.mark.parametrize("size", [{"keep": (0.8,)}, {"bits": 5.0}], ids=["ranks", "bits"])
def test_both_towers_are_compressed_and_the_whole_reloads(name: str, size: dict[str, object], tmp_path: Path) -> None:
    report = job(name, tmp_path, **size)
    changed = {layer.name.partition(".")[0] for layer in report.layers if layer.form != "dense"}
    assert changed == {"text_model", "vision_model"}
    shrunk = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    assert type(shrunk) is getattr(transformers, name)
    dense = getattr(transformers, name).from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        here, there = (model(**both(name)) for model in (shrunk, dense))
    for side in ("image_embeds", "text_embeds"):
        assert torch.cosine_similarity(getattr(here, side), getattr(there, side)).mean() > 0.8
    assert type(load(tmp_path / "out")) is type(shrunk)
    assert report.evaluation is not None
    assert report.evaluation.fidelity is not None
    assert 0 < (report.evaluation.fidelity.relative_error or 0) < 0.3


def refused(*arguments: str | Path) -> str:
    return " ".join(run(*arguments, code=2).split())


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return kinds.write("CLIPModel", tmp_path / "model")


@pytest.fixture
def small(clip: Path, tmp_path: Path) -> Path:
    run("compress", clip, tmp_path / "small", "--method", "svd", "--keep", "0.9", "--compensation", "none")
    return tmp_path / "small"


def compared(small: Path, clip: Path, data: Path, *flags: str | Path) -> Found:
    return evaluated(small, data, "--baseline", clip, "--batch-size", "8", *flags)


def test_pairs_are_scored_by_retrieval(small: Path, clip: Path, tmp_path: Path) -> None:
    captions = kinds.write_captions(tmp_path)
    found = compared(small, clip, captions)
    assert found["metric"] == "recall_at_1"
    assert set(found["dense"]) >= {"text_at_1", "text_at_5", "text_at_10", "image_at_1", "image_at_5", "image_at_10"}
    assert found["dense"]["text_at_1"] <= found["dense"]["text_at_5"] <= found["dense"]["text_at_10"]
    assert 0 < found["fidelity"]["relative_error"] < 0.5
    assert found["fidelity"]["pooled_cosine"] > 0.8
    said = json.loads(run("eval", clip, "--data", captions, "--json"))["warnings"]
    assert not [warning for warning in said if "without labels" in warning]  # captions are what counts


def test_a_folder_with_a_table_of_captions_is_as_good(small: Path, clip: Path, tmp_path: Path) -> None:
    table = kinds.write_captions(tmp_path, column="text")
    table.rename(tmp_path / "metadata.csv")
    named = compared(small, clip, tmp_path / "metadata.csv")
    assert compared(small, clip, tmp_path)["dense"] == named["dense"]


def test_classes_are_told_by_their_names(small: Path, clip: Path, tmp_path: Path) -> None:
    for name in ("a film", "that"):
        tiny.write_images(tmp_path / "data" / name, 6, seed=len(name))
    found = compared(small, clip, tmp_path / "data", "--template", "this is {}", "--template", "a {}")
    assert found["metric"] == "top1"
    assert {each["class"] for each in found["classes"]} == {"a film", "that"}
    assert found["fidelity"]["kl"] >= 0
    assert found["samples"] == 12


def test_without_captions_and_classes_vectors_are_compared(
    small: Path, clip: Path, flat_images: Path, text_file: Path
) -> None:
    found = compared(small, clip, flat_images, "--texts", text_file)
    assert found["metric"] is None
    assert found["fidelity"]["relative_error"] > 0
    assert "neighbor_agreement" in found["fidelity"]


def test_images_and_texts_need_not_be_pairs_to_calibrate_on(tmp_path: Path, flat_images: Path, text_file: Path) -> None:
    report = job("CLIPModel", tmp_path, calibration=str(flat_images), calibration_texts=str(text_file), keep=(0.9,))
    assert report.parameters.kept < 0.9
    with pytest.raises(DataError, match=r"without captions.*--calibration-texts FILE"):
        job("CLIPModel", tmp_path / "again", calibration=str(flat_images), keep=(0.9,))


def test_the_whole_is_rounded_inspected_and_written_dense(small: Path, clip: Path, tmp_path: Path) -> None:
    assert "reads images and texts" in run("inspect", clip)
    run("quantize", clip, tmp_path / "int8")
    run("verify", small)
    run("export", small, tmp_path / "dense", "--to", "dense")
    assert transformers.CLIPVisionModel.from_pretrained(tmp_path / "dense").config.model_type == "clip_vision_model"
    assert "pass --tower image or --tower text" in refused("export", small, tmp_path / "onnx", "--to", "onnx")
    tuned = refused("finetune", small, tmp_path / "tuned", "--teacher", clip, "--data", kinds.write_captions(tmp_path))
    assert "does not train" in tuned


def test_what_is_for_dual_encoders_alone_is_refused_elsewhere(vit_directory: Path, flat_images: Path) -> None:
    told = refused("eval", vit_directory, "--data", flat_images, "--template", "a {}")
    assert "--template works with CLIP and SigLIP" in told
    told = refused("eval", vit_directory, "--data", flat_images, "--template", "a photo")
    assert "has no {}" in told
    arguments = ("compress", vit_directory, "out", "--keep", "0.9", "--calibration", flat_images)
    assert "--calibration-texts works with CLIP" in refused(*arguments, "--calibration-texts", "lines.txt")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("compress", "--tokens", "merge", "--token-operations", "0.7"), "--tokens merge needs the positions of"),
        (("compress", "--keep", "0.9", "--resolution", "48"), "needs the positions of the patches"),
        (("compress", "--keep", "0.9", "--method", "qk-joint"), "choose a method for linear layers"),
        (("quantize", "--activations", "static"), "is for one tower"),
    ],
)
def test_what_two_towers_cannot_have_is_refused(
    arguments: tuple[str, ...], said: str, clip: Path, tmp_path: Path
) -> None:
    command, *flags = arguments
    data = ("--calibration", kinds.write_captions(tmp_path), "--samples", "8")
    assert said in refused(command, clip, tmp_path / "out", *flags, *data)


def test_a_bound_is_kept_on_the_vectors(clip: Path, tmp_path: Path) -> None:
    assert_a_bound_is_kept(clip, kinds.write_captions(tmp_path, 48), tmp_path / "out", "--max-error", 0.2)


@each_dual
@pytest.mark.parametrize("side", ["image", "text"])
def test_a_tower_is_exported_with_its_projection(name: str, side: str, tmp_path: Path) -> None:
    model = kinds.write(name, tmp_path / "model")
    run("compress", model, tmp_path / "small", "--method", "svd", "--keep", "0.9", "--compensation", "none")
    run("export", tmp_path / "small", tmp_path / "out", "--to", "torch", "--tower", side)
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    whole = transformers.AutoModel.from_pretrained(tmp_path / "small").eval()
    inputs = {key: rows for key, rows in both(name).items() if (key == "pixel_values") == (side == "image")}
    if side == "text":
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        given, expected = program(**inputs), getattr(whole, f"get_{side}_features")(**inputs).pooler_output
    found = given[f"{side}_embeds"] if name == "CLIPModel" else given["pooler_output"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"].endswith("_vision_model" if side == "image" else "_text_model")


@pytest.mark.slow
def test_an_exported_tower_is_evaluated(small: Path, flat_images: Path, tmp_path: Path) -> None:
    run("export", small, tmp_path / "out", "--to", "onnx", "--tower", "image")
    run("export", small, tmp_path / "dense", "--to", "dense", "--tower", "image")
    found = evaluated(tmp_path / "out", flat_images, "--baseline", tmp_path / "dense", "--batch-size", "8")
    assert found["fidelity"]["relative_error"] < 1e-6


def test_patches_of_images_of_any_shape_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"Siglip2Model.*NaFlex.*siglip2-base-patch16-224"):
        family_named("siglip2", "Siglip2Model", "config.json")


def vectors(*rows: tuple[float, float]) -> dict[str, Tensor]:
    return {"dense.pooled": torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float), dim=-1)}


def test_a_class_is_the_mean_of_its_prompts() -> None:
    images, prompts = vectors((1, 0), (0, 1)), vectors((1, 0.2), (1, -0.2), (0, 1))
    columns = of_classes(images, prompts, torch.tensor([0, 0, 1]), torch.tensor([0, 0]), 10.0)
    assert columns["dense.top1"].tolist() == [True, False]


def test_a_caption_is_found_by_any_image_that_has_it() -> None:
    images, texts = vectors((1, 0), (0, 1)), vectors((1, 0.1), (1, 0.2), (0.1, 1))
    columns = of_pairs(images, texts, [(0, 1), (0, 0), (1, 2), (1, 1)])
    assert columns["dense.texts_found"][:, 0].tolist() == [True, True, True, True]
    assert columns["dense.images_found"][:, 0].tolist() == [True, True, True, True]
    wrong = of_pairs(images, texts, [(0, 2), (1, 0)])
    assert wrong["dense.texts_found"][:, 0].tolist() == [False, False]
