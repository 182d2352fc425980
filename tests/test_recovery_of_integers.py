"""Recovery of matrices that are stored as entropy-coded integers, through the public jobs."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_finetuning import run
from transformers import PreTrainedModel

import vitshrink
from vitshrink.config.options import FinetuneConfig
from vitshrink.jobs.compress import CompressionResult
from vitshrink.models.structures.coded import hold
from vitshrink.recovery.training import Loop
from vitshrink.report import Report

SIZE = 18_000
QUICK: dict[str, Any] = {"epochs": 4.0, "batch_size": 8, "learning_rate": 1e-3, "precision": "no"}
FLAGS = ("--epochs", 4, "--batch-size", 8, "--learning-rate", 1e-3, "--precision", "no", "--offline", "--quiet")


@pytest.fixture(scope="module")
def small(compressed: Callable[..., CompressionResult]) -> Path:
    directory = compressed("ViTForImageClassification", target_size=str(SIZE)).directory
    assert directory is not None
    return directory


def nbytes(directory: Path) -> int:
    return (directory / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("name", "size"), [("ViTForImageClassification", SIZE), ("BertForSequenceClassification", 28_000)]
)
def test_compress_trains_what_it_rounded_and_keeps_to_the_size(
    compressed: Callable[..., CompressionResult], name: str, size: int
) -> None:
    result = compressed(name, target_size=str(size), finetune=FinetuneConfig(**QUICK))
    assert result.directory is not None
    recovery = result.report.recovery
    assert recovery is not None
    assert recovery.after <= recovery.before
    assert nbytes(result.directory) <= size


def test_a_directory_of_integers_is_trained_to_the_same_size_and_again_after_a_kill(
    small: Path, vit_directory: Path, class_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("finetune", small, tmp_path / "out", "--teacher", vit_directory, "--data", class_images, *FLAGS)
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    recovery = Report.read(tmp_path / "out").recovery
    assert recovery is not None
    assert recovery.after < recovery.before
    assert nbytes(tmp_path / "out") <= nbytes(small)
    before, after = (load_file(each / "model.safetensors") for each in (small, tmp_path / "out"))
    name = "vit.encoder.layer.0.attention.output.dense.weight"
    assert not before[name].equal(after[name]), "steps learn"

    class Killed(BaseException):
        pass

    healthy = Loop._after_step

    def dies(loop: Loop) -> str:
        if loop.progress.step == 5:
            raise Killed
        return healthy(loop)

    again = ("finetune", small, tmp_path / "again", *words[3:], "--checkpoints", tmp_path / "state")
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_after_step", dies)
        with pytest.raises(Killed):
            run(*again)
    assert run(*again).exit_code == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_integers_that_training_only_harms_stay_as_they_were(
    small: Path, vit_directory: Path, class_images: Path, tmp_path: Path
) -> None:
    words = ("finetune", small, tmp_path / "out", "--teacher", vit_directory, "--data", class_images, *FLAGS)
    result = run(*words, "--learning-rate", 30)
    assert result.exit_code == 0, result.stderr
    assert any("gained nothing" in warning for warning in Report.read(tmp_path / "out").warnings)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()


def test_only_what_compression_made_learns_where_that_is_asked_for(
    small: Path, vit_directory: Path, class_images: Path, tmp_path: Path
) -> None:
    words = ("finetune", small, tmp_path / "out", "--teacher", vit_directory, "--data", class_images, *FLAGS)
    assert run(*words, "--train", "factors").exit_code == 0
    before, after = (load_file(each / "model.safetensors") for each in (small, tmp_path / "out"))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert not any("norm" in name or name.endswith("bias") for name in changed)


def test_what_is_judged_follows_a_fused_optimizer(small: Path) -> None:
    model = vitshrink.load(small).float()
    inputs = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def judged(model: PreTrainedModel) -> torch.Tensor:
        logits: torch.Tensor = model.eval()(pixel_values=inputs).logits
        return logits

    judged(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model.train()(pixel_values=inputs).logits.square().sum().backward()
    optimizer.step()
    expected = copy.deepcopy(model)
    hold(expected, "stream")
    assert torch.equal(judged(model), judged(expected))
