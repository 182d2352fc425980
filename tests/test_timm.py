"""Models of timm: as the Hub has them and as transformers saves them, in all jobs, and what is refused."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from heads import run
from safetensors.torch import save_file

from vitshrink.errors import CheckpointError, DependencyError
from vitshrink.models.families import family_named
from vitshrink.models.source import read_config

LACKING = [name for name in ("timm", "torchvision") if find_spec(name) is None]
needs_timm = pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)}")

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
IMAGES = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.9}


def write_config(directory: Path, **entries: Any) -> Path:
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 4, "num_features": 32, "global_pool": "token"}
    directory.mkdir()
    document = config | {"model_args": SMALL, "pretrained_cfg": IMAGES | {"num_classes": 4}} | entries
    (directory / "config.json").write_text(json.dumps(document))
    return directory


def write(directory: Path, architecture: str = "vit_tiny_patch16_224") -> Path:
    """As the Hub has it: timm's own config and names."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False, num_classes=4, **SMALL)
    tensors = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    write_config(directory, architecture=architecture)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@needs_timm
@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "beit_base_patch16_224"])
def test_a_model_of_timm_is_compressed_evaluated_exported_and_loaded(architecture: str, tmp_path: Path) -> None:
    import transformers

    data = tiny.write_images(tmp_path / "images", 24)
    model, small = write(tmp_path / "model", architecture), tmp_path / "small"
    assert "blocks: 2 in timm_model.blocks" in run("inspect", model)
    calibrated = ("--calibration", data, "--samples", 16, "--holdout", 0)
    run("compress", model, tmp_path / "ranks", "--keep", 0.8, *calibrated)
    run("compress", model, small, "--bits", 4, *calibrated)
    found = json.loads(run("eval", small, "--baseline", model, "--data", data, "--json"))["evaluation"]
    assert 0 < found["fidelity"]["kl"] < 1
    assert (small / "model.safetensors").stat().st_size < (model / "model.safetensors").stat().st_size
    again = transformers.AutoModelForImageClassification.from_pretrained(small)
    again.save_pretrained(tmp_path / "again")
    assert json.loads(run("eval", tmp_path / "again", "--baseline", small, "--data", data, "--json"))["evaluation"][
        "fidelity"
    ]["kl"] == pytest.approx(0, abs=1e-6)
    if find_spec("onnxruntime") is not None:
        run("export", tmp_path / "ranks", tmp_path / "onnx", "--to", "onnx")


@pytest.mark.parametrize(("classes", "wrapper"), [(4, "ForImageClassification"), (0, "Model")])
def test_a_config_of_timm_says_which_wrapper_reads_it(classes: int, wrapper: str, tmp_path: Path) -> None:
    found = read_config(write_config(tmp_path / "model", num_classes=classes))
    assert found["model_type"] == "timm_wrapper"
    assert found["architectures"] == [f"TimmWrapper{wrapper}"]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"architecture": "hf-hub:someone/model"}, "is not the name of a timm model"),
        ({"architecture": "local-dir:/etc"}, "is not the name of a timm model"),
        ({"model_args": {"checkpoint_path": "/tmp/model.pth"}}, "a file for timm to open"),
        ({"model_args": {"num_classes": 4}}, "remove this entry in a copy"),
    ],
)
@pytest.mark.parametrize("model_type", [{}, {"model_type": "timm_wrapper"}])
def test_timm_opens_no_file_that_a_checkpoint_chooses(
    entries: dict[str, Any], said: str, model_type: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_config(write_config(tmp_path / "model", **entries, **model_type))


def test_what_timm_lacks_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "timm" in LACKING:
        with pytest.raises(DependencyError, match=r"timm and torchvision cannot be imported: pip install timm torchv"):
            family_named("timm_wrapper", "TimmWrapperModel", "config.json")
    if "torchvision" not in LACKING:
        pytest.skip("torchvision is installed")
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DependencyError, match=r"and torchvision cannot be imported: pip install torchvision"):
        family_named("timm_wrapper", "TimmWrapperModel", "another.json")


@pytest.mark.skipif(not LACKING, reason="timm and torchvision are installed")
def test_a_torchvision_for_another_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, line in {"timm": "import torchvision", "torchvision": "raise RuntimeError('no operator nms')"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DependencyError, match=r"timm cannot be imported \(no operator nms\): install the torchvision"):
        family_named("timm_wrapper", "TimmWrapperModel", "a third.json")
