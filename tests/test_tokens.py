"""Mixed-resolution tokens: a tree over every image, of as many patches as asked for."""

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
from vitshrink.config.options import CompressConfig, DataConfig
from vitshrink.data import Preprocessor
from vitshrink.errors import CheckpointError, UsageError
from vitshrink.evaluation.quality import Fidelity
from vitshrink.jobs.compress import CompressionResult, compress
from vitshrink.jobs.evaluate import evaluate_checkpoint
from vitshrink.models.resolution import mix_tokens, set_resolution
from vitshrink.models.structures import describe, read
from vitshrink.models.structures.tokens import MixedTokens, choose_leaves

Compressed = Callable[..., CompressionResult]
each_model = pytest.mark.parametrize("name", ["ViTForImageClassification", "DeiTForImageClassificationWithTeacher"])
CLASSIFIER = "ViTForImageClassification"


def mixed(name: str, budget: int, **options: Any) -> PreTrainedModel:
    model = copy.deepcopy(tiny.build(name))
    mix_tokens(model, MixedTokens(budget, **options))
    return model


def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(pixels).logits
    return found


@each_model
@pytest.mark.parametrize("scorer", ["blur", "features"])
def test_the_whole_grid_is_the_dense_model(name: str, scorer: str) -> None:
    """The order of the patches is another one, and an attention does not mind."""
    pixels = tiny.inputs(name)["pixel_values"]
    for levels in (2, 3):
        model = mixed(name, 16, levels=levels, scorer=scorer)
        torch.testing.assert_close(logits(model, pixels), logits(tiny.build(name), pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("budget", "levels", "tokens"), [(4, 2, 4), (8, 2, 7), (13, 2, 13), (1, 3, 1), (10, 3, 10)])
def test_every_image_gets_the_same_number_of_tokens(budget: int, levels: int, tokens: int) -> None:
    model = mixed("ViTModel", budget, levels=levels)
    with torch.no_grad():
        hidden = model(tiny.inputs("ViTModel", 5)["pixel_values"]).last_hidden_state
    assert hidden.shape == (5, 1 + tokens, 32)
    assert MixedTokens(budget, levels).tokens((4, 4)) == tokens


def test_the_leaves_are_a_tree_that_covers_the_image_once() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(6, 8, 8, generator=generator), torch.rand(6, 4, 4, generator=generator)]
    for splits in (0, 1, 7, 40, 80):
        leaves = choose_leaves(scores, splits)
        assert leaves.shape == (6, 16 + 3 * splits)
        area = torch.tensor([16.0] * 16 + [4.0] * 64 + [1.0] * 256)
        assert (area[leaves].sum(1) == 256).all()
        covered = torch.zeros(6, 16, 16)
        for image, row in enumerate(leaves):
            for index in row.tolist():
                side, start, columns = (4, 0, 4) if index < 16 else (2, 16, 8) if index < 80 else (1, 80, 16)
                y, x = divmod(index - start, columns)
                covered[image, y * side : (y + 1) * side, x * side : (x + 1) * side] += 1
        assert (covered == 1).all()


def test_pixels_beyond_the_last_patch_are_left_out_as_in_the_dense_model() -> None:
    dense = tiny.build("ViTModel", image_size=36)
    model = copy.deepcopy(dense)
    mix_tokens(model, MixedTokens(16))
    pixels = torch.randn(2, 3, 36, 36, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (each(pixels).last_hidden_state[:, 0] for each in (model, dense))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scorer", ["blur", "features"])
def test_detail_is_what_gets_small_patches(scorer: str) -> None:
    """Only the lower right quarter of the image is not flat: it, and no other, is split."""
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[..., 16:, 16:] = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    model = mixed("ViTModel", 7, scorer=scorer)
    model.embeddings.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        model(pixels)
    positions = tiny.build("ViTModel").embeddings.position_embeddings[0, 1:].view(4, 4, -1)
    small = seen[0][0, 4:]  # after the class token and three large patches
    projection = tiny.build("ViTModel").embeddings.patch_embeddings.projection
    expected = projection(pixels)[0].permute(1, 2, 0) + positions
    torch.testing.assert_close(small, expected[2:, 2:].reshape(4, -1), rtol=1e-4, atol=1e-5)
    large = seen[0][0, 1]  # the first large patch: flat, so the bias, at the mean of its positions
    torch.testing.assert_close(large, projection.bias + positions[:2, :2].mean((0, 1)), rtol=1e-4, atol=1e-5)


@each_model
@pytest.mark.parametrize("method", [None, "svd", "curvature", "heads-joint"])
def test_tokens_and_weights_go_together_and_reload(compressed: Compressed, name: str, method: str | None) -> None:
    entries: dict[str, Any] = {"rank": None} if method is None else {"method": method, "keep": (0.9,)}
    result = compressed(name, tokens="mixed", token_budget=10, **entries)
    assert result.directory is not None
    model = getattr(transformers, name).from_pretrained(result.directory).eval()
    pixels = tiny.inputs(name)["pixel_values"]
    assert torch.equal(logits(model, pixels), logits(vitshrink.load(result.directory), pixels))
    assert result.report.macs.kept < 0.8
    assert (result.report.parameters.kept == 1) is (method is None)
    assert result.report.evaluation is not None
    assert result.report.evaluation.fidelity.kl > 1e-9


def test_a_headless_model_is_compared_by_its_first_token(compressed: Compressed) -> None:
    result = compressed("ViTModel", tokens="mixed", token_budget=10, rank=None)
    assert result.report.evaluation is not None
    assert 0.2 < result.report.evaluation.fidelity.feature_cosine < 1


def test_mixed_tokens_train_save_again_and_cast(compressed: Compressed, tmp_path: Path) -> None:
    directory = compressed(CLASSIFIER, tokens="mixed", token_budget=10, rank=None).directory
    model = transformers.AutoModelForImageClassification.from_pretrained(directory)
    pixels = tiny.inputs(CLASSIFIER)["pixel_values"]
    model(pixels, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.vit.embeddings.parameters())
    model.eval().save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(again, pixels), logits(model, pixels))
    assert torch.isfinite(logits(again.to(torch.bfloat16), pixels.bfloat16())).all()
    larger = again.float()(torch.randn(2, 3, 48, 48), interpolate_pos_encoding=True).logits
    assert torch.isfinite(larger).all()
    with pytest.raises(ValueError, match=r"a budget of 10 patches is not possible.* 16 to 64"):
        again(torch.randn(2, 3, 64, 64), interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="pass interpolate_pos_encoding=True"):
        again(torch.randn(2, 3, 64, 64))
    with pytest.raises(ValueError, match="an attention mask cannot be used"):
        again.vit(pixels, bool_masked_pos=torch.zeros(3, 16, dtype=torch.bool))


def test_another_resolution_is_that_of_interpolated_positions_and_is_kept(compressed: Compressed) -> None:
    model = copy.deepcopy(tiny.build(CLASSIFIER))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model(pixels, interpolate_pos_encoding=True).logits
    set_resolution(model, 64)
    torch.testing.assert_close(logits(model, pixels), wanted)
    result = compressed(CLASSIFIER, method="svd", resolution=64, tokens="mixed", token_budget=40)
    assert result.directory is not None
    assert transformers.AutoConfig.from_pretrained(result.directory).image_size == 64
    assert Preprocessor.from_checkpoint(result.directory, "image").description["size"] == {"height": 64, "width": 64}
    found = logits(vitshrink.load(result.directory), pixels)
    assert torch.isfinite(found).all()


def test_evaluation_takes_tokens_and_resolution(vit_directory: Path, flat_images: Path) -> None:
    def fidelity(**options: Any) -> Fidelity:
        found = evaluate_checkpoint(
            str(vit_directory), DataConfig(str(flat_images)), baseline=str(vit_directory), **options
        ).measurement.evaluation.fidelity
        assert found is not None
        return found

    assert fidelity(tokens=MixedTokens(16)).kl < 1e-9 < fidelity(tokens=MixedTokens(7)).kl
    assert fidelity(resolution=64).kl < 1e-12  # both models at it
    line = f"eval {vit_directory} --data {flat_images} --baseline {vit_directory} --json"
    result = CliRunner().invoke(app, f"{line} --tokens mixed --token-budget 7 --token-scorer features".split())
    assert json.loads(result.stdout)["evaluation"]["fidelity"]["kl"] > 1e-9


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"token_budget": 3}, "allows 4 to 16"),
        ({"token_budget": 17}, "allows 4 to 16"),
        ({"token_budget": 10, "token_levels": 4}, "a grid that 8 divides, not 4 × 4"),
        ({"token_budget": 10, "token_levels": 1}, "2 or more"),
        ({"token_budget": 10, "token_scorer": "entropy"}, "--token-scorer entropy: unknown"),
        ({"token_budget": None}, "need each other"),
        ({"tokens": "all", "token_budget": 10}, "need each other"),
        ({"tokens": "some"}, "--tokens some"),
        ({"tokens": "all", "token_levels": 3, "keep": (0.5,)}, "--token-levels 3 has no effect without"),
        ({"tokens": "all", "token_scorer": "features", "keep": (0.5,)}, "--token-scorer features has no effect"),
        ({"token_budget": 10, "max_kl": 0.1, "calibration": "x"}, "pass a size"),
        ({"token_budget": 10, "resolution": 30}, "multiple of the patch size, 8"),
    ],
)
def test_bad_use_is_named(vit_directory: Path, tmp_path: Path, entries: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compress(CompressConfig(str(vit_directory), str(tmp_path / "out"), **({"tokens": "mixed"} | entries)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entries", "own"), [({"tokens": "mixed", "token_budget": 7}, "mixed tokens"), ({"landmarks": 4}, "landmarks")]
)
def test_a_model_with_tokens_or_landmarks_takes_no_others(
    compressed: Compressed, flat_images: Path, entries: dict[str, Any], own: str
) -> None:
    """They were chosen for its grid of patches, and nothing crashes over it in the middle of an evaluation."""
    directory, data = str(compressed(CLASSIFIER, **entries).directory), DataConfig(str(flat_images))
    with pytest.raises(UsageError, match="--tokens mixed"):
        evaluate_checkpoint(directory, data, tokens=MixedTokens(10))
    with pytest.raises(UsageError, match=f"the {own} of this model belong to 32 pixels"):
        evaluate_checkpoint(directory, data, resolution=64)


def test_text_has_no_patches(bert_directory: Path, tmp_path: Path) -> None:
    for entries in ({"tokens": "mixed", "token_budget": 9}, {"resolution": 64, "keep": (0.8,), "method": "svd"}):
        with pytest.raises(UsageError, match=r"BertForSequenceClassification .* reads text"):
            compress(CompressConfig(str(bert_directory), str(tmp_path / "out"), **entries))


def test_descriptions_read_back_and_damaged_ones_do_not() -> None:
    tokens = MixedTokens(40, 3, "features")
    assert read(describe(tokens)) == tokens
    for damage in ({"budget": 0}, {"levels": "2"}, {"scorer": "none"}, {"new": 1}):
        with pytest.raises(CheckpointError, match="for budget, levels, and a scorer of blur, features"):
            read(describe(tokens) | damage)


def test_without_vitshrink_the_positions_do_not_fit() -> None:
    dense, changed = tiny.build(CLASSIFIER).state_dict(), mixed(CLASSIFIER, 7).state_dict()
    assert dense.keys() == changed.keys()
    name = "vit.embeddings.position_embeddings"
    assert dense[name].shape == (1, *changed[name].shape)
