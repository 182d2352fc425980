"""What is computed in bfloat16 beside passes in bfloat16 is as exact as they are."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from vitshrink.models.targets import find_targets
from vitshrink.runtime import heap
from vitshrink.runtime.attention import SHORT, ShortInFull
from vitshrink.runtime.precision import is_narrow, narrow_products, passes_in
from vitshrink.statistics import curvature, stats
from vitshrink.statistics.curvature import collect_curvature
from vitshrink.statistics.halves import half_gram
from vitshrink.statistics.sensitivity import collect_sensitivity
from vitshrink.statistics.stats import Moments

CPU = torch.device("cpu")
NARROW = passes_in(CPU, "bf16")


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_a_gram_of_numbers_that_bfloat16_holds_loses_nothing() -> None:
    x = torch.randn(500, 200).bfloat16().float()
    with narrow_products():
        found = half_gram(x)
    assert off(found, half_gram(x.double())) < 1e-6


@pytest.mark.parametrize("mean", [1.9, 5.01, 100.3])
def test_the_spread_of_a_channel_that_hardly_varies_is_not_what_rounding_makes_of_it(mean: float) -> None:
    """Rounded alike at every token, its square would be off by a hundredth of itself, far more than it varies."""
    x, weights = torch.randn(900, 200), torch.full((900,), 0.3)
    x[:, 2] = mean + 0.001 * x[:, 2]
    moments = Moments(x, weights, narrow=True)
    total, weight = moments.total() / weights.sum(), float(weights.sum())
    found = moments.gram() / weight - torch.outer(total, total)
    exact = x.double() - x.double().mean(0)
    assert (found - exact.T @ exact / 900).abs().max() < 0.02


def test_products_are_as_they_were_outside() -> None:
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    with narrow_products(False):
        assert matmul.fp32_precision == before
    seen = []
    with suppress(ZeroDivisionError), narrow_products():
        seen.append(matmul.fp32_precision)
        seen.append(1 / 0)
    assert seen == ["bf16"]
    assert matmul.fp32_precision == before


def test_passes_are_narrow_where_their_products_are() -> None:
    assert is_narrow(NARROW, CPU)
    assert not is_narrow(passes_in(CPU, "fp16"), CPU)
    assert not is_narrow(nullcontext, CPU)


@dataclass(eq=False)
class Batch:
    inputs: dict[str, Tensor]
    mask: Tensor | None


def batch_of(architecture: str, seed: int) -> Batch:
    inputs = tiny.inputs(architecture, 16, seed)
    return Batch(inputs, inputs["attention_mask"].bool() if "attention_mask" in inputs else None)


@pytest.mark.parametrize("architecture", ["ViTForImageClassification", "BertForSequenceClassification"])
def test_statistics_of_narrow_passes_lose_nothing_in_their_sums(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lose no more than the passes have lost before them: of two errors alike, the root of two."""
    model = tiny.build(architecture)
    batches = [batch_of(architecture, seed) for seed in range(4)]
    targets = find_targets(model)
    names = [target.name for target in targets]

    def found(passes: Any) -> dict[str, list[Tensor]]:
        curved = collect_curvature(model, targets, batches, passes=passes)
        seen = collect_sensitivity(model, names, batches, passes=passes)
        return {
            name: [
                each for each in (*vars(curved[name]).values(), *vars(seen[name]).values()) if isinstance(each, Tensor)
            ]
            for name in names
        }

    exact, narrow = found(nullcontext), found(NARROW)

    @contextmanager
    def wide(_narrow: bool = True) -> Iterator[None]:
        yield

    for module in (curvature, stats):
        monkeypatch.setattr(module, "narrow_products", wide)
    summed = found(NARROW)
    lost = [off(n, e) for name in names for n, e in zip(narrow[name], exact[name], strict=True)]
    before = [off(n, e) for name in names for n, e in zip(summed[name], exact[name], strict=True)]
    assert 0 < sum(before) / len(before) < 0.05
    assert sum(lost) < 1.4 * sum(before)


@pytest.mark.parametrize("masked", [None, torch.bool, torch.float32])
def test_attention_of_short_texts_has_the_gradients_of_float32(masked: torch.dtype | None) -> None:
    heads = [torch.randn(3, 2, 20, 16).bfloat16() for _ in range(3)]
    real = torch.arange(20) < torch.tensor([20, 5, 11])[:, None, None, None]
    mask = (
        None if masked is None else real if masked == torch.bool else torch.zeros(real.shape).masked_fill(~real, -9e9)
    )

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        inputs = [each.to(dtype).requires_grad_() for each in heads]
        same = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
        output = F.scaled_dot_product_attention(*inputs, attn_mask=same)
        assert output.dtype == dtype
        return list(torch.autograd.grad(output.square().sum(), inputs))

    exact, before = gradients(torch.float64), gradients(torch.bfloat16)
    with ShortInFull(), NARROW():
        found = gradients(torch.bfloat16)
    for full, narrow, wanted in zip(found, before, exact, strict=True):
        assert off(full, wanted) < 0.01
        assert off(full, wanted) < 1.05 * off(narrow, wanted)


def test_attention_of_images_stays_as_it_is() -> None:
    heads = [torch.randn(1, 2, SHORT + 1, 16).bfloat16() for _ in range(3)]
    with ShortInFull():
        found = F.scaled_dot_product_attention(*heads)
    assert torch.equal(found, F.scaled_dot_product_attention(*heads))


def test_memory_goes_back_where_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, back = [10, 50, 60, 70, 20, 90, 120], list[int]()
    monkeypatch.setattr(heap.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=now)))
    monkeypatch.setattr(heap, "GROWTH", 45)
    give_back = heap.give_back
    monkeypatch.setattr(heap, "give_back", lambda: (back.append(now), give_back()))
    give_back()
    for now in taken:  # noqa: B007 - read above
        heap.give_back_growth()
    assert back == [60, 120], "more than 45 above the first look, and above the first one after that"
