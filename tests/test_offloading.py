"""A model whose blocks are on a device one at a time: the lazy backend of torch stands for a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch._lazy.ts_backend
from torch import nn

from vitshrink.config.data import DataConfig
from vitshrink.config.options import CompressConfig
from vitshrink.errors import UsageError
from vitshrink.jobs.compress import compress
from vitshrink.jobs.evaluate import evaluate_checkpoint
from vitshrink.models.checkpoint import load
from vitshrink.models.example import example_inputs
from vitshrink.models.targets import blocks_of
from vitshrink.models.views import view_of
from vitshrink.runtime.offloading import offload, recall

torch._lazy.ts_backend.init()
vars(torch)["lazy"] = torch.cpu  # where torch looks for what a device can
LAZY = torch.device("lazy:0")


@pytest.fixture(autouse=True)
def what_the_lazy_backend_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)


def devices(block: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in block.parameters()}


def test_one_block_is_there_at_a_time_forward_and_backward() -> None:
    """Of the model, and of a view with other weights."""
    dense = tiny.build("ViTForImageClassification").eval()
    pixels = torch.randn(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, requires_grad=True)
    expected = dense(pixels).logits
    (wanted,) = torch.autograd.grad(expected.sum(), pixels)
    offload(blocks_of(dense), LAZY)
    view, seen = view_of(dense), list[list[set[str]]]()
    for block in blocks_of(view):
        block.get_submodule("mlp").register_forward_hook(
            lambda *_: seen.append([devices(each) for each in blocks_of(view)])
        )
    outputs = view(pixels).logits
    (gradient,) = torch.autograd.grad(outputs.sum(), pixels)
    assert outputs.device.type == gradient.device.type == "cpu"
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(gradient, wanted)
    for running, found in enumerate(seen):
        assert [each == {"lazy"} for each in found] == [number == running for number in range(len(found))]
    assert all(devices(block) == {"cpu"} for block in blocks_of(view))
    blocks_of(view)[0].get_submodule("mlp").register_forward_pre_hook(lambda *_: [].pop())
    with pytest.raises(IndexError):
        view(pixels)
    assert all(devices(block) == {"cpu"} for block in blocks_of(view))
    recall(blocks_of(dense))
    assert torch.equal(dense(pixels).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("ViTForImageClassification", {"method": "curvature", "keep": 0.8, "refine": 1}),
        ("BertForSequenceClassification", {"method": "curvature", "keep": 0.8, "refine": 1}),
        ("ViTForImageClassification", {"method": "whitened", "keep": 0.8}),
        ("BertForSequenceClassification", {"bits": 4}),
        ("ViTForImageClassification", {"bits": 4}),
    ],
)
def test_a_job_gives_what_it_gives_without(
    name: str,
    entries: dict[str, Any],
    checkpoint: Callable[[str], Path],
    flat_images: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    model, data = str(checkpoint(name)), str(text_file if name in tiny.TEXT_MODELS else flat_images)
    given = {"model": model, "calibration": data, "samples": 8, "holdout": 4, "precision": "no", **entries}
    (plain,) = compress(CompressConfig.from_mapping({**given, "output": str(tmp_path / "plain")}))
    there = {"output": str(tmp_path / "there"), "device": "lazy", "offload": True}
    (result,) = compress(CompressConfig.from_mapping({**given, **there}))
    assert result.report.latency is None
    assert plain.report.latency is not None
    one, other = (load(tmp_path / name).eval() for name in ("plain", "there"))
    inputs = example_inputs(one, 4)
    with torch.no_grad():
        torch.testing.assert_close(other(**inputs).logits, one(**inputs).logits, rtol=1e-3, atol=1e-3)
    kl = [each.report.evaluation.fidelity.kl for each in (plain, result)]
    assert kl[1] == pytest.approx(kl[0], rel=0.01)


def test_an_evaluation_is_that_without(compressed: Callable[..., Any], flat_images: Path) -> None:
    result = compressed("ViTForImageClassification", method="svd")
    options: dict[str, Any] = {"baseline": result.report.model}
    data = DataConfig(str(flat_images))
    plain = evaluate_checkpoint(str(result.directory), data, **options)
    there = evaluate_checkpoint(str(result.directory), data, **options, device="lazy", offload=True)
    assert there.measurement.evaluation.fidelity.kl == pytest.approx(plain.measurement.evaluation.fidelity.kl, rel=1e-4)


def test_what_cannot_be_offloaded_is_refused(vit_directory: Path, tmp_path: Path) -> None:
    entries: dict[str, Any] = {
        "model": str(vit_directory),
        "output": str(tmp_path / "out"),
        "keep": 0.8,
        "method": "svd",
    }
    with pytest.raises(UsageError, match="this job runs on the CPU: remove --offload"):
        compress(CompressConfig.from_mapping({**entries, "offload": True, "device": "cpu"}))
    with pytest.raises(UsageError, match="--tokens needs the whole model on the GPU: remove it, or remove --offload"):
        CompressConfig.from_mapping(
            {**entries, "offload": True, "tokens": "merge", "token_operations": 0.8, "calibration": "x"}
        )
