"""Export to ONNX, to a dense checkpoint and to a torch.export program: what comes out computes what went in."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from typer.testing import CliRunner

import vitshrink
from vitshrink.cli.app import app
from vitshrink.config.options import DataConfig
from vitshrink.errors import CheckpointError, DependencyError, OutputError, UsageError
from vitshrink.jobs import export as exporting
from vitshrink.jobs import export_forms as forms
from vitshrink.jobs.compress import CompressionResult
from vitshrink.jobs.evaluate import evaluate_checkpoint
from vitshrink.jobs.export import Export, export
from vitshrink.jobs.session import Session
from vitshrink.models.exported import load_exported
from vitshrink.models.openvino_model import open_ir
from vitshrink.models.tracing import quiet

Compressed = Callable[..., CompressionResult]
MODELS = (
    "ViTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "BertForSequenceClassification",
    "BertForMaskedLM",
    "BertModel",
)


@pytest.fixture(scope="session")
def small(compressed: Compressed) -> Callable[[str], Path]:
    def directory(name: str) -> Path:
        found = compressed(name, method="svd", compensation="none", keep=(0.8,)).directory
        assert found is not None
        return found

    return directory


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, small: Callable[[str], Path]) -> Callable[[str, str], Export]:
    """The result of an export, which is run once for every model and form."""
    root = tmp_path_factory.mktemp("exported")
    known: dict[tuple[str, str], Export] = {}

    def result(name: str, form: str) -> Export:
        if (name, form) not in known:
            known[name, form] = export(str(small(name)), str(root / f"{name}-{form}"), form)
        return known[name, form]

    return result


@pytest.mark.parametrize("name", [MODELS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS[1:])])
def test_onnx_gives_the_outputs_of_the_model(
    exported: Callable[..., Export], small: Callable[..., Path], name: str
) -> None:
    found = exported(name, "onnx")
    assert 0 <= found.difference <= 1e-4 * max(1, found.largest)
    assert found.bytes == (found.directory / "model.onnx").stat().st_size
    assert str(Path(torch.__file__).parents[1]).encode() not in (found.directory / "model.onnx").read_bytes()
    model, copy = vitshrink.load(small(name)), load_exported(found.directory / "model.onnx").model
    for batch in (1, 5):
        inputs = tiny.inputs(name, batch)
        with torch.no_grad():
            expected, outputs = model(**inputs), copy(**inputs)
        assert outputs.keys() == expected.keys()
        for key, values in expected.items():
            assert torch.allclose(outputs[key], values, atol=1e-4), key


@pytest.mark.parametrize("form", ["onnx", "openvino"])
@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertForSequenceClassification"])
def test_a_program_for_one_size_of_batches_is_fed_with_all(
    small: Callable[..., Path], name: str, form: str, tmp_path: Path
) -> None:
    if form == "openvino":
        pytest.importorskip("openvino")
    found = export(str(small(name)), str(tmp_path / "out"), form, batch_size=3)
    assert found.batch_sizes == (3,)
    model, copy = vitshrink.load(small(name)), load_exported(found.directory / found.file).model
    assert copy.file.batch == 3
    for batch in (1, 3, 7):
        inputs = tiny.inputs(name, batch)
        with torch.no_grad():
            assert torch.allclose(copy(**inputs).logits, model(**inputs).logits, atol=1e-4)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertForMaskedLM"])
def test_a_dense_checkpoint_loads_without_vitshrink(
    exported: Callable[..., Export], small: Callable[..., Path], name: str
) -> None:
    found = exported(name, "dense")
    assert any("not smaller" in warning for warning in found.warnings)
    config = json.loads((found.directory / "config.json").read_text())
    assert "quantization_config" not in config
    stock = getattr(transformers, name).from_pretrained(found.directory).eval()
    assert not any(type(module).__module__.startswith("vitshrink") for module in stock.modules())
    inputs = tiny.inputs(name)
    with torch.no_grad():
        assert torch.allclose(stock(**inputs).logits, vitshrink.load(small(name))(**inputs).logits, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", pytest.param("BertForSequenceClassification", marks=pytest.mark.slow)]
)
def test_a_program_takes_batches_of_any_size(
    exported: Callable[..., Export], small: Callable[..., Path], name: str
) -> None:
    found = exported(name, "torch")
    program = torch.export.load(found.directory / "model.pt2").module()
    model = vitshrink.load(small(name))
    for batch in (1, 4):
        inputs = tiny.inputs(name, batch)
        inputs |= {} if name.startswith("ViT") else {"token_type_ids": torch.zeros_like(inputs["input_ids"])}
        with torch.no_grad():
            assert torch.allclose(program(**inputs).logits, model(**inputs).logits, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scorer", "levels", "budget"),
    [
        ("ViTForImageClassification", "blur", 2, 10),
        ("ViTForImageClassification", "features", 2, 4),  # no patch is split
        ("DeiTForImageClassificationWithTeacher", "features", 3, 9),
    ],
)
def test_mixed_tokens_become_onnx(
    name: str, scorer: str, levels: int, budget: int, compressed: Compressed, tmp_path: Path
) -> None:
    tokens: dict[str, Any] = {"tokens": "mixed", "token_budget": budget, "token_levels": levels, "token_scorer": scorer}
    small = compressed(name, method="svd", **tokens).directory
    found = export(str(small), str(tmp_path / "out"), "onnx")
    model, copy = vitshrink.load(str(small)), load_exported(found.directory / "model.onnx").model
    pixels = tiny.inputs(name, 5)["pixel_values"]
    pixels[1] = 0.5  # no patch is better than another: the first ones are split
    pixels[2, :, 16:] = -0.25
    for batch in (pixels, pixels[:1]):
        with torch.no_grad():
            torch.testing.assert_close(copy(pixel_values=batch).logits, model(batch).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_quantized_mixed_tokens_take_batches_of_any_size(form: str, compressed: Compressed, tmp_path: Path) -> None:
    name = "ViTForImageClassification"
    small = compressed(name, method="svd", tokens="mixed", token_budget=10, quantize="int8").directory
    assert export(str(small), str(tmp_path / "out"), form).batch_sizes == (1, 2, 7)


def test_the_exporters_own_reason_is_given() -> None:
    """Not the outermost message, which says in which of its steps it was."""
    with pytest.raises(OutputError, match=r"failed: KeyError: 'what it was'$"), quiet():
        raise RuntimeError("step 3/3") from KeyError("what it was")


def test_an_onnx_file_is_evaluated_like_the_checkpoint(
    exported: Callable[..., Export], small: Callable[..., Path], learned_images: Path, vit_directory: Path
) -> None:
    found, data = exported("ViTForImageClassification", "onnx"), DataConfig(str(learned_images))
    ours = evaluate_checkpoint(str(small("ViTForImageClassification")), data, baseline=str(vit_directory))
    theirs = evaluate_checkpoint(str(found.directory / "model.onnx"), data, baseline=str(vit_directory))
    assert theirs.measurement.evaluation.compressed == ours.measurement.evaluation.compressed
    assert theirs.footprint.bytes == found.bytes
    assert theirs.footprint.parameters == found.parameters >= ours.footprint.parameters
    with pytest.raises(UsageError, match="run on the CPU"):
        evaluate_checkpoint(str(found.directory / "model.onnx"), data, device="cuda")
    with pytest.raises(UsageError, match=r"--landmarks: .*model\.onnx is an exported file"):
        evaluate_checkpoint(str(found.directory / "model.onnx"), data, landmarks=4)


@pytest.mark.slow
def test_an_onnx_masked_lm_is_evaluated(
    exported: Callable[..., Export], masked_lm_directory: Path, text_file: Path, small: Callable[..., Path]
) -> None:
    found = exported("BertForMaskedLM", "onnx")
    scores = [
        evaluate_checkpoint(path, DataConfig(str(text_file)), baseline=str(masked_lm_directory)).measurement.evaluation
        for path in (str(found.directory / "model.onnx"), str(small("BertForMaskedLM")))
    ]
    assert scores[0].compressed == scores[1].compressed
    assert scores[0].fidelity is not None
    assert scores[1].fidelity is not None
    assert scores[0].fidelity.kl == pytest.approx(scores[1].fidelity.kl, rel=1e-3)


def test_a_difference_is_not_published(
    small: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = forms.write_program

    def wrong(session: Session, staging: Path, batch_size: int | None) -> forms.Written:
        written = honest(session, staging, batch_size)
        return replace(written, run=lambda batch: {n: value + 0.01 for n, value in written.run(batch).items()})

    monkeypatch.setitem(forms.FORMS, "torch", wrong)
    with pytest.raises(OutputError, match=r"differs from .* by up to 0.01"):
        export(str(small("ViTForImageClassification")), str(tmp_path / "out"), "torch")
    assert list(tmp_path.iterdir()) == []
    export(str(small("ViTForImageClassification")), str(tmp_path / "out"), "torch", tolerance=0.1)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertForSequenceClassification"])
def test_openvino_gives_the_outputs_of_the_model(small: Callable[..., Path], tmp_path: Path, name: str) -> None:
    pytest.importorskip("openvino", exc_type=ImportError)
    found = export(str(small(name)), str(tmp_path / "out"), "openvino")
    assert {"model.xml", "model.bin", "config.json"} <= {file.name for file in found.directory.iterdir()}
    assert not (found.directory / "model.onnx").exists()
    assert found.bytes == sum((found.directory / file).stat().st_size for file in ("model.xml", "model.bin"))
    model, opened = vitshrink.load(small(name)), open_ir(found.directory / found.file)
    inputs = tiny.inputs(name, 5)  # of another length than any that it was compared with
    inputs |= {} if name.startswith("ViT") else {"token_type_ids": torch.zeros_like(inputs["input_ids"])}
    (logits,) = opened.run(None, {name: inputs[name].numpy() for name in opened.inputs})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(**inputs).logits, rtol=1e-4, atol=1e-4)


STRUCTURES: dict[str, dict[str, Any]] = {
    "mixed tokens": {"method": "svd", "tokens": "mixed", "token_budget": 10},
    "merged tokens": {"tokens": "merge", "token_operations": 0.7, "keep": None},
    "landmarks": {"landmarks": 4, "rank": None},
    "tensor": {"method": "tensor"},
    "smaller heads": {"method": "heads-joint"},
    "integers with rounded activations": {"method": "svd", "quantize": "int8"},
    "coded integers": {"target_size": "22000"},
}


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_becomes_openvino(structure: str, compressed: Compressed, tmp_path: Path) -> None:
    pytest.importorskip("openvino", exc_type=ImportError)
    small = compressed("ViTForImageClassification", **STRUCTURES[structure]).directory
    assert export(str(small), str(tmp_path / "out"), "openvino").batch_sizes == (1, 2, 7)


def test_a_damaged_ir_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("openvino", exc_type=ImportError)
    (tmp_path / "model.xml").write_text("not a model")
    with pytest.raises(CheckpointError, match=r"model\.xml cannot be opened by OpenVINO"):
        open_ir(tmp_path / "model.xml")


@pytest.mark.parametrize(("package", "form"), [("onnxscript", "onnx"), ("openvino", "openvino")])
def test_a_missing_package_is_named_before_the_work(
    package: str, form: str, small: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(exporting, "Session", None)
    with pytest.raises(DependencyError, match=rf'{package}.*pip install "vitshrink\[{form}\]"'):
        export(str(small("ViTForImageClassification")), str(tmp_path / "out"), form)
    assert list(tmp_path.iterdir()) == []


def test_what_makes_no_sense_is_explained(small: Callable[..., Path], vit_directory: Path, tmp_path: Path) -> None:
    model = str(small("ViTForImageClassification"))
    with pytest.raises(UsageError, match="onnx"):
        export(model, str(tmp_path / "out"), "onx")
    with pytest.raises(UsageError, match="give a directory"):
        export(model, str(tmp_path / "model.onnx"), "onnx")
    with pytest.raises(UsageError, match="already is the dense checkpoint"):
        export(str(vit_directory), str(tmp_path / "out"), "dense")
    with pytest.raises(OutputError, match="source model"):
        export(model, model, "torch", overwrite=True)


def test_a_lone_or_damaged_file_is_refused(exported: Callable[..., Export], tmp_path: Path, flat_images: Path) -> None:
    data = DataConfig(str(flat_images))
    with pytest.raises(CheckpointError, match="no such file"):
        evaluate_checkpoint(str(tmp_path / "gone.onnx"), data)
    (tmp_path / "lone.onnx").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match=r"no config\.json beside it"):
        evaluate_checkpoint(str(tmp_path / "lone.onnx"), data)
    config = exported("ViTForImageClassification", "onnx").directory / "config.json"
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    with pytest.raises(CheckpointError, match="cannot be opened"):
        evaluate_checkpoint(str(tmp_path / "lone.onnx"), data)


def test_the_command_prints_the_difference_and_replaces_its_own(small: Callable[..., Path], tmp_path: Path) -> None:
    arguments = ["export", str(small("ViTForImageClassification")), str(tmp_path / "out"), "--to", "torch"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "largest difference" in result.output
    assert CliRunner().invoke(app, arguments).exit_code == 1
    again = CliRunner().invoke(app, [*arguments, "--overwrite", "--json"])
    assert json.loads(again.stdout)["difference"] <= 1e-5
