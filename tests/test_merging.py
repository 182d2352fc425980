"""Merged tokens: patches that are alike become one, as many in every block as loses least for a price."""

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

import vitshrink
from vitshrink.compression.merging import choices_of, fitted_curve
from vitshrink.compression.repairs.merging import shift_merged
from vitshrink.config.options import CompressConfig, EvalJob, FinetuneConfig
from vitshrink.data.batches import Batch
from vitshrink.errors import CheckpointError, UsageError
from vitshrink.jobs.compress import CompressionResult, compress
from vitshrink.jobs.export import export
from vitshrink.models import cost
from vitshrink.models.example import example_inputs
from vitshrink.models.exported import load_exported
from vitshrink.models.maps import landmarks_of
from vitshrink.models.merged import Operations, merge_tokens, special_tokens, tokens_of
from vitshrink.models.resolution import mix_tokens, set_resolution
from vitshrink.models.structures import describe, read
from vitshrink.models.structures.merging import MergedTokens, merge, pair
from vitshrink.models.structures.tokens import MixedTokens
from vitshrink.recovery.techniques.recomputation import recomputed_activations
from vitshrink.runtime.observer import Job, Silent
from vitshrink.statistics.reference import DenseOutputs

Compressed = Callable[..., CompressionResult]
VIT, DEIT = "ViTForImageClassification", "DeiTForImageClassificationWithTeacher"
each_model = pytest.mark.parametrize("name", [VIT, DEIT])
MERGE: dict[str, Any] = {"tokens": "merge", "token_operations": 0.7}


def merged(name: str, *gone: int) -> PreTrainedModel:
    """A tiny model whose blocks merge so many patches, the last of them all where it is -1."""
    model = copy.deepcopy(tiny.build(name))
    tokens, kept = tokens_of(model), []
    for number in gone:
        tokens = special_tokens(model) if number < 0 else tokens - number
        kept.append(tokens)
    merge_tokens(model, tuple(kept))
    return model


def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(pixels).logits
    return found


def test_the_most_similar_are_paired() -> None:
    keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 0.9], [0.9, 0.2], [0.5, 0.5]]])
    sources, others = pair(keys, torch.ones(1, 5), 2)
    assert (sources.tolist(), others.tolist()) == ([[2, 0]], [[1, 3]])
    noticed = torch.tensor([[1.0, 9.0, 100.0, 9.0, 1.0]])  # only the first of a pair counts
    assert pair(keys, noticed, 1)[0].tolist() == [[0]]


def test_merged_tokens_are_weighted_means_in_their_order() -> None:
    x = torch.tensor([[[7.0], [1.0], [2.0], [3.0], [4.0]]])
    sizes = torch.tensor([[[1.0], [1.0], [3.0], [1.0], [1.0]]])
    weights = torch.tensor([[1.0, 3.0, 1.0, 1.0]])
    found, standing = merge(x, sizes, weights, torch.tensor([[0]]), torch.tensor([[1]]))
    assert found.flatten().tolist() == [7.0, 1.75, 3.0, 4.0]
    assert standing.flatten().tolist() == [1.0, 4.0, 1.0, 1.0]


@each_model
def test_equal_patches_merge_for_nothing(name: str) -> None:
    """A token that stands for several counts as often in attention; special tokens are what they were."""
    model = copy.deepcopy(tiny.build(name))
    with torch.no_grad():  # all patches alike: positions that differ would tell them apart
        model.base_model.embeddings.position_embeddings[:, special_tokens(model) :] = 0.1
    pixels = torch.full((2, 3, 32, 32), 0.3)
    fewer = copy.deepcopy(model)
    tokens = tokens_of(model)
    merge_tokens(fewer, (tokens - 7, tokens - 11))
    torch.testing.assert_close(logits(fewer, pixels), logits(model, pixels), rtol=1e-4, atol=1e-5)


@each_model
def test_patches_that_no_head_reads_are_given_up_for_nothing(name: str) -> None:
    pixels = tiny.inputs(name)["pixel_values"]
    model = merged(name, 0, -1)
    torch.testing.assert_close(logits(model, pixels), logits(tiny.build(name), pixels), rtol=1e-4, atol=1e-5)
    assert cost.macs(model, example_inputs(model)) < 0.8 * cost.macs(tiny.build(name), example_inputs(model))


@each_model
@pytest.mark.parametrize("gone", [(0, 0), (3, 2), (0, 4), (8, 4), (5, -1), (0, -1)])
def test_the_price_is_what_the_operations_are_counted_as(name: str, gone: tuple[int, int]) -> None:
    model = merged(name, *gone)
    tokens = tokens_of(model)
    kept = (tokens - gone[0], special_tokens(model) if gone[1] < 0 else tokens - sum(gone))
    counted = cost.macs(model, example_inputs(model))
    assert Operations.of(tiny.build(name)).total(tokens, kept) == counted


def test_curves_go_through_what_follows_their_law_and_are_convex() -> None:
    gone = [1, 2, 4, 7, 10]
    measured = [0.5 * (x / 20) ** 1.5 * 2.718281828 ** (2 * x / 20) for x in gone]
    curve = fitted_curve(gone, measured, 20)
    assert curve[0] == 0
    assert curve[gone].tolist() == pytest.approx(measured, rel=1e-6)
    noisy = fitted_curve(gone, [1e-9, 0.0, 3e-5, 2e-5, 1e-4], 20)
    assert (noisy.diff().diff() >= -1e-12).all()


def test_merging_is_spent_where_it_loses_least() -> None:
    cheap, dear = torch.arange(9).double() ** 2 * 1e-3, torch.arange(9).double() ** 2
    choices = choices_of([dear, cheap, dear], lambda had, has: had + has, 1, ends=False)
    whole = choices.price((9, 9, 9))
    assert choices.within(whole) == (9, 9, 9)
    assert choices.within(whole - 3) == (9, 8, 8)
    found = choices.within(whole - 8)
    assert found is not None
    assert found[0] == 9
    assert choices.price(found) <= whole - 8
    assert choices.within(0) is None


@each_model
@pytest.mark.parametrize("method", [None, "svd", "heads-joint"])
def test_a_job_merges_within_its_budget_and_reloads(compressed: Compressed, name: str, method: str | None) -> None:
    entries: dict[str, Any] = {"rank": None} if method is None else {"method": method, "keep": (0.9,)}
    result = compressed(name, **MERGE, **entries)
    assert result.directory is not None
    model = getattr(transformers, name).from_pretrained(result.directory).eval()
    pixels = tiny.inputs(name)["pixel_values"]
    assert torch.equal(logits(model, pixels), logits(vitshrink.load(result.directory), pixels))
    report = result.report
    assert report.macs.kept <= 0.7
    assert (report.parameters.kept == 1) is (method is None)
    assert report.tokens is not None
    assert report.tokens[-1].kept == special_tokens(model)
    assert all(each.tokens >= each.kept and each.macs > 0 for each in report.tokens)
    assert "Tokens, block by block" in (result.directory / "report.md").read_text()


@pytest.mark.parametrize("entries", [{"quantize": "int8", "method": "svd"}, {"target_size": "52kB"}])
def test_integers_go_with_merged_tokens(compressed: Compressed, entries: dict[str, Any]) -> None:
    entries = {"rank": None} | entries if "target_size" in entries else entries
    result = compressed(VIT, **MERGE, **entries)
    pixels = tiny.inputs(VIT)["pixel_values"]
    assert torch.isfinite(logits(vitshrink.load(str(result.directory)), pixels)).all()
    assert result.report.macs.kept < 0.8


def test_a_headless_model_keeps_some_patches(compressed: Compressed) -> None:
    result = compressed("ViTModel", **MERGE, rank=None)
    assert result.report.tokens is not None
    assert result.report.tokens[-1].kept > 1
    assert result.report.evaluation is not None
    assert 0.2 < result.report.evaluation.fidelity.feature_cosine < 1


def test_merged_tokens_train_cast_and_save_again(compressed: Compressed, tmp_path: Path) -> None:
    directory = compressed(VIT, **MERGE, rank=None).directory
    model = transformers.AutoModelForImageClassification.from_pretrained(directory)
    pixels = tiny.inputs(VIT)["pixel_values"]
    with recomputed_activations(model):
        model.train()(pixels, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval().save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(again, pixels), logits(model, pixels))
    assert torch.isfinite(logits(again.to(torch.bfloat16), pixels.bfloat16())).all()
    with pytest.raises(ValueError, match="65 tokens reach a block that merges 17"):
        again.float()(torch.randn(2, 3, 64, 64), interpolate_pos_encoding=True)


@pytest.mark.parametrize("gone", [(3, 2), pytest.param((6, -1), marks=pytest.mark.slow)])
def test_merged_tokens_become_onnx(gone: tuple[int, int], checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = merged(VIT, *gone)
    model.save_pretrained(tmp_path / "model")
    for file in checkpoint(VIT).glob("preprocessor*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    found = export(str(tmp_path / "model"), str(tmp_path / "out"), "onnx")
    exported = load_exported(found.directory / "model.onnx").model
    pixels = tiny.inputs(VIT, 5)["pixel_values"]
    for batch in (pixels, pixels[:1]):
        torch.testing.assert_close(exported(pixel_values=batch).logits, logits(model, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_recovery_trains_merged_tokens(compressed: Compressed) -> None:
    result = compressed(VIT, **MERGE, rank=None, finetune=FinetuneConfig("distill", epochs=1, patience=1))
    assert result.report.recovery is not None
    assert result.report.macs.kept <= 0.7


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"token_operations": None}, "need each other"),
        ({"tokens": "all"}, "need each other"),
        ({"token_operations": 1.5}, "above 0 and below 1"),
        ({"token_operations": 0.05}, r"cannot be reached.* fraction is 0\.\d\d"),
        ({"calibration": None}, "pass --calibration"),
        ({"landmarks": 4}, "--tokens merge has no grid"),
        ({"attention": "flash_attention_2"}, "use --attention sdpa"),
        ({"max_kl": 0.1}, "pass a size"),
        ({"finetune": {"objective": "distill", "blockwise": 1}}, "merged tokens: remove"),
        ({"finetune": {"objective": "distill", "bdia": True}}, "the same number of tokens in every block"),
    ],
)
def test_bad_use_is_named(
    vit_directory: Path, flat_images: Path, tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    job = MERGE | {"model": str(vit_directory), "output": str(tmp_path / "out"), "calibration": str(flat_images)}
    entries = {name: value for name, value in (job | entries).items() if value is not None}
    with pytest.raises(UsageError, match=message):
        compress(CompressConfig.from_mapping(entries))
    assert not (tmp_path / "out").exists()


def test_text_is_not_merged_and_eval_measures_nothing(bert_directory: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--tokens merge .* reads text"):
        compress(CompressConfig(str(bert_directory), str(tmp_path / "out"), calibration=str(text_file), **MERGE))
    with pytest.raises(UsageError, match="vitshrink compress"):
        EvalJob(model="m", data="d", **MERGE)


def test_a_model_with_merged_tokens_takes_no_others() -> None:
    model = merged(VIT, 3, 2)
    for change in (
        lambda: mix_tokens(model, MixedTokens(10)),
        lambda: set_resolution(model, 64),
        lambda: landmarks_of(model, 4, "pooled"),
    ):
        with pytest.raises(UsageError, match=r"merged tokens|other tokens"):
            change()


def test_descriptions_read_back_and_damaged_ones_do_not() -> None:
    tokens = MergedTokens(17, 12, 1, "tokens", "sizes")
    assert read(describe(tokens)) == tokens
    for damage in ({"kept": 0}, {"reads": "nothing"}, {"new": 1}):
        with pytest.raises(CheckpointError, match="for kept, special, tokens"):
            read(describe(tokens) | damage)
    with pytest.raises(CheckpointError, match="cannot merge 17 tokens to 5"):
        MergedTokens(17, 5).build(copy.deepcopy(tiny.build(VIT)).vit.layers[0])


def test_without_vitshrink_a_weight_does_not_fit(tmp_path: Path) -> None:
    dense, changed = tiny.build(VIT).state_dict(), merged(VIT, 0, 2).state_dict()
    assert dense.keys() == changed.keys()
    name = "vit.layers.1.layernorm_after.weight"
    assert changed[name].shape == (1, 1, *dense[name].shape)
    merged(VIT, 0, 2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert list(config["layers"]) == ["layers.1"]


def test_biases_make_up_for_merging() -> None:
    dense, model = tiny.build(VIT).eval(), merged(VIT, 8, -1).eval()
    before = {name: each.clone() for name, each in model.named_parameters()}
    batches = [Batch(tiny.inputs(VIT, 32, seed), None, [0] * 32, list(map(str, range(32)))) for seed in range(8)]
    fresh = tiny.inputs(VIT, 64, 99)["pixel_values"]
    wanted = logits(dense, fresh).softmax(-1)

    def lost() -> float:
        return float(nn.functional.kl_div(logits(model, fresh).log_softmax(-1), wanted, reduction="batchmean"))

    loss = lost()
    shift_merged(model, DenseOutputs(dense), batches, Job(Silent()), seed=0)
    changed = {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}
    assert changed
    assert all(name.endswith(".bias") for name in changed)
    assert lost() < 0.9 * loss


def test_outputs_of_other_tokens_are_not_fitted() -> None:
    dense, model = tiny.build("ViTModel"), merged("ViTModel", 4, 0)
    before = copy.deepcopy(model.state_dict())
    batch = Batch(tiny.inputs("ViTModel", 4), None, [0] * 4, list("abcd"))
    shift_merged(model, DenseOutputs(dense), [batch], Job(Silent()), seed=0)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
