"""``verify``: a published directory is what it was, and anything else is told from it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vitshrink.cli.app import app
from vitshrink.jobs.compress import CompressionResult
from vitshrink.runtime import checksums

Tensors = dict[str, torch.Tensor]


def verify(directory: Path, *flags: str) -> Result:
    return CliRunner().invoke(app, ["verify", str(directory), *flags])


@pytest.fixture
def copy(compressed: Callable[..., CompressionResult], tmp_path: Path) -> Path:
    directory = compressed("ViTForImageClassification", method="curvature", keep=(0.7,)).directory
    assert directory is not None
    return Path(shutil.copytree(directory, tmp_path / "copy"))


def change_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertForMaskedLM", "DeiTModel"])
@pytest.mark.parametrize("method", ["svd", "curvature"])
def test_what_compress_wrote_is_verified(name: str, method: str, compressed: Callable[..., CompressionResult]) -> None:
    directory = compressed(name, method=method).directory
    assert directory is not None
    result = verify(directory)
    assert result.exit_code == 0, result.stderr
    assert [line.split()[:2] for line in result.stdout.splitlines()[1:]] == [
        [check, "ok"] for check in ("checksums", "load", "outputs", "parameters", "bytes", "macs", "ranks")
    ]
    assert (verify(directory, "--quiet").stdout, verify(directory, "--quiet").exit_code) == ("", 0)


def test_rendering_the_report_again_keeps_it_whole(copy: Path) -> None:
    (copy / "README.md").write_text("a card of my own")
    assert CliRunner().invoke(app, ["report", str(copy)]).exit_code == 0
    assert verify(copy).exit_code == 0


def test_a_flipped_bit_is_found(copy: Path) -> None:
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-7] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    result = verify(copy)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {copy} differs from what was published. checksums: model.safetensors")
    assert [check["problem"] for check in json.loads(verify(copy, "--json").stdout)][1:] == [None] * 6


def rewrite(copy: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change the weights and their checksum: what is left to find it are the other checks."""
    file = copy / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(change(load_file(file)), file, metadata=metadata)
    checksums.record(copy)


def drop_a_tensor(copy: Path) -> None:
    rewrite(copy, lambda tensors: {name: t for name, t in tensors.items() if not name.endswith("query.down")})


def put_in_nan(copy: Path) -> None:
    rewrite(copy, lambda tensors: tensors | {"classifier.bias": torch.full((4,), torch.nan)})


def lie_about(copy: Path, change: Callable[[dict[str, Any]], None]) -> None:
    change_json(copy / "report.json", change)
    checksums.record(copy)


@pytest.mark.parametrize(
    ("damage", "check", "said"),
    [
        (drop_a_tensor, "load", "down"),
        (put_in_nan, "load", "classifier.bias"),
        (lambda copy: lie_about(copy, lambda r: r["parameters"].update(compressed=7)), "parameters", "says 7"),
        (lambda copy: lie_about(copy, lambda r: r["bytes"].clear()), "bytes", "says None"),
        (lambda copy: lie_about(copy, lambda r: r["bytes"].update(compressed=None)), "report", "'bytes.compressed'"),
        (lambda copy: lie_about(copy, lambda r: r["macs"].clear()), "macs", "says None"),
        (lambda copy: lie_about(copy, lambda r: r["layers"][0].update(rank=1)), "ranks", "report 1, model"),
        (lambda copy: (copy / "report.json").write_text("{"), "report", "not valid JSON"),
        (lambda copy: (copy / "SHA256SUMS").unlink(), "checksums", "SHA256SUMS is missing"),
    ],
)
def test_every_check_finds_what_it_is_for(damage: Callable[[Path], object], check: str, said: str, copy: Path) -> None:
    damage(copy)
    result = verify(copy, "--json")
    assert result.exit_code == 1
    problems = {each["name"]: each["problem"] for each in json.loads(result.stdout) if each["problem"]}
    assert said in problems[check]
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_what_is_no_output_of_vitshrink_is_not_verified(vit_directory: Path, tmp_path: Path) -> None:
    dense = verify(vit_directory)
    assert dense.exit_code == 1
    assert "SHA256SUMS is missing" in dense.stderr
    assert verify(tmp_path / "nowhere").exit_code == 2
    assert "is not a directory" in verify(tmp_path / "nowhere").stderr
