"""Configs that are valid JSON and mean harm, or just something unusual."""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vitshrink
from vitshrink.config.options import CompressConfig, DataConfig, FinetuneConfig
from vitshrink.data import Preprocessor, open_samples
from vitshrink.errors import CheckpointError, UsageError
from vitshrink.jobs.compress import compress
from vitshrink.jobs.evaluate import evaluate_checkpoint
from vitshrink.models.loading import load_dense


def change_json(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.fixture
def changed(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    def change(name: str = "ViTForImageClassification", **entries: Any) -> Path:
        directory = Path(shutil.copytree(checkpoint(name), tmp_path / "changed"))
        change_json(directory / "config.json", **entries)
        return directory

    return change


@pytest.mark.parametrize(
    "entries",
    [
        {"hidden_size": 60_000},
        {"hidden_size": 2 * 10**9},
        {"intermediate_size": 10**9},
        {"image_size": 10**6},
        {"patch_size": 20_000, "image_size": 20_000},
        {"num_labels": 10**9},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 10**12},
    ],
    ids=lambda entries: next(iter(entries)),
)
def test_a_huge_number_takes_no_memory(entries: dict[str, Any], changed: Callable[..., Path]) -> None:
    directory = changed(**entries)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"config\.json|cannot load"):
        load_dense(directory)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 500, f"{grown:.0f} MiB"


def test_a_huge_vocabulary_takes_no_memory(changed: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="word_embeddings"):
        load_dense(changed("BertForSequenceClassification", vocab_size=10**10))


@pytest.mark.parametrize("entry", ["return_dict", "output_hidden_states", "output_attentions", "torchscript"])
@pytest.mark.parametrize("method", ["svd", "curvature"])
def test_models_that_give_their_outputs_otherwise_are_compressed_alike(
    entry: str,
    method: str,
    changed: Callable[..., Path],
    vit_directory: Path,
    flat_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vitshrink.report.figures.available", lambda: False)
    flags: dict[str, Any] = {"method": method, "keep": (0.7,), "calibration": str(flat_images)}
    flags |= {"samples": 8, "holdout": 4, "refine": 0}
    unusual = changed(**{entry: entry != "return_dict"})
    weights = []
    for number, model in enumerate((vit_directory, unusual)):
        compress(CompressConfig(str(model), str(tmp_path / f"out-{number}"), **flags))
        weights.append(load_file(tmp_path / f"out-{number}" / "model.safetensors"))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 8])
def test_texts_are_no_longer_cut_into_chunks(
    size: int, changed: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitshrink.report.figures.available", lambda: False)
    directory = changed("BertForSequenceClassification", chunk_size_feed_forward=size)
    flags: dict[str, Any] = {"keep": (0.8,), "samples": 16, "holdout": 8, "refine": 0}
    (result,) = compress(CompressConfig(str(directory), str(tmp_path / "out"), calibration=str(text_file), **flags))
    assert any(f"chunk_size_feed_forward {size} was switched off" in note for note in result.report.warnings)
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get("chunk_size_feed_forward", 0) == 0


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"is_decoder": True}, r"config\.json has is_decoder.*encoders"),
        ({"add_cross_attention": True}, "has add_cross_attention"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'.*'absolute'"),
        ({"hidden_act": "nope"}, "hidden_act 'nope', which is not one of gelu"),
        ({"hidden_act": []}, r"hidden_act \[\], which is not one of gelu"),
        ({"problem_type": "nope"}, "problem_type 'nope', which is not one of regression, "),
        ({"layer_norm_eps": "1e-6"}, "'layer_norm_eps' expected float, got str"),
        ({"type_vocab_size": 0}, "token_type_embeddings.weight .*is empty"),
        ({"tie_word_embeddings": False}, "no weights for cls.*tie_word_embeddings false"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_computed_as_it_was_trained_is_refused(
    entries: dict[str, Any], message: str, changed: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_dense(changed("BertForMaskedLM", **entries))
    assert "\n" not in str(caught.value)


def test_an_image_has_two_sides(changed: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"image_size \[32, 32, 3\]: give the height and the width"):
        load_dense(changed(image_size=[32, 32, 3]))


def test_a_saved_attention_implementation_does_not_stand_in_the_way_of_the_tokenizer(
    changed: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitshrink.report.figures.available", lambda: False)
    directory = changed("BertForSequenceClassification", output_attentions=True, _attn_implementation="sdpa")
    config = CompressConfig(
        str(directory), str(tmp_path / "out"), keep=(0.8,), calibration=str(text_file), method="svd", holdout=8
    )
    assert compress(config)[0].report.evaluation is not None


@pytest.mark.parametrize("samples", ["one", "the same again and again"])
def test_one_sample_is_enough_and_so_are_copies_of_it(
    samples: str, vit_directory: Path, flat_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitshrink.report.figures.available", lambda: False)
    (tmp_path / "images").mkdir()
    for number in range(1 if samples == "one" else 6):
        shutil.copy(flat_images / "000.png", tmp_path / "images" / f"{number}.png")
    config = CompressConfig(
        str(vit_directory), str(tmp_path / "out"), keep=(0.6,), calibration=str(tmp_path / "images"), samples=4
    )
    (result,) = compress(config)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(tmp_path / "out" / "model.safetensors").values())
    assert any("samples" in warning for warning in result.report.warnings) == (samples == "one")


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_gray_and_transparent_images_are_read_as_the_model_takes_them(
    channels: int, mode: str, flat_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitshrink.report.figures.available", lambda: False)
    directory = tiny.write("ViTForImageClassification", tmp_path / "vit", num_channels=channels)
    config = CompressConfig(
        str(directory), str(tmp_path / "out"), keep=(0.8,), calibration=str(flat_images), samples=8, holdout=4, refine=0
    )
    (result,) = compress(config)
    assert result.report.evaluation is not None
    preprocessor = Preprocessor.from_checkpoint(tmp_path / "out", "image")
    (batch, *_) = preprocessor.batches(open_samples(flat_images, "image"), 4)
    with Image.open(flat_images / "000.png") as image:
        expected = preprocessor.processor(image.convert(mode), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(batch.inputs["pixel_values"][0], expected)


def test_other_channels_need_ready_batches(flat_images: Path, tmp_path: Path) -> None:
    directory = tiny.write("ViTForImageClassification", tmp_path / "vit", num_channels=2)
    config = CompressConfig(str(directory), str(tmp_path / "out"), keep=(0.8,), calibration=str(flat_images))
    with pytest.raises(UsageError, match=r"images with 2 channels.*ready batches"):
        compress(config)
    small = vitshrink.compress(
        load_dense(directory).model, torch.randn(12, 2, 32, 32), keep=0.8, samples=8, holdout=4, refine=0
    )
    assert small.report.evaluation is not None


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"size": {"height": 48, "width": 48}}, r"makes images of 3 × 48 × 48, but the model takes 3 × 32 × 32"),
        ({"do_center_crop": True, "crop_size": {"height": 24, "width": 24}}, "3 × 24 × 24.*crop_size in preproc"),
        ({"image_mean": [0.5], "image_std": [0.5]}, r"image with 3 channels.*image_mean and image_std"),
        ({"size": {"shortest_edge": 32}}, r"3 × 32 × \d+ of \d+\.png.*size as height and width"),
        ({"do_resize": False}, r"3 × \d+ × \d+ of \d+\.png.*set do_resize"),
    ],
)
def test_an_image_processor_of_another_model_is_refused_before_the_work(
    entries: dict[str, Any], message: str, changed: Callable[..., Path], flat_images: Path, tmp_path: Path
) -> None:
    directory = changed()
    change_json(directory / "preprocessor_config.json", **entries)
    config = CompressConfig(str(directory), str(tmp_path / "out"), keep=(0.8,), calibration=str(flat_images))
    with pytest.raises(CheckpointError, match=message):
        compress(config)


def test_images_that_are_not_resized_may_have_the_models_size(changed: Callable[..., Path], tmp_path: Path) -> None:
    directory = changed()
    change_json(directory / "preprocessor_config.json", do_resize=False)
    for number in range(8):
        Image.effect_noise((32, 32), 20 + number).convert("RGB").save(tmp_path / f"{number}.png")
    preprocessor = Preprocessor.from_checkpoint(directory, "image")
    (batch,) = preprocessor.batches(open_samples(tmp_path, "image"), 8)
    assert batch.inputs["pixel_values"].shape == (8, 3, 32, 32)


def test_sides_may_be_given_as_pairs(
    flat_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vit_directory: Path
) -> None:
    """By every part of a job that asks for them: block-wise training, landmarks, the baseline of an evaluation."""
    monkeypatch.setattr("vitshrink.report.figures.available", lambda: False)
    name, pairs = "ViTForImageClassification", {"image_size": [32, 32], "patch_size": [8, 8]}
    directory = tiny.write(name, tmp_path / "vit", **pairs)
    config = CompressConfig(
        str(directory),
        str(tmp_path / "out"),
        keep=(0.8,),
        method="svd",
        landmarks=4,
        calibration=str(flat_images),
        samples=16,
        holdout=4,
        finetune=FinetuneConfig(epochs=1, blockwise=1, batch_size=4),
    )
    compress(config)
    assessed = evaluate_checkpoint(str(tmp_path / "out"), DataConfig(str(flat_images)), baseline=str(vit_directory))
    assert assessed.measurement.evaluation.fidelity is not None


def test_a_resolution_is_for_square_images(flat_images: Path, tmp_path: Path) -> None:
    directory = tiny.write("ViTForImageClassification", tmp_path / "vit", image_size=[32, 64])
    flags: dict[str, Any] = {"calibration": str(flat_images), "keep": (0.8,), "method": "svd"}
    with pytest.raises(UsageError, match=r"--resolution 64 .* square images, but this model takes 32 × 64"):
        compress(CompressConfig(str(directory), str(tmp_path / "out"), resolution=64, **flags))


def test_a_checkpoint_of_another_process_that_is_being_written_is_refused(vit_directory: Path, tmp_path: Path) -> None:
    """Half a file, as a copy that is still under way leaves it."""
    directory = Path(shutil.copytree(vit_directory, tmp_path / "half"))
    blob = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(blob[: len(blob) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_dense(directory)


@pytest.mark.slow
def test_a_python_file_in_a_checkpoint_is_never_run(changed: Callable[..., Path], tmp_path: Path) -> None:
    directory = changed()
    mark = tmp_path / "run"
    for name in ("modeling_vit.py", "configuration_vit.py", "sitecustomize.py", "__init__.py"):
        (directory / name).write_text(f"open({str(mark)!r}, 'w')")
    program = f"from vitshrink import load; load({str(directory)!r})"
    root = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r}); {program}"], check=True)
    assert not mark.exists()


def test_a_tensor_of_nothing_is_no_crash(vit_directory: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(vit_directory, tmp_path / "empty"))
    tensors = load_file(directory / "model.safetensors")
    tensors["classifier.weight"] = torch.zeros(0, 32)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"classifier\.weight"):
        load_dense(directory)
