"""Runtimes: what they give, what they open, and what is said where they cannot."""

import shutil
from pathlib import Path

import pytest
import tiny
import torch

from vitshrink.config.options import DataConfig
from vitshrink.config.run import RUNTIMES as TOLD
from vitshrink.errors import DependencyError, UsageError
from vitshrink.jobs.evaluate import evaluate_checkpoint
from vitshrink.jobs.export import export
from vitshrink.models import runtimes
from vitshrink.models.example import example_inputs
from vitshrink.models.exported import exported_file
from vitshrink.models.runtimes import RUNTIMES, Program, find_runtime


def test_every_runtime_is_told_on_the_command_line() -> None:
    assert set(TOLD) == set(RUNTIMES)
    files = {path.stem for path in Path(runtimes.__file__).parent.glob("*.py")} - {"__init__", "registry"}
    assert files == {name.replace("-", "_") for name in RUNTIMES}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, where it first compiles
@pytest.mark.parametrize(
    "name", ["torch", pytest.param("torch-compile", marks=pytest.mark.slow), "onnxruntime", "openvino"]
)
def test_a_runtime_gives_what_the_model_does(name: str) -> None:
    for package in {"onnxruntime": ("onnxruntime",), "openvino": ("openvino",)}.get(name, ()):
        pytest.importorskip(package, exc_type=ImportError)
    if name == "torch-compile" and not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    model, runtime = tiny.build("ViTForImageClassification"), find_runtime(name)
    running = runtime.compile(Program.of(model))
    inputs = example_inputs(model, 3)
    with torch.inference_mode():
        torch.testing.assert_close(running(**inputs)["logits"], model(**inputs).logits, rtol=0, atol=1e-4)
    assert runtime.described.startswith(f"{name} ")


def test_a_runtime_that_is_missing_or_unknown_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="Did you mean 'openvino'"):
        find_runtime("openvin")
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(DependencyError, match=r"--runtime openvino needs .*pip install \"vitshrink\[openvino\]\""):
        find_runtime("openvino")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DependencyError, match="C\\+\\+ compiler"):
        find_runtime("torch-compile")


def test_an_exported_directory_is_evaluated_and_timed_in_a_runtime(
    vit_directory: Path, learned_images: Path, tmp_path: Path
) -> None:
    found = export(str(vit_directory), str(tmp_path / "out"), "onnx")
    data = DataConfig(str(learned_images))
    assert exported_file(str(found.directory)) == found.directory / "model.onnx"
    mixed = evaluate_checkpoint(str(found.directory), data, baseline=str(vit_directory), limit=4, latency=(2,))
    latency = mixed.latency_record
    assert latency is not None
    assert latency.dense is not None
    assert latency.compressed is not None
    assert latency.dense.runtime is None
    assert str(latency.compressed.runtime).startswith("onnxruntime ")
    options = {"limit": 4, "latency": (1,), "number_of_threads": 1}
    with pytest.raises(UsageError, match=r"--runtime torch: .*model\.onnx is for onnxruntime or openvino"):
        evaluate_checkpoint(str(found.directory), data, runtime="torch", **options)  # type: ignore[arg-type]
    same = evaluate_checkpoint(
        str(found.directory),
        data,
        baseline=str(vit_directory),
        runtime="onnxruntime",
        **options,  # type: ignore[arg-type]
    ).latency_record
    assert same is not None
    assert same.dense is not None
    assert same.compressed is not None
    assert same.dense.runtime == same.compressed.runtime == find_runtime("onnxruntime").described
    assert same.dense.threads == 1


def test_an_ir_is_evaluated_like_the_checkpoint(vit_directory: Path, learned_images: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", exc_type=ImportError)
    found = export(str(vit_directory), str(tmp_path / "out"), "openvino")
    data = DataConfig(str(learned_images))
    for name in (str(found.directory), str(found.directory / "model.xml")):
        ours = evaluate_checkpoint(name, data, baseline=str(vit_directory), limit=8)
        assert ours.footprint.bytes == found.bytes
        fidelity = ours.measurement.evaluation.fidelity
        assert fidelity is not None
        assert fidelity.kl == pytest.approx(0, abs=1e-6)
