"""Tensors of several blocks: stored once, in the first, and read by the attentions that follow it."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors import safe_open
from test_attention_methods import compression, outputs
from torch import Tensor, nn
from transformers import PreTrainedModel

import vitshrink
from vitshrink.compression.attention_estimation import AttentionEstimator
from vitshrink.compression.attentions import attentions_of
from vitshrink.compression.choices import Choices
from vitshrink.config.options import FinetuneConfig
from vitshrink.data import Preprocessor, open_samples
from vitshrink.errors import CheckpointError, OutputError
from vitshrink.jobs.compress import CompressionResult
from vitshrink.jobs.export import export
from vitshrink.models import cost
from vitshrink.models.structures import describe, read
from vitshrink.models.structures.following import Following, FollowingAttention, borrowed_parameters
from vitshrink.models.structures.tensor import TensorAttention, TensorProjection
from vitshrink.models.targets import blocks_of, find_targets
from vitshrink.recovery import Material, recover
from vitshrink.recovery.techniques.reversible import bidirectional
from vitshrink.runtime.observer import Job, Silent

Compressed = Callable[..., CompressionResult]
CLASSIFIER = "ViTForImageClassification"
NAMES = (CLASSIFIER, "DeiTForImageClassificationWithTeacher", "BertForMaskedLM")
each_form = pytest.mark.parametrize("form", ["tucker", "cp", "tt"])


def stacked(compressed: Compressed, name: str = CLASSIFIER, form: str = "tucker") -> CompressionResult:
    return compressed(name, method="tensor", options={"form": form, "blocks": 2}, keep=(0.9,))


def in_memory(form: str = "tucker") -> PreTrainedModel:
    found = compression(tiny.build(CLASSIFIER), CLASSIFIER, "tensor", options={"form": form, "blocks": 2})
    findings = found.learn(Job(Silent()))
    return found.build(findings, {unit.name: unit.nearest(12) for unit in found.offers()}, Job(Silent())).eval()


def attentions(model: nn.Module) -> tuple[TensorAttention, FollowingAttention]:
    (first,) = [module for module in model.modules() if isinstance(module, TensorAttention)]
    (second,) = [module for module in model.modules() if isinstance(module, FollowingAttention)]
    return first, second


@each_form
@pytest.mark.parametrize("name", NAMES)
def test_a_stack_is_stored_once_and_reloads_with_stock_calls(compressed: Compressed, name: str, form: str) -> None:
    result = stacked(compressed, name, form)
    assert result.directory is not None
    with safe_open(result.directory / "model.safetensors", "pt") as file:
        assert sum(key.endswith(".inputs") for key in file.keys()) == 1  # noqa: SIM118
    model = getattr(transformers, name).from_pretrained(result.directory).eval()
    assert attentions(model)[1].source is attentions(model)[0]
    report = result.report
    assert report.parameters.compressed == cost.parameters(model) <= 0.9 * report.parameters.dense
    assert cost.stored_bytes(model) == 4 * report.parameters.compressed
    assert torch.equal(outputs(model, name), outputs(vitshrink.load(result.directory), name))
    (entry,) = [entry for entry in report.layers if entry.name.endswith(":qkv of 2 blocks")]
    assert entry.shape == (2 * 3 * 32, 32)
    changed = sum(entry.shape[0] * entry.shape[1] - entry.parameters for entry in report.layers)
    assert changed == report.parameters.dense - report.parameters.compressed


@each_form
def test_the_loss_of_a_stack_is_the_error_of_each_block_on_its_own_inputs(form: str) -> None:
    model = tiny.build(CLASSIFIER)
    found = compression(model, CLASSIFIER, "tensor", options={"form": form, "blocks": 2})
    findings = found.learn(Job(Silent()))
    (unit,) = [unit for unit in found.offers() if ":qkv" in unit.name]
    chosen = unit.nearest(12)
    assert chosen.form is not None
    smaller = found.build(findings, {unit.name: chosen}, Job(Silent()))
    projection = attentions(smaller)[1].borrowed()
    lost = torch.zeros((), dtype=torch.float64)
    for block, attention in enumerate(attentions_of(model, find_targets(model))):
        stats = findings.stats[attention.places["query"]]
        layers = [model.get_submodule(attention.places[role]) for role in ("query", "key", "value")]
        weight = torch.cat([layer.weight for layer in layers]).detach().double()  # type: ignore[arg-type]
        error = weight - (projection.matrix(block) @ projection.inputs).detach().double()
        lost += (error @ stats.covariance(centered=True) * error).sum()
        bias = torch.cat([layer.bias for layer in layers]).detach().double()  # type: ignore[arg-type]
        own = projection.bias.view(2, -1)[block].detach().double()  # type: ignore[operator, union-attr]
        torch.testing.assert_close(own, bias + error @ stats.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(findings.layers[unit.name].loss[chosen.grade], lost, rtol=1e-3, atol=1e-6)


@each_form
def test_every_block_gets_its_own_projections_in_both_orders(form: str) -> None:
    projection = attentions(in_memory(form))[0].q_proj
    assert isinstance(projection, TensorProjection)
    x = torch.randn(2, 3, 32)
    z = torch.nn.functional.linear(x, projection.inputs)
    found = []
    for block in range(2):
        at_once = torch.nn.functional.linear(z, projection.matrix(block))
        torch.testing.assert_close(projection._contract(z, projection._core(block)), at_once, rtol=1e-4, atol=1e-5)
        found.append(torch.cat(projection(x, block), -1))
        own = projection.bias.view(2, -1)[block]  # type: ignore[operator, union-attr]
        torch.testing.assert_close(found[-1], at_once + own, rtol=1e-4, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-2


def test_a_copy_reads_its_own_factors_and_everything_else_works(compressed: Compressed, tmp_path: Path) -> None:
    result = stacked(compressed)
    model = transformers.ViTForImageClassification.from_pretrained(result.directory, attn_implementation="eager").eval()
    before = outputs(model, CLASSIFIER)
    twin = copy.deepcopy(model)
    assert attentions(twin)[1].source is attentions(twin)[0] is not attentions(model)[0]
    twin.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        attentions(model)[0].q_proj.inputs.zero_()
    assert torch.equal(outputs(twin, CLASSIFIER), before)
    assert not torch.equal(outputs(model, CLASSIFIER), before)
    again = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "again", attn_implementation="eager"
    )
    assert torch.equal(outputs(again.eval(), CLASSIFIER), before)
    headless = transformers.AutoModel.from_pretrained(result.directory)
    assert attentions(headless)[1].source is attentions(headless)[0]
    maps = twin(**tiny.inputs(CLASSIFIER), output_attentions=True).attentions
    assert [each.shape for each in maps] == [(3, 2, 17, 17)] * 2
    twin(**tiny.inputs(CLASSIFIER), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(parameter.grad is not None for parameter in twin.vit.layers.parameters())
    with torch.no_grad():
        assert torch.isfinite(twin.to(torch.bfloat16)(tiny.inputs(CLASSIFIER)["pixel_values"].bfloat16()).logits).all()


def test_a_stack_is_exported(compressed: Compressed, tmp_path: Path) -> None:
    assert export(str(stacked(compressed).directory), str(tmp_path / "out"), "torch").difference < 1e-4


@pytest.mark.parametrize("blocks", [3, 100])
def test_what_is_left_at_the_end_is_a_stack_of_fewer(blocks: int) -> None:
    found = compression(tiny.build(CLASSIFIER), CLASSIFIER, "tensor", options={"blocks": blocks})
    assert [unit.name.rpartition(":")[2] for unit in found.offers()] == ["qkv of 2 blocks", "o", "o"]


def test_a_block_that_is_left_out_is_in_no_stack() -> None:
    model = tiny.build(CLASSIFIER)
    whole = compression(model, CLASSIFIER, "tensor", options={"blocks": 2})
    assert isinstance(whole.estimator, AttentionEstimator)
    targets = [target for target in find_targets(model) if target.block == 1]
    found = Choices.of(whole.config).compressor(model, targets, torch.float32, whole.estimator.calibration)
    smaller = found.build(
        found.learn(Job(Silent())), {unit.name: unit.nearest(12) for unit in found.offers()}, Job(Silent())
    )
    assert [unit.name for unit in found.offers()] == ["vit.layers.1.attention:qkv", "vit.layers.1.attention:o"]
    assert not any(isinstance(module, FollowingAttention) for module in smaller.modules())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": "layers.7.attention"}, "block 1 of the tensor in 'layers.7.attention', which does not exist"),
        ({"source": "layers.1.attention"}, "which does not exist"),
        ({"block": 2}, "block 2 of the tensor"),
        ({"block": 0}, "expected a source and the number of a block"),
        ({"source": 3}, "expected a source and the number of a block"),
        ({"more": 3}, "expected a source and the number of a block"),
    ],
)
def test_a_damaged_description_is_named(
    compressed: Compressed, tmp_path: Path, change: Mapping[str, Any], said: str
) -> None:
    stacked_directory = stacked(compressed).directory
    assert stacked_directory is not None
    for file in stacked_directory.iterdir():
        if file.name in ("config.json", "model.safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    document = json.loads((tmp_path / "config.json").read_text())
    layers = document["quantization_config"]["layers"]
    (name,) = [name for name, entry in layers.items() if entry.get("structure") == "tensor-following"]
    layers[name] |= change
    (tmp_path / "config.json").write_text(json.dumps(document))
    for load in (vitshrink.load, transformers.ViTForImageClassification.from_pretrained):
        with pytest.raises((CheckpointError, OutputError), match=said):
            load(tmp_path)


def test_descriptions_read_back() -> None:
    entry = {"structure": "tensor-following", "source": "layers.0.attention", "block": 1}
    assert describe(read(entry)) == entry
    assert not Following("layers.0.attention", 1).fits(tiny.build(CLASSIFIER).vit.layers[0].attention.q_proj)


def test_back_propagation_that_recomputes_counts_all_blocks() -> None:
    """Of factors that two blocks read, the gradient is the sum of both."""
    found: list[list[Tensor]] = []
    for reversible in (False, True):
        model = in_memory().train()
        torch.manual_seed(0)
        with bidirectional(model, reversible=reversible):
            model(**tiny.inputs(CLASSIFIER), labels=torch.tensor([0, 1, 2])).loss.backward()
        found.append(
            [parameter.grad.flatten() for parameter in borrowed_parameters(model) if parameter.grad is not None]
        )
    assert len(found[0]) == len(found[1]) == 6
    kept, recomputed = map(torch.cat, found)
    assert (kept - recomputed).norm() < 0.05 * kept.norm()


@pytest.mark.parametrize("settings", [{}, {"blockwise": 2}, {"train": "factors", "blockwise": 1}], ids=str)
def test_a_stack_trains(checkpoint: Callable[[str], Path], flat_images: Path, settings: dict[str, Any]) -> None:
    """Block by block what several read stays as it is: it cannot be fitted to the first of them."""
    model = in_memory()
    assert len({id(parameter) for parameter in borrowed_parameters(model)}) == 6
    recovery = recover(
        model,
        tiny.build(CLASSIFIER),
        Material(open_samples(flat_images, "image"), None),
        Preprocessor.from_checkpoint(checkpoint(CLASSIFIER), "image"),
        FinetuneConfig(epochs=4, batch_size=8, learning_rate=2e-3, **settings),
        Job(Silent()),
    )
    assert recovery.after < recovery.before
    assert attentions(model)[1].source is attentions(model)[0]
    assert len(blocks_of(model)) == 2
