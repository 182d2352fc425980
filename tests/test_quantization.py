"""Integer weights: what is stored, how close it is, that it reloads with stock calls, and fails loudly without."""

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import vitshrink
from vitshrink.cli.app import app
from vitshrink.compression.quantization import Quantization, quantized
from vitshrink.config.options import CompressConfig, parse_quantity, quantized_bits
from vitshrink.config.quantize import QuantizeJob
from vitshrink.errors import CheckpointError, DataError, GateError, OutputError, TargetError, UsageError
from vitshrink.jobs.compress import CompressionResult, compress
from vitshrink.jobs.export import export
from vitshrink.jobs.quantize import quantize_checkpoint
from vitshrink.methods.ranks import Storage, break_even_rank
from vitshrink.models import cost
from vitshrink.models.checkpoint import replace_layers
from vitshrink.models.loading import load_dense
from vitshrink.models.structures import quantized as quantized_module
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.structures.quantized import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedSpec,
    dequantize,
    dynamic_product,
    quantize,
    refitted,
)
from vitshrink.models.targets import find_targets
from vitshrink.report import figures
from vitshrink.report.making import QuantizationRecord

Compressed = Callable[..., CompressionResult]


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "available", lambda: False)


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.006), (4, 0.12)])
@pytest.mark.parametrize("columns", [1, 31, 37, 64, 96])
def test_integers_times_scales_are_close_to_the_matrix(bits: int, bound: float, columns: int) -> None:
    matrix = torch.randn(20, columns, generator=torch.Generator().manual_seed(columns))
    matrix[3] = 0
    integers, scales = quantize(matrix, bits)
    assert integers.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert integers.ndim == 3, "never the shape of the dense tensor"
    again = dequantize(integers, scales, bits, columns)
    assert torch.equal(again[3], matrix[3])
    assert (again - matrix).norm() <= bound * matrix.norm()
    layer = nn.Linear(columns, 20, bias=False)
    with torch.no_grad():
        layer.weight.copy_(matrix)
    assert torch.equal(QuantizedLinear.from_layer(layer, bits, "none").dense_weight(), again)


def test_four_bits_clip_where_it_pays() -> None:
    matrix = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    integers, scales = quantize(matrix, 4)
    plain = matrix.abs().amax(1, keepdim=True) / 7
    error = (dequantize(integers, scales, 4, 32) - matrix).norm()
    assert error < ((matrix / plain).round() * plain - matrix).norm()


@pytest.mark.parametrize("columns", [30, 32, 33, 67])
def test_padding_takes_room_and_is_no_parameter(columns: int) -> None:
    layer = nn.Linear(columns, 5)
    made = QuantizedLinear.from_layer(layer, 4, "none")
    assert cost.parameters(made) == cost.parameters(layer) == 5 * columns + 5
    assert cost.layers_parameters(nn.Sequential(made), ["0"]) == 5 * columns
    assert cost.stored_bytes(made) == made.weight.nbytes + made.weight_scale.nbytes + 5 * 4


@pytest.mark.parametrize("pivot", [None, 0, 5])
@pytest.mark.parametrize(("bits", "activations"), [(8, "none"), (8, "dynamic"), (4, "none")])
def test_a_low_rank_layer_is_rounded_factor_by_factor(pivot: int | None, bits: int, activations: str) -> None:
    torch.manual_seed(0)
    up, down = torch.randn(24, 6), torch.randn(6, 40)
    layer = LowRankLinear.from_factors(up, down, torch.randn(24), dtype=torch.float32, pivot=pivot)
    made = QuantizedLinear.from_layer(layer, bits, activations)  # type: ignore[arg-type]
    x = torch.randn(2, 7, 40)
    with torch.no_grad():
        error = (made(x) - layer(x)).norm() / layer(x).norm()
        through_matrix = nn.functional.linear(x, made.dense_weight(), made.bias)
        assert (made(x) - through_matrix).norm() <= (0.04 if activations == "dynamic" else 1e-5) * layer(x).norm()
    assert error < (0.06 if bits == 8 else 0.5)  # any pivots do here: those of a job are better conditioned
    assert cost.parameters(made) == cost.parameters(layer)


@pytest.mark.parametrize("pivot", [None, 8])
def test_the_outer_factor_absorbs_what_rounding_does_to_the_inner_one(pivot: int | None) -> None:
    torch.manual_seed(0)
    up, down = torch.randn(96, 48), torch.randn(48, 64)
    layer = LowRankLinear.from_factors(up, down, None, dtype=torch.float32, pivot=pivot)
    made = QuantizedLinear.from_layer(layer, 8, "none")
    fitted = refitted(*layer.factors(), made.inner())
    errors = [(each @ made.inner().double() - layer.dense_weight()).norm() for each in (fitted, layer.weight.double())]
    assert errors[0] < 0.8 * errors[1]


def test_a_factor_of_zeros_stays_one() -> None:
    torch.manual_seed(0)
    nothing, half = torch.zeros(2, 8), torch.cat([torch.randn(1, 8), torch.zeros(1, 8)])
    for down in (nothing, half):
        layer = LowRankLinear.from_factors(torch.randn(8, 2), down, None, dtype=torch.float32)
        found = QuantizedLinear.from_layer(layer, 8, "none").dense_weight()
        assert torch.allclose(found, layer.dense_weight(), atol=0.1)


def test_dynamic_products_do_not_depend_on_the_rest_of_the_batch() -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear.from_layer(nn.Linear(16, 8), 8, "dynamic")
    x = torch.randn(5, 16)
    x[4] *= 1000
    with torch.no_grad():
        assert torch.equal(layer(x)[:2], layer(x[:2]))
        assert torch.equal(layer(torch.zeros(1, 16))[0], layer.bias)


@pytest.mark.parametrize("columns", [1, 2, 3, 7, 16, 33])
@pytest.mark.parametrize("rows", [1, 2, 5, 33])
def test_integer_products_are_exact_in_every_shape(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    integers = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
    x = torch.randint(-127, 128, (9, columns), generator=generator).float()
    x[:, 0] = 127  # so that a token is its own rounding
    found = dynamic_product(x, integers, torch.ones(rows), None)
    assert torch.allclose(found, x @ integers.float().T, rtol=1e-6, atol=1e-2)


def test_integers_are_multiplied_exactly_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantizedLinear.from_layer(nn.Linear(64, 8), 8, "dynamic")
    x = torch.randn(5, 64)
    with torch.no_grad():
        fast = layer(x)
        monkeypatch.setattr(quantized_module, "exact_on_this_cpu", lambda: False)
        assert torch.allclose(layer(x), fast, atol=1e-5)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertForSequenceClassification", "BertForMaskedLM"])
@pytest.mark.parametrize(("weights", "activations"), [("int8", "dynamic"), ("int4", None)])
def test_a_quantized_checkpoint_reloads_with_stock_calls(
    checkpoint: Callable[[str], Path], tmp_path: Path, name: str, weights: str, activations: str | None
) -> None:
    source = checkpoint(name)
    result = quantize_checkpoint(
        QuantizeJob(str(source), str(tmp_path / "out"), weights=weights, activations=activations)
    )
    stock = getattr(transformers, name).from_pretrained(tmp_path / "out").eval()
    ours, dense = vitshrink.load(tmp_path / "out"), load_dense(source).model
    inputs = tiny.inputs(name)
    with torch.no_grad():
        assert torch.equal(stock(**inputs).logits, ours(**inputs).logits)
        error = (stock(**inputs).logits - dense(**inputs).logits).norm() / dense(**inputs).logits.norm()
    assert error < (0.05 if weights == "int8" else 0.5)
    assert result.report.bytes.compressed < (0.75 if name.startswith("Bert") else 0.6) * result.report.bytes.dense
    tables = [module for module in stock.modules() if isinstance(module, QuantizedEmbedding)]
    assert len(tables) == (1 if name == "BertForSequenceClassification" else 0), "tied embeddings stay"
    stock.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        again = getattr(transformers, name).from_pretrained(tmp_path / "again").eval()
        assert torch.equal(again(**inputs).logits, ours(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_keep_their_type(tmp_path: Path, dtype: torch.dtype) -> None:
    source = tiny.write("ViTForImageClassification", tmp_path / "half", dtype=dtype)
    quantize_checkpoint(QuantizeJob(str(source), str(tmp_path / "out")))
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert model.dtype == dtype
    kinds = {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert kinds == {dtype, torch.int8}
    inputs = {"pixel_values": tiny.inputs("ViTForImageClassification")["pixel_values"].to(dtype)}
    with torch.no_grad():
        dense = load_dense(source).model(pixel_values=inputs["pixel_values"].float()).logits
        assert (model(**inputs).logits.float() - dense).norm() < 0.08 * dense.norm()


def test_compress_quantizes_its_result(
    compressed: Compressed, vit_directory: Path, flat_images: Path, tmp_path: Path
) -> None:
    plain = compressed("ViTForImageClassification")
    (result,) = compress(
        CompressConfig(
            str(vit_directory),
            str(tmp_path / "out"),
            keep=(0.8,),
            quantize="int8",
            calibration=str(flat_images),
            samples=16,
            holdout=8,
            batch_size=7,
        )
    )
    assert result.report.parameters == plain.report.parameters
    assert result.report.bytes.compressed < 0.7 * plain.report.bytes.compressed
    assert result.report.quantization == QuantizationRecord("int8", "dynamic")
    assert result.report.macs.compressed == plain.report.macs.compressed
    assert "stored as int8" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    afterwards = quantize_checkpoint(QuantizeJob(str(plain.directory), str(tmp_path / "later")))
    assert afterwards.directory is not None
    models = [vitshrink.load(directory) for directory in (tmp_path / "out", afterwards.directory)]
    assert all(torch.equal(value, models[1].state_dict()[key]) for key, value in models[0].state_dict().items())


def test_the_report_has_the_figures_of_both_models(vit_directory: Path, learned_images: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(vit_directory), str(tmp_path / "out"), "--eval", str(learned_images), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["evaluation"]["dense"]["correct"] == 34
    assert report["evaluation"]["fidelity"]["kl"] < 0.05
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"report.json", "report.md", "README.md"}
    assert CliRunner().invoke(app, arguments).exit_code == 1, "the output exists"
    compared = CliRunner().invoke(app, ["report", str(tmp_path / "out")])
    assert "| int8 |" in compared.output
    smaller = re.search(
        r"answer good\">([\d.]+)\xa0% smaller", (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    )
    assert smaller is not None
    assert float(smaller[1]) == pytest.approx(100 * (1 - report["bytes"]["kept"]), abs=0.1)
    shown = CliRunner().invoke(app, ["quantize", str(vit_directory), str(tmp_path / "four"), "--weights", "int4"])
    assert "keep 1.000, int4" in shown.output


@pytest.mark.slow
def test_without_vitshrink_loading_fails(vit_directory: Path, tmp_path: Path) -> None:
    quantize_checkpoint(QuantizeJob(str(vit_directory), str(tmp_path / "out")))
    assert tiny.loads_without_vitshrink(tmp_path / "out") == "mismatch"


def test_what_makes_no_sense_is_explained(vit_directory: Path, tmp_path: Path) -> None:
    source, output = str(vit_directory), str(tmp_path / "out")
    with pytest.raises(UsageError, match="int8"):
        quantize_checkpoint(QuantizeJob(source, output, weights="int3"))
    with pytest.raises(UsageError, match="floating point"):
        quantize_checkpoint(QuantizeJob(source, output, weights="int4", activations="dynamic"))
    with pytest.raises(OutputError, match="source model"):
        quantize_checkpoint(QuantizeJob(source, source, overwrite=True))
    text = str(tiny.write("BertForMaskedLM", tmp_path / "text"))
    with pytest.raises(UsageError, match="cannot be the baseline"):
        quantize_checkpoint(QuantizeJob(source, output, baseline=text))
    with pytest.raises(DataError, match="nowhere"):
        quantize_checkpoint(QuantizeJob(source, output, eval="./nowhere"))
    assert not Path(output).exists()
    quantize_checkpoint(QuantizeJob(source, output))
    with pytest.raises(UsageError, match="already quantized"):
        quantize_checkpoint(QuantizeJob(output, str(tmp_path / "twice")))
    with pytest.raises(UsageError, match="pass --quantize"):
        CompressConfig("a", "b", keep=(0.5,), activations="none")
    for entry in ({"bits": 3, "activations": "none"}, {"bits": 8}, {"bits": 8, "activations": "none", "rank": 0}):
        with pytest.raises(CheckpointError):
            QuantizedSpec.from_dict(entry)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertForSequenceClassification"])
@pytest.mark.parametrize("storage", ["gauge", "factors"])
def test_bytes_are_known_before_the_work(name: str, weights: str, storage: Storage) -> None:
    model, (bits, activations) = tiny.build(name), quantized_bits(weights, None)
    quantization = Quantization(bits, activations, torch.float16)
    whole = quantization.file_bytes(model)
    target = next(target for target in find_targets(model) if target.role == "fc1")
    for rank in (1, break_even_rank(*target.shape, storage)):
        layer = tiny.low_rank(model.get_submodule(target.name), rank)
        if storage == "gauge":
            up, down = layer.factors()
            layer = LowRankLinear.from_factors(up, down, layer.bias, dtype=torch.float32, pivot=0)
        small = copy.deepcopy(model)
        replace_layers(small, {target.name: layer})
        dense, low_rank = (
            quantization.dense_bytes(target.shape),
            quantization.low_rank_bytes(target.shape, rank, storage),
        )
        assert quantization.file_bytes(small) == whole - dense + low_rank


@pytest.mark.parametrize(("weights", "size"), [("int8", "52kB"), ("int4", "50kB")])
def test_a_size_in_bytes_holds_for_the_integers(
    vit_directory: Path, flat_images: Path, tmp_path: Path, weights: str, size: str
) -> None:
    entries = {"calibration": str(flat_images), "samples": 16, "holdout": 8, "quantize": weights}
    (result,) = compress(CompressConfig(str(vit_directory), str(tmp_path / "out"), target_size=size, **entries))
    room = parse_quantity(size, "size")
    assert 0.8 * room < (tmp_path / "out" / "model.safetensors").stat().st_size <= room
    assert any(layer.rank is not None for layer in result.report.layers)
    with pytest.raises(TargetError, match=f"bytes as {weights}: .* --target-size"):
        compress(CompressConfig(str(vit_directory), str(tmp_path / "less"), target_size="20kB", **entries))
    with pytest.raises(TargetError, match="vitshrink quantize"):
        compress(CompressConfig(str(vit_directory), str(tmp_path / "more"), target_size="1MB", **entries))


@pytest.mark.parametrize(("weights", "bound"), [("int8", 0.004), ("int4", 0.02)])
def test_a_bound_holds_for_the_integers(
    vit_directory: Path, flat_images: Path, tmp_path: Path, weights: str, bound: float
) -> None:
    entries = {"calibration": str(flat_images), "samples": 12, "holdout": 12, "refine": 0, "quantize": weights}
    (result,) = compress(CompressConfig(str(vit_directory), str(tmp_path / "out"), max_kl=bound, **entries))
    assert result.report.evaluation is not None
    assert result.report.evaluation.fidelity.kl <= bound
    alone = quantize_checkpoint(QuantizeJob(str(vit_directory), str(tmp_path / "alone"), weights=weights))
    assert result.report.bytes.compressed < alone.report.bytes.compressed
    with pytest.raises(GateError, match=f"--target-size .*MB as {weights}, loses"):
        compress(CompressConfig(str(vit_directory), str(tmp_path / "none"), max_kl=1e-9, **entries))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("form", [pytest.param("torch", marks=pytest.mark.slow), "dense"])
def test_a_quantized_model_is_exported(bert_directory: Path, tmp_path: Path, form: str) -> None:
    quantize_checkpoint(QuantizeJob(str(bert_directory), str(tmp_path / "int8")))
    found = export(str(tmp_path / "int8"), str(tmp_path / "out"), form, tolerance=0.05)
    assert found.difference <= (1e-5 if form == "torch" else 0.05 * found.largest)


@pytest.mark.slow
def test_onnx_keeps_the_integers(bert_directory: Path, tmp_path: Path) -> None:
    quantize_checkpoint(QuantizeJob(str(bert_directory), str(tmp_path / "small")))
    found = export(str(tmp_path / "small"), str(tmp_path / "out"), "onnx")
    assert found.rounding > 0
    assert found.difference <= max(1e-4 * max(1, found.largest), 2 * found.rounding)
    graph = onnx.load(str(found.directory / found.file)).graph
    integers = sum(math.prod(tensor.dims) for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8)
    parameters = vitshrink.load(tmp_path / "small").parameters()
    assert integers == sum(parameter.numel() for parameter in parameters if not parameter.is_floating_point())
    products = sum(node.op_type == "MatMulInteger" for node in graph.node)
    assert products == (12 if quantized_module.exact_on_this_cpu() else 0)


@pytest.mark.slow
def test_four_bits_are_exported_without_a_difference(vit_directory: Path, tmp_path: Path) -> None:
    quantize_checkpoint(QuantizeJob(str(vit_directory), str(tmp_path / "small"), weights="int4"))
    found = export(str(tmp_path / "small"), str(tmp_path / "out"), "onnx")
    assert found.rounding == 0
    assert found.difference <= 1e-4 * max(1, found.largest)


def test_four_bits_leave_eight_to_factors() -> None:
    model = tiny.build("ViTForImageClassification")
    replace_layers(model, {"vit.layers.0.mlp.fc1": tiny.low_rank(model.vit.layers[0].mlp.fc1, 6)})
    rounded = quantized(model, 4, "none")
    assert rounded.vit.layers[0].mlp.fc1.spec == QuantizedSpec(8, "none", 6)
    assert rounded.vit.layers[0].mlp.fc2.spec == QuantizedSpec(4, "none")


@pytest.mark.parametrize("method", ["heads-joint", "cholesky"])
def test_models_with_other_attentions_are_quantized(compressed: Compressed, tmp_path: Path, method: str) -> None:
    small = compressed("ViTForImageClassification", method=method, keep=(0.85,)).directory
    quantize_checkpoint(QuantizeJob(str(small), str(tmp_path / "out")))
    models = [vitshrink.load(str(directory)) for directory in (small, tmp_path / "out")]
    inputs = tiny.inputs("ViTForImageClassification")
    with torch.no_grad():
        outputs = [model(**inputs).logits for model in models]
    assert 0 < (outputs[0] - outputs[1]).norm() < 0.05 * outputs[0].norm()


def test_the_original_is_not_changed() -> None:
    model = tiny.build("ViTForImageClassification")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantized(model, 8, "dynamic")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model.config, "quantization_config")


def test_calibration_data_give_the_integers_of_compress(
    vit_directory: Path, learned_images: Path, tmp_path: Path
) -> None:
    data = ["--calibration", str(learned_images), "--samples", "12", "--holdout", "8", "--eval", str(learned_images)]
    for command, more in (("quantize", ["--bits", "5"]), ("compress", ["--bits", "5", "--forms", "bits"])):
        result = CliRunner().invoke(app, [command, str(vit_directory), str(tmp_path / command), *more, *data])
        assert result.exit_code == 0, result.output
    written = [tmp_path / command / "model.safetensors" for command in ("quantize", "compress")]
    assert written[0].read_bytes() == written[1].read_bytes()
    report = json.loads((tmp_path / "quantize" / "report.json").read_text(encoding="utf-8"))
    assert report["evaluation"]["dense"]["correct"] == 34


def test_rounding_to_the_nearest_says_that_data_would_help(vit_directory: Path, tmp_path: Path) -> None:
    source = str(vit_directory)
    found = {
        rounding: quantize_checkpoint(QuantizeJob(source, str(tmp_path / rounding), rounding=rounding))
        for rounding in ("auto", "nearest")
    }
    assert "--calibration" in found["auto"].report.warnings[0]
    assert not found["nearest"].report.warnings
    weights = [(tmp_path / rounding / "model.safetensors").read_bytes() for rounding in found]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bits", "4"], "--bits needs .* pass --calibration"),
        (["--exclude", "fc1"], "--exclude needs .* pass --calibration"),
        (["--rounding", "nearest", "--calibration", "x"], "--calibration needs .*remove it"),
        (["--rounding", "curvature", "--bits", "4"], "pass --calibration"),
        (["--calibration", "x"], "exactly one of --target-size, --bits, .*frontier"),
        (["--calibration", "x", "--bits", "4", "--max-kl", "1"], "--bits and --max-kl were given"),
        (["--calibration", "x", "--bits", "4", "--weights", "int8"], "--weights is for rounding to nearest"),
        (["--calibration", "x", "--bits", "4", "--baseline", "y"], "--baseline is for rounding to nearest"),
        (["--calibration", "x", "--max-kl", "1", "--holdout", "0"], "--holdout above 0"),
        (["--rounding", "neerest"], "Did you mean 'nearest'"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["quantize", "./nowhere", "./out", *flags])
    assert result.exit_code == 2
    assert re.search(message, " ".join(result.output.split())), result.output
