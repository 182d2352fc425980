"""Low-rank layers as they are exported: without pivots, balanced, or dense."""

import pytest
import tiny
import torch
from torch import nn

from vitshrink.models.plain import plain, plain_view
from vitshrink.models.structures.low_rank import LowRankLinear


def layer(rank: int, pivot: int | None, *, inputs: int = 12, outputs: int = 20, bias: bool = True) -> LowRankLinear:
    generator = torch.Generator().manual_seed(rank)
    up, down = torch.randn(outputs, rank, generator=generator), torch.randn(rank, inputs, generator=generator)
    shift = torch.randn(outputs, generator=generator) if bias else None
    return LowRankLinear.from_factors(1e3 * up, down, shift, dtype=torch.float64, pivot=pivot)


@pytest.mark.parametrize(("rank", "pivot"), [(3, None), (3, 0), (7, 4), (5, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_factors_are_balanced_and_give_the_same(rank: int, pivot: int | None, bias: bool) -> None:
    before = layer(rank, pivot, bias=bias)
    after = plain(before)
    assert isinstance(after, LowRankLinear)
    assert after.spec.pivot is None
    up, down = after.factors()
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), rtol=1e-8, atol=0)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(after(x), before(x), rtol=1e-8, atol=1e-6)


def test_a_rank_that_saves_no_multiplications_becomes_dense() -> None:
    before = layer(8, 2)  # 8 · 32 > 12 · 20
    after = plain(before)
    assert type(after) is nn.Linear
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(after(x), before(x), rtol=1e-8, atol=1e-6)


def test_the_model_stays_as_it_is() -> None:
    model = tiny.build("ViTModel")
    model.set_submodule("layers.0.mlp.fc1", layer(4, 1, inputs=32, outputs=64))
    before = dict(model.named_modules())
    view = plain_view(model)
    assert not any(isinstance(each, LowRankLinear) and each.spec.pivot is not None for each in view.modules())
    assert dict(model.named_modules()) == before
