"""Configs that are valid JSON and mean harm, or just something unusual."""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vitshrink.config import CompressConfig
from vitshrink.errors import CheckpointError
from vitshrink.models import load_dense
from vitshrink.pipeline import compress


@pytest.fixture
def changed(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    def change(name: str = "ViTForImageClassification", **entries: Any) -> Path:
        directory = Path(shutil.copytree(checkpoint(name), tmp_path / "changed"))
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | entries))
        return directory

    return change


@pytest.mark.parametrize(
    "entries",
    [
        {"hidden_size": 60_000},
        {"hidden_size": 2 * 10**9},
        {"intermediate_size": 10**9},
        {"image_size": 10**6},
        {"patch_size": 20_000, "image_size": 20_000},
        {"num_labels": 10**9},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 10**12},
    ],
    ids=lambda entries: next(iter(entries)),
)
def test_a_huge_number_takes_no_memory(entries: dict[str, Any], changed: Callable[..., Path]) -> None:
    directory = changed(**entries)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"config\.json|cannot load"):
        load_dense(directory)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 500, f"{grown:.0f} MiB"


def test_a_huge_vocabulary_takes_no_memory(changed: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="word_embeddings"):
        load_dense(changed("BertForSequenceClassification", vocab_size=10**10))


@pytest.mark.parametrize("entry", ["return_dict", "output_hidden_states", "output_attentions", "torchscript"])
@pytest.mark.parametrize("method", ["svd", "curvature"])
def test_models_that_give_their_outputs_otherwise_are_compressed_alike(
    entry: str,
    method: str,
    changed: Callable[..., Path],
    vit_directory: Path,
    flat_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vitshrink.report.figures.available", lambda: False)
    flags: dict[str, Any] = {"method": method, "keep": (0.7,), "calibration": str(flat_images)}
    flags |= {"samples": 8, "holdout": 4, "refine": 0}
    unusual = changed(**{entry: entry != "return_dict"})
    weights = []
    for number, model in enumerate((vit_directory, unusual)):
        compress(CompressConfig(str(model), str(tmp_path / f"out-{number}"), **flags))
        weights.append(load_file(tmp_path / f"out-{number}" / "model.safetensors"))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("samples", ["one", "the same again and again"])
def test_one_sample_is_enough_and_so_are_copies_of_it(
    samples: str, vit_directory: Path, flat_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitshrink.report.figures.available", lambda: False)
    (tmp_path / "images").mkdir()
    for number in range(1 if samples == "one" else 6):
        shutil.copy(flat_images / "000.png", tmp_path / "images" / f"{number}.png")
    config = CompressConfig(
        str(vit_directory), str(tmp_path / "out"), keep=(0.6,), calibration=str(tmp_path / "images"), samples=4
    )
    (result,) = compress(config)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(tmp_path / "out" / "model.safetensors").values())
    assert any("samples" in warning for warning in result.report.warnings) == (samples == "one")


def test_a_checkpoint_of_another_process_that_is_being_written_is_refused(vit_directory: Path, tmp_path: Path) -> None:
    """Half a file, as a copy that is still under way leaves it."""
    directory = Path(shutil.copytree(vit_directory, tmp_path / "half"))
    blob = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(blob[: len(blob) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_dense(directory)


def test_a_python_file_in_a_checkpoint_is_never_run(changed: Callable[..., Path], tmp_path: Path) -> None:
    directory = changed()
    mark = tmp_path / "run"
    for name in ("modeling_vit.py", "configuration_vit.py", "sitecustomize.py", "__init__.py"):
        (directory / name).write_text(f"open({str(mark)!r}, 'w')")
    program = f"from vitshrink import load; load({str(directory)!r})"
    root = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r}); {program}"], check=True)
    assert not mark.exists()


def test_a_tensor_of_nothing_is_no_crash(vit_directory: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(vit_directory, tmp_path / "empty"))
    tensors = load_file(directory / "model.safetensors")
    tensors["classifier.weight"] = torch.zeros(0, 32)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"classifier\.weight"):
        load_dense(directory)
