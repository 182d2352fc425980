"""Recovery of matrices that are stored as entropy-coded integers, through the public jobs."""

import copy
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_finetuning import run
from transformers import PreTrainedModel

import vitshrink
from vitshrink.config.options import FinetuneConfig
from vitshrink.data import Preprocessor, open_samples
from vitshrink.jobs.compress import CompressionResult
from vitshrink.models.structures.coded import hold
from vitshrink.recovery import Material, recover
from vitshrink.recovery.training import Loop
from vitshrink.report import Report
from vitshrink.runtime.observer import Job, Silent

SIZE = 18_000
QUICK: dict[str, Any] = {"epochs": 4.0, "batch_size": 8, "learning_rate": 1e-3, "precision": "no"}
FLAGS = ("--epochs", 12, "--batch-size", 8, "--learning-rate", 1e-3, "--precision", "no", "--offline", "--quiet")


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
    assert len(recovery.blocks) == 2, "integers are made anew"
    assert all(block.after <= block.before for block in recovery.blocks)
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

    def dies(loop: Loop, at: int) -> str:
        if loop.progress.step == at:
            raise Killed
        return healthy(loop)

    again = ("finetune", small, tmp_path / "again", *words[3:], "--checkpoints", tmp_path / "state")
    for step in (0, 5):  # before a state of the training was saved, and after that
        with monkeypatch.context() as patch:
            patch.setattr(Loop, "_after_step", partialmethod(dies, step))
            with pytest.raises(Killed):
                run(*again)
    assert run(*again).exit_code == 0
    assert not (tmp_path / "state").exists()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_integers_are_made_anew_unless_they_are_to_be_kept(
    compressed: Callable[..., CompressionResult], vit_directory: Path, class_images: Path, tmp_path: Path
) -> None:
    gained = set[str]()
    for size in ("20000", "22000", "26000"):  # of random weights, some gain nothing on what is held out
        small = compressed("ViTForImageClassification", target_size=size).directory
        assert small is not None
        words = ("--teacher", vit_directory, "--data", class_images, *FLAGS)
        codes = {}
        for epochs in (0, 4):
            output = tmp_path / f"{size}-{epochs}"
            assert run("finetune", small, output, *words, "--rounding", epochs).exit_code == 0
            recovery = Report.read(output).recovery
            assert recovery is not None
            assert bool(recovery.blocks) == bool(epochs)
            codes[epochs] = _codes(output)
        before = _codes(small)
        assert all(codes[0][name].equal(before[name]) for name in before)
        changed = [name for name in before if not codes[4][name].equal(before[name])]
        assert all("layer" in name for name in changed), "those of the blocks"
        assert all(len(codes[4][name]) <= len(before[name]) for name in before)
        gained.update(changed)
    assert gained


def _codes(directory: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(directory / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.endswith("codes")}


def test_integers_that_training_only_harms_stay_as_they_were(
    small: Path, vit_directory: Path, class_images: Path, tmp_path: Path
) -> None:
    words = ("finetune", small, tmp_path / "out", "--teacher", vit_directory, "--data", class_images, *FLAGS)
    result = run(*words, "--learning-rate", 30, "--rounding", 0)
    assert result.exit_code == 0, result.stderr
    assert any("gained nothing" in warning for warning in Report.read(tmp_path / "out").warnings)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()


def test_integers_that_are_no_better_anew_stay_as_they_were(
    small: Path, vit_directory: Path, class_images: Path
) -> None:
    def to_zero(weight: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(weight), weight

    samples = open_samples(class_images, "image")
    preprocessor = Preprocessor.from_checkpoint(small, "image")
    models = []
    for rounder in (to_zero, None):
        model = vitshrink.load(small).float()
        config = FinetuneConfig(**QUICK | {"epochs": 0.1})
        recovery = recover(
            model,
            vitshrink.load(vit_directory),
            Material(samples),
            preprocessor,
            config,
            Job(Silent()),
            rounder=rounder,
        )
        assert all(block.get("after") == block.get("before") for block in recovery.blocks)
        assert recovery.after <= recovery.before
        models.append(model.state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])


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
