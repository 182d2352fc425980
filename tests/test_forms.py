"""Forms beside those of a method: a plan mixes them by what they cost and lose, and the model reloads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import vitshrink
from vitshrink.compression.forms import known_forms
from vitshrink.compression.forms.integer import Integer
from vitshrink.config.options import CompressConfig
from vitshrink.errors import GateError, TargetError, UsageError
from vitshrink.jobs.compress import CompressionResult, compress
from vitshrink.jobs.verify import verify_directory
from vitshrink.methods import LayerMethod, available_methods, find_method
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.structures.quantized import QuantizedLinear
from vitshrink.statistics.stats import LinearStats

Mixed = Callable[..., CompressionResult]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitshrink.report.figures.available", lambda: False)


@pytest.fixture
def mixed(vit_directory: Path, flat_images: Path, tmp_path: Path) -> Mixed:
    def run(model: Path = vit_directory, **entries: Any) -> CompressionResult:
        entries = {"forms": ("int8", "int4"), "samples": 12, "holdout": 8, "refine": 0, "latency": (1,)} | entries
        entries = {"calibration": str(flat_images)} | entries
        (result,) = compress(CompressConfig(model=str(model), output=str(tmp_path / "out"), overwrite=True, **entries))
        return result

    return run


def kinds(directory: Path | None) -> tuple[int, int]:
    """Layers of low rank, and layers of integers."""
    assert directory is not None
    modules = list(vitshrink.load(directory).modules())
    return tuple(sum(isinstance(each, kind) for each in modules) for kind in (LowRankLinear, QuantizedLinear))  # type: ignore[return-value]


@pytest.mark.parametrize("method", ["curvature", "whitened", "svd"])
def test_a_plan_mixes_ranks_and_integers_within_its_bytes(mixed: Mixed, method: str) -> None:
    allocation = None if method == "curvature" else "energy"
    found = []
    for size in (50_000, 60_000, 75_000):
        result = mixed(method=method, allocation=allocation, target_size=f"{size}")
        assert result.directory is not None
        assert (result.directory / "model.safetensors").stat().st_size <= size
        assert not [check for check in verify_directory(result.directory) if check.problem]
        found.append(kinds(result.directory))
    assert all(integers for _, integers in found)
    assert any(ranks for ranks, _ in found)


def test_pivots_may_sort_the_outputs_of_a_layer_of_integers(mixed: Mixed, vit_directory: Path) -> None:
    """The second layer of an MLP is of low rank with pivots, the first of integers: its rows are sorted, scales too."""
    result = mixed(include=("fc",), target_size="80kB")
    assert result.directory is not None
    small, dense = vitshrink.load(result.directory), vitshrink.load(vit_directory)
    mixtures = [
        block
        for block in small.base_model.layers  # type: ignore[union-attr]
        if isinstance(block.mlp.fc1, QuantizedLinear) and isinstance(block.mlp.fc2, LowRankLinear)
    ]
    inputs = tiny.inputs("ViTForImageClassification", 4)
    with torch.no_grad():
        difference = (small(**inputs)[0] - dense(**inputs)[0]).norm() / dense(**inputs)[0].norm()
    assert difference < 0.5, mixtures


def test_the_smallest_within_a_bound_may_mix_forms(mixed: Mixed) -> None:
    try:
        result = mixed(max_kl=0.003)
    except GateError as error:
        pytest.fail(str(error))
    alone = mixed(max_kl=0.003, forms=())
    assert result.report.bytes.compressed < alone.report.bytes.compressed


def test_a_text_model_takes_forms_too(mixed: Mixed, checkpoint: Callable[[str], Path], text_file: Path) -> None:
    result = mixed(checkpoint("BertForSequenceClassification"), calibration=str(text_file), target_size="60kB")
    assert kinds(result.directory)[1]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"keep": (0.5,)}, "--keep counts parameters"),
        ({"target_size": "4MB", "quantize": "int8"}, "choose one"),
        ({"target_size": "4MB", "forms": ("int3",)}, "int3"),
        ({"target_size": "4MB", "finetune": "distill"}, "leave one of them out"),
        ({"target_size": "4MB", "method": "qk-joint"}, "--form is for linear layers"),
    ],
)
def test_what_makes_no_sense_is_said_before_the_work(entries: dict[str, Any], message: str, mixed: Mixed) -> None:
    with pytest.raises(UsageError, match=message):
        mixed(**entries)


def test_what_cannot_be_reached_says_what_can(mixed: Mixed) -> None:
    with pytest.raises(TargetError, match=r"--target-size [\d.]+MB"):
        mixed(target_size="3kB")


def test_every_form_that_can_be_asked_for_is_known() -> None:
    assert known_forms() == ["int4", "int8"]
    assert Integer(4, "none").label == "int4"


@pytest.mark.parametrize("name", available_methods())
def test_a_method_prices_noise_as_it_prices_what_it_truncates(name: str) -> None:
    """Errors of independent weights lose, on average, what the method's own metric says of them."""
    method = find_method(name)
    assert isinstance(method, LayerMethod)
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(12, 20, generator=generator).double(), torch.randn(400, 20, generator=generator).double()
    x = x * torch.linspace(0.2, 2, 20).double() + 0.3
    stats = LinearStats.from_inputs(x)
    gradients = torch.randn(400, 12, generator=generator).double()
    gram = gradients.T @ gradients / 400
    stats = LinearStats(
        **{**vars(stats), "gradient_gram": gram, "gradient_power": float(gram.trace()), "gram": stats.gram}
    )
    noise = method.noise(weight, stats, centred=False)
    # a matrix of random entries is no easier to approximate than noise: its whole loss is what noise of its size loses
    whole = [
        float(method.factorise(torch.randn(12, 20, generator=generator).double(), stats, centred=False).loss[0])
        for _ in range(60)
    ]
    assert sum(whole) / 60 == pytest.approx(noise, rel=0.1)
