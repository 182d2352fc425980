"""The correlation of attention heads."""

import pytest
import torch

from vitshrink.recovery.techniques.decatt import head_correlation


def test_it_is_that_of_numpy_for_every_pair_of_heads() -> None:
    torch.manual_seed(0)
    outputs = torch.randn(2, 6, 3 * 4, dtype=torch.float64)
    wanted = 0.0
    for sample in outputs:
        rows = sample.view(6, 3, 4).transpose(0, 1).reshape(3, -1)
        rho = torch.corrcoef(rows)
        wanted += float(rho.square().sum() - rho.diagonal().square().sum()) / 2
    assert float(head_correlation(outputs, 3, None)) == pytest.approx(wanted, rel=1e-5)


def test_heads_that_say_the_same_cost_most_and_padding_costs_nothing() -> None:
    one = torch.randn(2, 6, 4)
    same = torch.cat([one, one, -one], -1)
    assert float(head_correlation(same, 3, None)) == pytest.approx(6.0, rel=1e-5)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    changed = same.clone()
    changed[1, 4:] = 100 * torch.randn(2, 12)
    assert torch.equal(head_correlation(same, 3, mask), head_correlation(changed, 3, mask))


def test_a_head_that_says_nothing_has_a_gradient() -> None:
    outputs = torch.zeros(1, 3, 8).requires_grad_()
    head_correlation(outputs, 2, None).backward()
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()
