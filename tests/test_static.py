"""Static activations: integers on grids that calibration chooses, in PyTorch and in the runtimes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import tiny
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

import vitshrink
from vitshrink.compression import calibrated
from vitshrink.compression.grids import Grid, Values, best_grid
from vitshrink.config.options import CompressConfig
from vitshrink.config.quantize import QuantizeJob
from vitshrink.data.batches import Batch
from vitshrink.errors import UsageError
from vitshrink.jobs.compress import CompressionResult
from vitshrink.jobs.export import export
from vitshrink.jobs.quantize import quantize_checkpoint
from vitshrink.models.exported import load_exported
from vitshrink.models.loading import load_dense
from vitshrink.models.merged import merge_tokens, tokens_of
from vitshrink.models.structures import static as structure
from vitshrink.models.structures.merging import Merging
from vitshrink.models.structures.static import LEVELS, StaticConv2d, StaticLinear, StaticProduct, StaticSpec
from vitshrink.models.targets import blocks_of
from vitshrink.report import figures

Compressed = Callable[..., CompressionResult]
Made = Callable[..., Path]

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("ViTForImageClassification", {}),
    "low rank": ("ViTForImageClassification", {"keep": (0.7,)}),
    "smaller heads": ("ViTForImageClassification", {"method": "heads-joint", "keep": (0.9,)}),
    "merged tokens": ("DeiTForImageClassification", {"tokens": "merge", "token_operations": 0.7, "keep": None}),
    "mixed tokens": ("ViTForImageClassification", {"method": "svd", "tokens": "mixed", "token_budget": 10}),
    "teacher": ("DeiTForImageClassificationWithTeacher", {}),
    "features": ("ViTModel", {}),
    "text": ("BertForSequenceClassification", {}),
    "masked": ("BertForMaskedLM", {}),
    "text features": ("BertModel", {}),
    "text, low rank": ("BertForSequenceClassification", {"keep": (0.7,)}),
}
FAST = ("dense", "low rank", "text")


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "available", lambda: False)


@pytest.fixture(scope="session")
def source(compressed: Compressed, checkpoint: Callable[[str], Path]) -> Callable[[str], Path]:
    def directory(kind: str) -> Path:
        name, options = KINDS[kind]
        if not options:
            return checkpoint(name)
        found = compressed(name, **options).directory
        assert found is not None
        return found

    return directory


@pytest.fixture(scope="session")
def made(
    source: Callable[[str], Path], flat_images: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Made:
    """A quantized checkpoint, made once for every kind."""
    root, known = tmp_path_factory.mktemp("static"), {}

    def directory(kind: str) -> Path:
        if kind not in known:
            data = text_file if KINDS[kind][0] in tiny.TEXT_MODELS else flat_images
            output = root / kind.replace(" ", "-")
            options: dict[str, Any] = {"samples": 16, "holdout": 4, "batch_size": 8}
            job = QuantizeJob(str(source(kind)), str(output), activations="static", calibration=str(data), **options)
            known[kind] = quantize_checkpoint(job).directory
        return known[kind]

    return directory


@pytest.fixture(scope="session")
def inputs(flat_images: Path, checkpoint: Callable[[str], Path]) -> Callable[[str], dict[str, Tensor]]:
    """Five samples like those of the calibration: of what is far from them much may be clipped."""

    def of(kind: str) -> dict[str, Tensor]:
        name = KINDS[kind][0]
        if name in tiny.TEXT_MODELS:
            return tiny.inputs(name, 5)
        images = [Image.open(file) for file in sorted(flat_images.iterdir())[:5]]
        processor = transformers.AutoImageProcessor.from_pretrained(checkpoint(name))
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}

    return of


def first_output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs)[0]
    return found


@pytest.mark.parametrize("kind", [*FAST, *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k not in FAST)])
def test_it_is_close_to_what_it_was_made_from_and_reloads(
    kind: str, source: Callable[[str], Path], made: Made, inputs: Callable[[str], dict[str, Tensor]]
) -> None:
    name = KINDS[kind][0]
    before, after = load_dense(source(kind), allow_compressed=True).model, vitshrink.load(made(kind))
    samples = inputs(kind)
    expected, found = first_output(before, samples), first_output(after, samples)
    assert (found - expected).norm() < 0.1 * expected.norm()  # random weights; as far as without rounded inputs
    products = [module for module in after.modules() if isinstance(module, StaticProduct)]
    assert products
    assert not [m for m in after.base_model.get_submodule("embeddings").modules() if type(m) is nn.Conv2d] or (
        kind == "mixed tokens"
    )
    stock = getattr(transformers, name).from_pretrained(made(kind)).eval()
    assert torch.equal(first_output(stock, samples), found)
    report = json.loads((made(kind) / "report.json").read_text())
    assert report["quantization"] == {"weights": "int8", "activations": "static"}
    assert report["calibration"]["samples"] == 16


@pytest.mark.parametrize("kind", [*FAST, *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k not in FAST)])
def test_onnx_multiplies_the_same_integers(
    kind: str, made: Made, tmp_path: Path, inputs: Callable[[str], dict[str, Tensor]]
) -> None:
    found = export(str(made(kind)), str(tmp_path / "out"), "onnx")
    assert found.rounding > 0
    graph = onnx.load(found.directory / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    model, copy = vitshrink.load(made(kind)), load_exported(found.directory / "model.onnx").model
    products = [module for module in model.modules() if isinstance(module, StaticProduct)]
    integers = sum(tensor.data_type == onnx.TensorProto.INT8 for tensor in graph.initializer)
    assert integers >= len(products)
    some = sum(isinstance(module, Merging) for module in model.modules())  # in the last block only some tokens ask
    assert kinds.count("QuantizeLinear") <= len(products) + some
    assert kinds.count("DequantizeLinear") == kinds.count("QuantizeLinear") + len(products)
    samples = inputs(kind)
    expected = first_output(model, samples)
    assert (first_output(copy, samples) - expected).abs().max() <= max(2 * found.rounding, 1e-3)


@pytest.mark.parametrize(
    "kind", ["dense", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "dense")]
)
def test_openvino_multiplies_integers(kind: str, made: Made, tmp_path: Path) -> None:
    pytest.importorskip("openvino", exc_type=ImportError)
    model = vitshrink.load(made(kind))
    products = [module for module in model.modules() if isinstance(module, StaticProduct)]
    grids = [module for module in products if isinstance(module, StaticLinear) and module.spec.output_bits]
    assert grids
    assert all(int(module.output_zero) == 128 for module in grids)
    assert integer_kernels(made(kind), tmp_path / "out") >= len(products)


def integer_kernels(checkpoint: Path, output: Path) -> int:
    """How many products OpenVINO computes with integers."""
    import openvino

    found = export(str(checkpoint), str(output), "openvino")
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(found.directory / found.file, "CPU", options)
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    kinds = [node["layerType"].astype(str) for node in nodes]
    fast = [
        node["primitiveType"].astype(str)
        for node, each in zip(nodes, kinds, strict=True)
        if each in ("FullyConnected", "Convolution")
    ]
    return sum("I8" in each or "i8" in each for each in fast)


@pytest.fixture(scope="session")
def outstanding(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model in which one channel of what the MLP reads is far larger than all others."""
    source, output = checkpoint("BertForSequenceClassification"), tmp_path_factory.mktemp("outstanding") / "model"
    model = transformers.BertForSequenceClassification.from_pretrained(source)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.output.LayerNorm.weight[3] *= 100
            layer.intermediate.dense.weight[:, 3] /= 100
    model.save_pretrained(output)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(output)
    return output


def quantized_text(source: Path, output: Path, text_file: Path) -> nn.Module:
    options: dict[str, Any] = {"samples": 16, "holdout": 4, "batch_size": 8}
    job = QuantizeJob(str(source), str(output), activations="static", calibration=str(text_file), **options)
    quantize_checkpoint(job)
    return vitshrink.load(output)


def test_layers_divide_inputs_that_stand_out(outstanding: Path, text_file: Path, tmp_path: Path) -> None:
    model, samples = quantized_text(outstanding, tmp_path / "made", text_file), tiny.inputs("BertModel", 5)
    products = [module for module in model.modules() if isinstance(module, StaticProduct)]
    factors = [module.input_factors for module in products if module.input_factors is not None]
    assert factors
    assert all((each < 1).sum() <= 8 and each.max() == 1 for each in factors)
    expected, found = first_output(load_dense(outstanding).model, samples), first_output(model, samples)
    assert (found - expected).norm() < 0.1 * expected.norm()
    for form in ("onnx", "dense"):
        exported = export(str(tmp_path / "made"), str(tmp_path / form), form)
        copy = load_exported(exported.directory / exported.file).model if form == "onnx" else None
        if copy is not None:
            assert (first_output(copy, samples) - found).abs().max() <= max(2 * exported.rounding, 1e-3)


def test_openvino_multiplies_integers_behind_a_division(outstanding: Path, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", exc_type=ImportError)
    model = quantized_text(outstanding, tmp_path / "made", text_file)
    products = [module for module in model.modules() if isinstance(module, StaticProduct)]
    assert integer_kernels(tmp_path / "made", tmp_path / "out") >= len(products)


@pytest.mark.parametrize("kind", ["dense", "low rank", "text"])
def test_what_stays_in_floating_point_computes_what_it_did(
    kind: str,
    source: Callable[[str], Path],
    outstanding: Path,
    flat_images: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    inputs: Callable[[str], dict[str, Tensor]],
) -> None:
    monkeypatch.setattr(calibrated, "MOST", -1.0)  # then no layer loses little
    path, data = (outstanding, text_file) if kind == "text" else (source(kind), flat_images)
    before = load_dense(path, allow_compressed=True).model
    options: dict[str, Any] = {"samples": 16, "holdout": 4, "batch_size": 8}
    job = QuantizeJob(str(path), str(tmp_path / "out"), activations="static", calibration=str(data), **options)
    found = quantize_checkpoint(job)
    assert "stays in floating point" in " ".join(found.report.warnings)
    expected, given = first_output(before, inputs(kind)), first_output(vitshrink.load(tmp_path / "out"), inputs(kind))
    tolerance = 0.02 if kind == "text" else 1e-4  # the word embeddings have integers
    assert (given - expected).norm() < tolerance * expected.norm()


def test_keys_count_on_patches_where_only_special_tokens_ask() -> None:
    model = tiny.build("ViTForImageClassification").eval()
    with torch.no_grad():
        model.vit.embeddings.position_embeddings[:, 1:, 3] += 50  # so one channel of the patches stands out
    before = len(blocks_of(model)) - 1
    merge_tokens(model, (tokens_of(model),) * before + (1,))
    batch = Batch(tiny.inputs("ViTForImageClassification", 8), None, [], [])
    made = calibrated.calibrated(model, [batch], dtype=torch.float32, device=torch.device("cpu")).model
    block, read = blocks_of(made)[before], []
    block.layernorm_before.register_forward_hook(lambda _norm, _given, x: read.append(x))
    first_output(made, batch.inputs)
    key, (x,) = block.attention.k_proj, read
    reach = key.input_scale * (LEVELS - key.input_zero)
    assert x.amax() > 1.2 * x[:, :1].amax()
    assert 0.9 * x.amax() < reach < 1.1 * x.amax()


@pytest.mark.parametrize("form", ["torch", "dense"])
def test_other_forms_have_it(form: str, made: Made, tmp_path: Path) -> None:
    assert export(str(made("dense")), str(tmp_path / "out"), form).batch_sizes == (1, 2, 7)


def test_a_fixed_grid_is_where_errors_cost_least() -> None:
    tokens = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    tokens[0, 0] = 200  # once: clipping it costs less than steps as wide as it would need
    costs = torch.ones(16)
    grid, loss = best_grid(Values.of(tokens[:, 1:], costs[1:]))
    assert grid.scale < 1.1 * 8 / 255
    whole = Grid.between(float(tokens.min()), float(tokens.max()))
    wide, lost = best_grid(Values.of(tokens, costs))
    assert lost <= Values.of(tokens, costs).loss(whole)
    assert wide.scale <= whole.scale
    assert loss == pytest.approx(float((grid.rounded(tokens[:, 1:]) - tokens[:, 1:]).square().mean(0).sum()), rel=0.05)
    positive, _ = best_grid(Values.of(tokens.abs(), costs))
    assert positive.zero == 0
    assert float(positive.rounded(torch.zeros(()))) == 0


@pytest.mark.parametrize("rank", [None, 5])
def test_a_layer_computes_what_its_integers_say(rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = StaticLinear(12, 7, StaticSpec(rank=rank), bias=True, like=torch.empty(0))
    for product in [layer, *([layer.down] if layer.down is not None else [])]:
        product.integers.copy_(torch.randint(-127, 128, product.integers.shape))
        product.weight.fill_(0.01)
        product.input_scale.fill_(0.05)
        product.input_zero.fill_(100)
    nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    x = torch.randn(3, 4, 12) * 10  # some of it beyond the grid
    with torch.no_grad():
        found = layer(x)
        inner = x
        for product in [layer.down, layer] if layer.down is not None else [layer]:
            rounded = torch.fake_quantize_per_tensor_affine(inner, 0.05, 100, 0, 255)
            inner = rounded @ product.matrix().T
        torch.testing.assert_close(found, inner + layer.bias, rtol=1e-4, atol=1e-4)
        monkeypatch.setattr(structure, "multiplies_integers", lambda *_: False)
        torch.testing.assert_close(layer(x), found, rtol=1e-5, atol=1e-5)


def test_layers_that_are_excluded_stay(source: Callable[[str], Path], flat_images: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"samples": 8, "holdout": 0, "exclude": ("fc2", "projection")}
    job = QuantizeJob(
        str(source("low rank")), str(tmp_path / "out"), activations="static", calibration=str(flat_images), **options
    )
    quantize_checkpoint(job)
    model = vitshrink.load(tmp_path / "out")
    assert not isinstance(model.get_submodule("vit.layers.0.mlp.fc2"), StaticLinear)
    assert isinstance(model.get_submodule("vit.layers.0.mlp.fc1"), StaticLinear)
    assert not any(isinstance(module, StaticConv2d) for module in model.modules())


@pytest.mark.slow
def test_without_vitshrink_loading_fails(made: Made) -> None:
    assert tiny.loads_without_vitshrink(made("dense")) == "mismatch"


def test_what_makes_no_sense_is_explained(made: Made, flat_images: Path, tmp_path: Path) -> None:
    output, data = str(tmp_path / "out"), {"calibration": str(flat_images)}
    for options, message in (
        ({}, r"--activations static .*pass --calibration"),
        ({"weights": "int4", **data}, "needs int8 weights"),
        ({"rounding": "nearest", **data}, "remove --rounding nearest"),
        ({"bits": (4.0,), **data}, "--bits: .*8-bit weights"),
        ({"layers": "mlp", **data}, "--include or --exclude"),
    ):
        with pytest.raises(UsageError, match=message):
            QuantizeJob("model", output, activations="static", **options)
    with pytest.raises(UsageError, match="vitshrink quantize"):
        CompressConfig("model", output, keep=(0.5,), quantize="int8", activations="static", **data)
    with pytest.raises(UsageError, match="already quantized"):
        quantize_checkpoint(QuantizeJob(str(made("dense")), output, activations="static", **data))
