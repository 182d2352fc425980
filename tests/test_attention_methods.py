"""The contract of methods that replace an attention: exact where nothing is lost, within budget, and reloadable."""

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import vitshrink
from vitshrink.compression.attentions import attentions_of
from vitshrink.compression.choices import Choices
from vitshrink.compression.compressor import Compressor
from vitshrink.config.options import CompressConfig
from vitshrink.data import Batch
from vitshrink.data.opening import CalibrationData
from vitshrink.errors import CheckpointError, DependencyError, UsageError
from vitshrink.jobs.compress import CompressionResult, compress
from vitshrink.jobs.export import export
from vitshrink.methods import attention_methods
from vitshrink.methods.tensor import nearest_kronecker
from vitshrink.models import cost
from vitshrink.models.checkpoint import compressed_layers
from vitshrink.models.structures import describe, read, structure_of
from vitshrink.models.structures.tensor import TensorProjection
from vitshrink.models.structures.tensor_output import TensorOutput
from vitshrink.models.targets import find_targets
from vitshrink.runtime.observer import Job, Silent

Compressed = Callable[..., CompressionResult]

every_method = pytest.mark.parametrize("method", attention_methods())
NAMES = ("ViTForImageClassification", "DeiTForImageClassificationWithTeacher", "BertForMaskedLM")


class _Samples(list):  # type: ignore[type-arg]
    """As many as there are: all that a compression asks of its samples."""


def compression(model: PreTrainedModel, name: str, method: str, **entries: Any) -> Compressor:
    """A method on a model in memory, calibrated on random inputs."""
    inputs = tiny.inputs(name, 8)
    mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
    data = CalibrationData(_Samples(range(8)), [Batch(inputs, mask, [], [])])  # type: ignore[arg-type]
    config = CompressConfig("model", "out", method=method, calibration="x", **({"keep": (0.9,)} | entries))
    return Choices.of(config).compressor(model, find_targets(model), torch.float32, data)


def at_rank(model: PreTrainedModel, name: str, method: str, rank: int, **entries: Any) -> PreTrainedModel:
    job = Job(Silent())
    found = compression(model, name, method, keep=(), rank=rank, **entries)
    findings = found.learn(job)
    return found.build(findings, {unit.name: unit.nearest(rank) for unit in found.offers()}, job).eval()


def outputs(model: PreTrainedModel, name: str) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**tiny.inputs(name, 8))[0]
    return found


@torch.no_grad()
def with_low_rank_heads(name: str, role: str, rank: int) -> PreTrainedModel:
    """A model whose heads need only ``rank`` dimensions for one projection; its biases are as random as ever."""
    model = tiny.build(name)
    for attention in attentions_of(model, find_targets(model)):
        layer = model.get_submodule(attention.places[role])
        assert isinstance(layer.weight, Tensor)
        heads = layer.weight.view(attention.dimensions.heads, attention.dimensions.head, -1)
        U, S, Vh = torch.linalg.svd(heads, full_matrices=False)
        heads.copy_(U[..., :rank] * S[:, None, :rank] @ Vh[:, :rank])
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("method", "role"), [("qk-joint", "key"), ("qk-joint", "query"), ("vo-joint", "value")])
def test_heads_that_need_few_dimensions_lose_nothing_with_their_biases(name: str, method: str, role: str) -> None:
    """A query that is its bias alone needs one dimension more."""
    model = with_low_rank_heads(name, role, 5)
    rank = 6 if role == "query" else 5
    smaller = at_rank(model, name, method, rank)
    assert cost.parameters(smaller) < cost.parameters(model)
    torch.testing.assert_close(outputs(smaller, name), outputs(model, name), rtol=1e-4, atol=1e-4)
    wrong = at_rank(model, name, method, rank - 2)
    assert (outputs(wrong, name) - outputs(model, name)).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_an_attention_that_is_symmetric_already_is_kept_with_its_biases(name: str) -> None:
    model = tiny.build(name)
    for attention in attentions_of(model, find_targets(model)):
        query, key = (model.get_submodule(attention.places[role]) for role in ("query", "key"))
        assert isinstance(query.weight, Tensor)
        assert isinstance(key.weight, Tensor)
        with torch.no_grad():
            query.weight.copy_(key.weight)
    smaller = at_rank(model, name, "cholesky", 16)
    saved = cost.parameters(model) - cost.parameters(smaller)
    # of each of two blocks with two heads: one of two projections, the triangle below its diagonal, the key bias
    assert saved == 2 * (32 * 32 + 2 * 16 * 15 // 2 + 32)
    torch.testing.assert_close(outputs(smaller, name), outputs(model, name), rtol=1e-4, atol=1e-4)


@every_method
def test_losses_fall_and_say_what_is_lost(method: str) -> None:
    """The error of the first block's attention output falls as the promised loss does."""
    name = "ViTForImageClassification"
    model = tiny.build(name)
    found = compression(model, name, method)
    findings = found.learn(Job(Silent()))
    for unit in found.offers():
        loss = findings.layers[unit.name].loss[[0, *(each.grade for each in unit.candidates)]]
        assert (loss[:-1] >= loss[1:] - 1e-12).all()
        assert loss[-1] < 0.9 * loss[0]
    errors = []
    for place in (0, -1):
        smaller = found.build(findings, {unit.name: unit.candidates[place] for unit in found.offers()}, Job(Silent()))
        errors.append(float((outputs(smaller.eval(), name) - outputs(model, name)).square().mean()))
    # half of a random form is not positive: of that, no rank of the symmetric one is an approximation
    assert method == "cholesky" or errors[0] > errors[-1]


@every_method
def test_the_source_is_untouched_and_the_result_deterministic(method: str) -> None:
    name = "BertForMaskedLM"
    model = tiny.build(name)
    before = copy.deepcopy(model.state_dict())
    one, other = (at_rank(model, name, method, 7).state_dict() for _ in range(2))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not any(structure_of(module) for module in model.modules())


@every_method
@pytest.mark.parametrize("damage", ["dead channel", "zero query", "zero value"])
def test_degenerate_attentions_stay_finite(method: str, damage: str) -> None:
    name = "ViTForImageClassification"
    model = tiny.build(name)
    block = model.vit.layers[0]
    with torch.no_grad():
        if damage == "dead channel":
            block.layernorm_before.weight[3] = 0
            block.layernorm_before.bias[3] = 0
        else:
            layer = block.attention.q_proj if damage == "zero query" else block.attention.v_proj
            layer.weight.zero_()
    for rank in (1, 9):
        assert torch.isfinite(outputs(at_rank(model, name, method, rank), name)).all()


@every_method
@pytest.mark.parametrize("name", NAMES)
def test_a_result_reloads_with_stock_calls_within_its_budget(compressed: Compressed, method: str, name: str) -> None:
    result = compressed(name, method=method, keep=(0.93,))
    assert result.directory is not None
    model = getattr(transformers, name).from_pretrained(result.directory).eval()
    strict = vitshrink.load(result.directory)
    assert result.report.parameters.compressed == cost.parameters(model) <= 0.93 * result.report.parameters.dense
    assert torch.equal(outputs(model, name), outputs(strict, name))
    layers = result.report.layers
    assert {entry.parameters < entry.shape[0] * entry.shape[1] for entry in layers if entry.rank} == {True}
    assert any(entry.rank for entry in layers)


@every_method
def test_without_vitshrink_a_shape_does_not_fit(method: str) -> None:
    """Which stops transformers from loading the rest at random."""
    name = "ViTForImageClassification"
    model = tiny.build(name)
    changed = at_rank(model, name, method, 7)
    dense, there = model.state_dict(), changed.state_dict()
    for path in compressed_layers(changed):
        inside = [key for key in there if key.startswith(path) and key in dense]
        assert any(there[key].shape != dense[key].shape for key in inside)


@every_method
def test_a_smaller_attention_saves_copies_casts_trains_and_shows_its_maps(
    compressed: Compressed, method: str, tmp_path: Path
) -> None:
    name = "ViTForImageClassification"
    directory = compressed(name, method=method, keep=(0.93,)).directory
    model = transformers.ViTForImageClassification.from_pretrained(directory, attn_implementation="eager")
    maps = model(**tiny.inputs(name), output_attentions=True).attentions
    assert [each.shape for each in maps] == [(3, 2, 17, 17)] * 2
    loss = model(**tiny.inputs(name), labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.vit.layers.parameters())
    twin = copy.deepcopy(model.eval())
    twin.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "again", attn_implementation="eager"
    )
    assert torch.equal(outputs(again.eval(), name), outputs(model, name))
    half = model.to(torch.bfloat16)
    with torch.no_grad():
        assert torch.isfinite(half(tiny.inputs(name)["pixel_values"].bfloat16()).logits).all()


@every_method
def test_bad_use_is_named_before_any_work(vit_directory: Path, flat_images: Path, tmp_path: Path, method: str) -> None:
    def job(**entries: Any) -> None:
        given = {"keep": (0.93,), "calibration": str(flat_images)} | entries
        compress(CompressConfig(str(vit_directory), str(tmp_path / "out"), method=method, **given))

    for entries, message in (
        ({"layers": "mlp"}, "--layers mlp excludes them: use --layers attention"),
        ({"include": (r"fc1",)}, "none of them complete in any block"),
        ({"include": (r"q_proj",)}, "none of them complete in any block"),
        ({"keep": (), "rank": 500}, "--rank 500: the largest rank .* whose heads have 16 dimensions in 32"),
        ({"storage": "gauge"}, "--storage gauge works on linear layers"),
        ({"allocation": "measured"}, "--allocation measured works on linear layers"),
        ({"quantize": "int8"}, "--quantize works on linear and low-rank layers"),
        ({"compensation": "residual"}, "unknown compensation 'residual'.* Available: none"),
        ({"calibration": None}, "needs calibration data"),
        ({"options": {"nonsense": 1}}, "nonsense"),
        ({"options": {"blocks": 0}}, "--option blocks"),
        ({"keep": (0.2,)}, "cannot reach"),
    ):
        with pytest.raises(UsageError, match=message):
            job(**entries)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["qk-joint", "vo-joint", "heads-joint"])
def test_heads_of_one_dimension_cannot_get_smaller(method: str, flat_images: Path, tmp_path: Path) -> None:
    tiny.build("ViTForImageClassification", num_attention_heads=32).save_pretrained(tmp_path / "model")
    tiny.write_processor(tmp_path / "model")
    job = CompressConfig(
        str(tmp_path / "model"), str(tmp_path / "out"), method=method, keep=(0.9,), calibration=str(flat_images)
    )
    with pytest.raises(
        UsageError, match=f"--method {method} has no rank that makes heads of 1 dimensions in 32 smaller"
    ):
        compress(job)


@pytest.mark.parametrize(
    "entry",
    [
        {"structure": "headwise", "qk": 4},
        {"structure": "headwise", "value": 3},
        {"structure": "narrow", "inputs": 6},
        {"structure": "symmetric", "rank": 5},
        {"structure": "tensor-tucker", "parts": 3, "heads": 2, "dims": 4, "inputs": 8},
        {"structure": "tensor-cp", "rank": 9},
        {"structure": "tensor-train", "parts": 3, "heads": 4, "inputs": 8},
        {"structure": "tensor-tucker", "parts": 6, "heads": 2, "dims": 4, "inputs": 8, "blocks": 2},
        {"structure": "tensor-output", "form": "tucker", "size": 2, "heads": 2, "dims": 4, "outputs": 8},
        {"structure": "tensor-output", "form": "cp", "size": 2, "outputs": 8},
        {"structure": "tensor-output", "form": "tt", "size": 2, "dims": 4, "outputs": 8},
    ],
)
def test_descriptions_read_back_and_damaged_ones_do_not(entry: dict[str, Any]) -> None:
    assert describe(read(entry)) == entry
    for damaged in (
        {**entry, "new": 1},
        {name: 0 if isinstance(value, int) else value for name, value in entry.items()},
        *([{**entry, "form": form} for form in ("qr", ["tt"])] if "form" in entry else []),
    ):
        with pytest.raises(CheckpointError, match="expected positive whole numbers"):
            read(damaged)


def test_a_rank_above_the_head_dimension_is_refused_by_the_loader() -> None:
    attention = tiny.build("ViTModel").layers[0].attention
    with pytest.raises(CheckpointError, match="qk 16 is not below the head dimension, 16"):
        read({"structure": "headwise", "qk": 16}).build(copy.deepcopy(attention))
    with pytest.raises(CheckpointError, match="rank 17 is above the head dimension, 16"):
        read({"structure": "symmetric", "rank": 17}).build(copy.deepcopy(attention))
    assert not read({"structure": "symmetric", "rank": 3}).fits(attention.q_proj)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["tucker", "cp", "tt"])
def test_tensor_forms_reload_within_their_budget(compressed: Compressed, form: str, name: str) -> None:
    result = compressed(name, method="tensor", options={"form": form}, keep=(0.93,))
    model = getattr(transformers, name).from_pretrained(result.directory).eval()
    assert result.report.parameters.compressed == cost.parameters(model) <= 0.93 * result.report.parameters.dense
    assert result.directory is not None
    assert torch.equal(outputs(model, name), outputs(vitshrink.load(result.directory), name))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["tucker", "tt"])
def test_tensor_forms_are_exported(compressed: Compressed, form: str, tmp_path: Path) -> None:
    """For batches of any size, on which the cheaper order of contraction depends."""
    directory = compressed("ViTForImageClassification", method="tensor", options={"form": form}, keep=(0.93,)).directory
    assert export(str(directory), str(tmp_path / "out"), "torch").difference < 1e-4


@pytest.mark.parametrize("form", ["tucker", "cp", "tt"])
def test_both_orders_of_contraction_agree(form: str) -> None:
    name = "ViTModel"
    model = tiny.build(name)
    entries = {"options": {"form": form}, "keep": (), "rank": 8}
    found = compression(model, name, "tensor", **entries)
    findings = found.learn(Job(Silent()))
    smaller = found.build(findings, {unit.name: unit.nearest(8) for unit in found.offers()}, Job(Silent()))
    projection = smaller.layers[0].attention.q_proj
    assert isinstance(projection, TensorProjection)
    x = torch.randn(2, 3, 32)
    z = torch.nn.functional.linear(x, projection.inputs)
    stepwise = projection._contract(z, projection._core(0))
    at_once = torch.nn.functional.linear(z, projection.matrix())
    output = smaller.layers[0].attention.o_proj
    assert isinstance(output, TensorOutput)
    if form != "cp":
        multiplied = torch.nn.functional.linear(x, output.matrix())
        torch.testing.assert_close(output._contract(x), multiplied, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            output(x), torch.nn.functional.linear(multiplied, output.outputs, output.bias), rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(stepwise, at_once, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(projection(x), -1), at_once + projection.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("form", ["tucker", "tt"])
def test_a_tensor_of_few_dimensions_is_kept(form: str, blocks: int) -> None:
    """Projections between 12 of the 32 directions and 6 of each head's 16 lose nothing, biases included."""
    name = "ViTForImageClassification"
    model = tiny.build(name)
    generator = torch.Generator().manual_seed(0)
    for attention in attentions_of(model, find_targets(model)):
        if blocks > 1:  # the same directions everywhere
            generator.manual_seed(0)
        read_from = torch.linalg.qr(torch.randn(32, 12, generator=generator))[0]
        written_to = torch.linalg.qr(torch.randn(16, 6, generator=generator))[0]
        for role in ("query", "key", "value"):
            weight = model.get_submodule(attention.places[role]).weight
            assert isinstance(weight, Tensor)
            with torch.no_grad():
                kept = written_to @ written_to.T @ weight.view(2, 16, 32) @ read_from @ read_from.T
                weight.copy_(kept.reshape(32, 32))
        output = model.get_submodule(attention.places["output"]).weight
        assert isinstance(output, Tensor)
        with torch.no_grad():
            kept = read_from @ read_from.T @ output @ torch.block_diag(*[written_to @ written_to.T] * 2)
            output.copy_(kept)
    found = compression(model, name, "tensor", options={"form": form, "blocks": blocks}, keep=(), rank=12)
    findings = found.learn(Job(Silent()))
    smaller = found.build(findings, {unit.name: unit.nearest(12) for unit in found.offers()}, Job(Silent())).eval()
    assert len(findings.layers) == 2 + 2 // blocks
    if form == "tucker":
        torch.testing.assert_close(outputs(smaller, name), outputs(model, name), rtol=1e-3, atol=1e-3)
    for unit in found.offers():  # a train between the heads is too narrow for three projections that share nothing
        if form == "tucker" or unit.name.endswith(":o"):
            loss = findings.layers[unit.name].loss
            assert abs(loss[12]) < 1e-8 * loss[0]


@pytest.mark.parametrize("form", ["tucker", "cp", "tt"])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_an_output_tensor_is_its_error(name: str, form: str) -> None:
    """The output projection alone, on the inputs it was calibrated on."""
    model = tiny.build(name)
    entries = {"options": {"form": form}, "keep": (), "rank": 8}
    found = compression(model, name, "tensor", **entries)
    findings = found.learn(Job(Silent()))
    attention = attentions_of(model, find_targets(model))[0]
    (unit,) = [unit for unit in found.offers() if unit.name == f"{attention.places['attention']}:o"]
    chosen = unit.nearest(8)
    assert chosen.form is not None
    smaller = found.build(findings, {unit.name: chosen}, Job(Silent())).eval()
    seen: dict[str, Tensor] = {}
    place = attention.places["output"]
    for key, each in (("dense", model), ("small", smaller)):
        each.get_submodule(place).register_forward_hook(lambda _m, _i, out, key=key: seen.update({key: out}))
    inputs = tiny.inputs(name, 8)
    outputs(model, name), outputs(smaller, name)
    there = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones(seen["dense"].shape[:2]) > 0
    error = (seen["dense"] - seen["small"])[there].double()
    torch.testing.assert_close(error.mean(0), torch.zeros(32).double(), rtol=0, atol=1e-4)
    promised = findings.layers[unit.name].loss[chosen.grade]
    torch.testing.assert_close(error.square().sum(1).mean(), promised, rtol=1e-3, atol=1e-6)


def test_the_nearest_kronecker_product_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(k, k, generator=generator).double() for k in (3, 5))
    A, B = A @ A.T, B @ B.T
    between, within = nearest_kronecker(torch.kron(A, B), 3)
    torch.testing.assert_close(torch.kron(between, within), torch.kron(A, B))
    assert min(torch.linalg.eigvalsh(between)[0], torch.linalg.eigvalsh(within)[0]) > 0


def test_a_missing_package_and_an_unknown_form_are_named_before_any_work(
    vit_directory: Path, flat_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CompressConfig(
        str(vit_directory), str(tmp_path / "out"), method="tensor", keep=(0.93,), calibration=str(flat_images)
    )
    with pytest.raises(UsageError, match=r"form=qr: unknown\. Available: tucker, cp, tt"):
        compress(replace(config, options={"form": "qr"}))
    with pytest.raises(UsageError, match="iterations=0: must be at least 1"):
        compress(replace(config, options={"form": "cp", "iterations": 0}))
    monkeypatch.setitem(sys.modules, "tensorly", None)
    with pytest.raises(DependencyError, match=r"--method tensor needs the package tensorly.*vitshrink\[tensor\]"):
        compress(config)
    assert not (tmp_path / "out").exists()
