"""Landmarks: attention maps of low rank, exact where patches of a window are alike, and part of the checkpoint."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from typer.testing import CliRunner

import vitshrink
from vitshrink.cli.app import app
from vitshrink.compression.quantization import quantized
from vitshrink.config.options import CompressConfig
from vitshrink.errors import CheckpointError, UsageError
from vitshrink.jobs.compress import CompressionResult, compress
from vitshrink.jobs.export import export
from vitshrink.models import cost
from vitshrink.models.loading import load_dense
from vitshrink.models.maps import approximate_maps, landmarks_of
from vitshrink.models.resolution import set_resolution
from vitshrink.models.structures import describe, read
from vitshrink.models.structures.landmarks import Landmarks, pseudo_inverse

Compressed = Callable[..., CompressionResult]
each_model = pytest.mark.parametrize("name", ["ViTForImageClassification", "DeiTForImageClassificationWithTeacher"])
each_form = pytest.mark.parametrize("form", ["pooled", "nystrom"])
CLASSIFIER = "ViTForImageClassification"


def approximated(model: PreTrainedModel, landmarks: int, form: str) -> PreTrainedModel:
    changed = copy.deepcopy(model)
    approximate_maps(changed, landmarks_of(changed, landmarks, form))
    return changed.eval()


def logits(model: nn.Module, pixels: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(pixels, **options).logits
    return found


@each_model
def test_a_landmark_for_every_patch_is_the_dense_model(name: str) -> None:
    pixels = tiny.inputs(name)["pixel_values"]
    model = tiny.build(name)
    torch.testing.assert_close(
        logits(approximated(model, 16, "pooled"), pixels), logits(model, pixels), rtol=1e-4, atol=1e-5
    )


@each_model
@each_form
def test_maps_are_kept_where_the_patches_of_a_window_are_alike(name: str, form: str) -> None:
    """Four 2 × 2 windows of equal patches: their keys are their mean, and the rank of a map is that of the means."""
    model = tiny.build(name)
    special = model.base_model.embeddings.position_embeddings.shape[1] - 16
    with torch.no_grad():
        plane = model.base_model.embeddings.position_embeddings[:, special:].view(1, 4, 4, -1)
        plane.copy_(plane[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2).clone())
    small = torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    pixels = small.repeat_interleave(16, 2).repeat_interleave(16, 3)
    kept = logits(approximated(model, 4, form), pixels)
    # the pseudo-inverse is that of six steps, of maps that are nearly singular
    tolerance = {"pooled": 1e-5, "nystrom": 0.05}[form]
    torch.testing.assert_close(kept, logits(model, pixels), rtol=tolerance, atol=tolerance)
    noise = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert (logits(approximated(model, 4, form), noise) - logits(model, noise)).abs().max() > 1e-2


def test_the_pseudo_inverse_is_one() -> None:
    maps = (5 * torch.eye(9) + 0.3 * torch.randn(2, 2, 9, 9, generator=torch.Generator().manual_seed(0))).softmax(-1)
    one_wanted_by_all = 0.4 * torch.eye(9)
    one_wanted_by_all[:, 0] += 0.6
    for each in (maps, one_wanted_by_all):
        torch.testing.assert_close(pseudo_inverse(each), torch.linalg.pinv(each), rtol=0.05, atol=0.05)


@each_model
@each_form
def test_results_reload_with_stock_calls(compressed: Compressed, name: str, form: str) -> None:
    result = compressed(name, landmarks=4, landmark_form=form, rank=None)
    assert result.directory is not None
    model = getattr(transformers, name).from_pretrained(result.directory).eval()
    pixels = tiny.inputs(name)["pixel_values"]
    assert torch.equal(logits(model, pixels), logits(vitshrink.load(result.directory), pixels))
    assert not torch.equal(logits(model, pixels), logits(tiny.build(name), pixels))
    assert result.report.parameters.kept == 1
    assert (result.report.macs.kept < 0.9) is (form == "pooled")
    assert result.report.evaluation is not None
    assert result.report.evaluation.fidelity.kl > 1e-9


@each_form
def test_low_rank_weights_and_integers_go_with_landmarks(compressed: Compressed, form: str) -> None:
    result = compressed(CLASSIFIER, method="svd", keep=(0.8,), landmarks=4, landmark_form=form)
    assert result.directory is not None
    assert result.report.parameters.kept <= 0.8
    model = transformers.ViTForImageClassification.from_pretrained(result.directory).eval()
    pixels = tiny.inputs(CLASSIFIER)["pixel_values"]
    assert torch.equal(logits(model, pixels), logits(vitshrink.load(result.directory), pixels))
    alone = compressed(CLASSIFIER, method="svd", keep=(0.8,))
    assert alone.directory is not None
    later = approximated(load_dense(alone.directory, allow_compressed=True).model, 4, form)
    torch.testing.assert_close(logits(later, pixels), logits(model, pixels))
    integers = quantized(approximated(tiny.build(CLASSIFIER), 4, form), 8, "none")
    expected = logits(approximated(tiny.build(CLASSIFIER), 4, form), pixels)
    torch.testing.assert_close(logits(integers, pixels), expected, rtol=0.1, atol=0.1)


@each_form
def test_without_vitshrink_a_shape_does_not_fit(form: str) -> None:
    dense = tiny.build(CLASSIFIER)
    there = approximated(dense, 4, form).state_dict()
    different = [key for key, tensor in dense.state_dict().items() if tensor.shape != there[key].shape]
    assert different == [f"vit.layers.{block}.attention.q_proj.weight" for block in (0, 1)]


@each_form
def test_landmarks_save_copy_cast_train_and_show_their_maps(compressed: Compressed, form: str, tmp_path: Path) -> None:
    directory = compressed(CLASSIFIER, landmarks=4, landmark_form=form, rank=None).directory
    model = transformers.ViTForImageClassification.from_pretrained(directory, attn_implementation="eager")
    inputs = tiny.inputs(CLASSIFIER)
    found = model.eval()(**inputs, output_attentions=True)
    assert [each.shape for each in found.attentions] == [(3, 2, 17, 17)] * 2
    for maps in found.attentions:
        assert torch.linalg.matrix_rank(maps, atol=1e-4).max() <= 5
        torch.testing.assert_close(maps.sum(-1), torch.ones(3, 2, 17), rtol=0.1, atol=0.1)
    fused = transformers.ViTForImageClassification.from_pretrained(directory).eval()
    torch.testing.assert_close(logits(fused, inputs["pixel_values"]), found.logits, rtol=1e-4, atol=1e-4)
    model.train()(**inputs, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.vit.layers.parameters())
    copy.deepcopy(model.eval()).save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(again, inputs["pixel_values"]), logits(fused, inputs["pixel_values"]))
    half = model.to(torch.bfloat16)
    with torch.no_grad():
        assert torch.isfinite(half(inputs["pixel_values"].bfloat16()).logits).all()


@pytest.mark.slow
@each_form
def test_landmarks_are_exported(compressed: Compressed, form: str, tmp_path: Path) -> None:
    directory = compressed(CLASSIFIER, landmarks=4, landmark_form=form, rank=None).directory
    assert export(str(directory), str(tmp_path / "program"), "torch").difference < 1e-4
    with pytest.raises(UsageError, match="use --to onnx"):
        export(str(directory), str(tmp_path / "dense"), "dense")


@each_form
def test_larger_images_have_larger_windows(form: str) -> None:
    model = copy.deepcopy(tiny.build(CLASSIFIER))
    set_resolution(model, 48)
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    at_48 = approximated(model, 4, form)
    native = approximated(tiny.build(CLASSIFIER), 4, form)
    torch.testing.assert_close(logits(native, pixels, interpolate_pos_encoding=True), logits(at_48, pixels))
    with pytest.raises(ValueError, match=r"4 landmarks are not possible: a grid of 5 × 5 patches"):
        logits(native, pixels[..., :40, :40], interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="30 patches are not a grid"):
        logits(native, pixels[..., :40], interpolate_pos_encoding=True)


def test_a_mask_is_refused() -> None:
    attention = approximated(tiny.build("ViTModel"), 4, "pooled").layers[0].attention
    with pytest.raises(ValueError, match="an attention mask cannot be used"):
        attention(torch.randn(2, 17, 32), torch.zeros(2, 1, 17, 17))


@pytest.mark.parametrize(("landmarks", "window"), [(1, (4, 6)), (4, (2, 3)), (6, (2, 2)), (12, (1, 2)), (24, (1, 1))])
def test_windows_are_as_square_as_they_can_be(landmarks: int, window: tuple[int, int]) -> None:
    assert Landmarks(landmarks).window((4, 6)) == window


def test_bad_use_is_named_before_any_work(
    vit_directory: Path, bert_directory: Path, flat_images: Path, text_file: Path, tmp_path: Path
) -> None:
    def job(model: Path = vit_directory, data: Path = flat_images, **entries: Any) -> None:
        compress(CompressConfig(str(model), str(tmp_path / "out"), **{"calibration": str(data), **entries}))

    for entries, message in (
        (
            {"landmarks": 7},
            "7 landmarks are not possible: a grid of 4 × 4 patches has equal windows for 1, 2, 4, 8, 16",
        ),
        ({"landmarks": 0}, "--landmarks 0: must be at least 1"),
        ({"landmarks": 4, "landmark_form": "svd"}, "--landmark-form svd: unknown. Available: pooled, nystrom"),
        ({"landmarks": 4, "model": bert_directory, "data": text_file}, "BertForSequenceClassification .* reads text"),
        ({"landmarks": 4, "tokens": "mixed", "token_budget": 10}, "--tokens mixed has no grid: choose one"),
        ({"landmark_form": "nystrom", "keep": (0.9,)}, "--landmark-form nystrom has no effect without"),
        ({"landmarks": 4, "max_kl": 0.1}, "which --landmarks does not change"),
        ({"landmarks": 4, "method": "qk-joint", "keep": (0.93,)}, "--method qk-joint both replace attentions"),
    ):
        with pytest.raises(UsageError, match=message):
            job(**entries)
    assert not (tmp_path / "out").exists()
    once = approximated(tiny.build(CLASSIFIER), 4, "pooled")
    with pytest.raises(UsageError, match="is a LandmarkViTAttention, not the dense model's attention"):
        landmarks_of(once, 4, "pooled")


def test_descriptions_read_back_and_damaged_ones_do_not() -> None:
    entry = {"structure": "landmarks", "landmarks": 4, "special": 1, "form": "pooled"}
    assert describe(read(entry)) == entry
    for damaged in (
        {**entry, "new": 1},
        {**entry, "landmarks": 0},
        {**entry, "form": "svd"},
        {"structure": "landmarks"},
    ):
        with pytest.raises(CheckpointError, match="for landmarks, special, and a form of pooled, nystrom"):
            read(damaged)
    attention = copy.deepcopy(tiny.build("ViTModel").layers[0].attention)
    with pytest.raises(CheckpointError, match="7 landmarks are not possible"):
        read({**entry, "landmarks": 7}).build(attention)
    assert not read(entry).fits(tiny.build("BertModel").encoder.layer[0].attention.self)


def test_eval_approximates_without_writing(vit_directory: Path, learned_images: Path) -> None:
    words = ["eval", str(vit_directory), "--baseline", str(vit_directory), "--data", str(learned_images), "--json"]
    exact = json.loads(CliRunner().invoke(app, words).stdout)
    found = json.loads(CliRunner().invoke(app, [*words, "--landmarks", "4"]).stdout)
    assert found["evaluation"]["fidelity"]["kl"] > 1e-6 > exact["evaluation"]["fidelity"]["kl"]
    assert found["macs"] < exact["macs"] == found["baseline_footprint"]["macs"]
    assert found["parameters"] == exact["parameters"] == cost.parameters(load_dense(vit_directory).model)
