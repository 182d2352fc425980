"""Pivots: the same matrix in fewer numbers, well conditioned, without a gather."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitshrink.errors import CheckpointError, NumericsError
from vitshrink.methods.ranks import rank_cost
from vitshrink.models.gauge import best_window, pivots_first
from vitshrink.models.structures.low_rank import LayerSpec, LowRankLinear


def factors(m: int, n: int, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(m, rank, generator=generator, dtype=torch.float64),
        torch.randn(rank, n, generator=generator, dtype=torch.float64),
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(2, 20), st.data())
def test_a_pivoted_layer_is_the_same_matrix_in_its_degrees_of_freedom(m: int, n: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, n - 1))
    pivot = data.draw(st.integers(0, n - rank))
    up, down = factors(m, n, rank)
    bias = torch.arange(m, dtype=torch.float64)
    layer = LowRankLinear.from_factors(up, down, bias, dtype=torch.float64, pivot=pivot)
    assert sum(p.numel() for p in layer.parameters()) == rank_cost(m, n, rank, "gauge") + m
    x = torch.randn(2, 3, n, dtype=torch.float64)
    expected = x @ (up @ down).T + bias
    scale = expected.abs().max()
    torch.testing.assert_close(layer(x) / scale, expected / scale, rtol=0, atol=1e-6)
    assert layer(x[0, 0]).shape == (m,)
    torch.testing.assert_close(layer.dense_weight() / scale, up @ down / scale, rtol=0, atol=1e-6)


def test_gradients_flow_through_both_forms_alike() -> None:
    up, down = factors(6, 10, 4)
    x = torch.randn(5, 10, dtype=torch.float64)
    gradients = []
    for pivot in (None, 3):
        layer = LowRankLinear.from_factors(up, down, None, dtype=torch.float64, pivot=pivot)
        probe = x.clone().requires_grad_()
        layer(probe).square().sum().backward()
        assert probe.grad is not None
        gradients.append(probe.grad)
        assert all(parameter.grad is not None for parameter in layer.parameters())
    torch.testing.assert_close(*gradients)


def test_a_good_end_is_taken_and_otherwise_the_best_window() -> None:
    _, down = factors(8, 64, 8)
    assert best_window(down) in (0, 56)
    down[:, :8] = 0
    down[:, 56:] = 0
    assert 8 <= best_window(down) <= 48


def test_dead_inputs_everywhere_are_an_error() -> None:
    down = torch.zeros(4, 32, dtype=torch.float64)
    down[torch.arange(4), torch.tensor([0, 9, 17, 30])] = 1.0
    with pytest.raises(NumericsError, match="no block"):
        best_window(down)
    assert set(pivots_first(down)[:4].tolist()) == {0, 9, 17, 30}


def test_free_pivots_are_a_permutation_and_better_conditioned_than_any_window() -> None:
    _, down = factors(8, 200, 40)
    order = pivots_first(down)
    assert sorted(order.tolist()) == list(range(200))
    start = best_window(down)
    sorted_condition = torch.linalg.cond(down[:, order][:, :40])
    assert sorted_condition < torch.linalg.cond(down[:, start : start + 40])


def test_pivots_that_do_not_span_the_rows_are_refused() -> None:
    up, down = factors(6, 10, 4)
    down[:, 2] = down[:, 3]
    with pytest.raises(NumericsError, match="do not span"):
        LowRankLinear.from_factors(up, down, None, dtype=torch.float64, pivot=0).set_factors(up, 0 * down)


def test_a_description_outside_the_layer_is_refused() -> None:
    with pytest.raises(CheckpointError, match="do not exist"):
        LowRankLinear(8, 4, LayerSpec(3, 6))
    for entry in ({"rank": 0}, {"rank": 2, "pivot": -1}, {"rank": True}, {"rank": 2, "form": 1}, {"pivot": 1}, 3):
        with pytest.raises(CheckpointError):
            LayerSpec.from_dict(entry)
    for spec in (LayerSpec(3), LayerSpec(3, 0)):
        assert LayerSpec.from_dict(spec.to_dict()) == spec
