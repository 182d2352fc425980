"""Repairs after truncation: the mean output is exact, and a fitted residual is never worse than what it starts from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vitshrink.compression.repairs.bias import shifted_bias
from vitshrink.compression.repairs.residual import fit_residual, split_rank
from vitshrink.errors import NumericsError
from vitshrink.methods.svd import svd
from vitshrink.methods.whitened import whitened
from vitshrink.statistics.stats import LinearStats


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(m: int, n: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight (m, n) and inputs (tokens, n) with uneven channels and a mean."""
    weight = torch.randn(m, n, generator=generator(seed), dtype=torch.float64)
    mixing = torch.randn(n, n, generator=generator(seed + 1), dtype=torch.float64)
    channels = torch.logspace(0, -2, n, dtype=torch.float64)
    x = torch.randn(tokens, n, generator=generator(seed + 2), dtype=torch.float64) @ mixing * channels + 0.5
    return weight, x


def error_of(weight: Tensor, up: Tensor, down: Tensor, covariance: Tensor) -> float:
    difference = weight - up @ down
    return float((difference @ covariance * difference).sum())


def least_error(target: Tensor, covariance: Tensor, rank: int) -> float:
    """What the best matrix of this rank leaves of ``target``, from the singular values of target C^½."""
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt()
    return float(torch.linalg.svdvals(target @ root)[rank:].square().sum())


@pytest.mark.parametrize(("m", "n"), [(12, 20), (20, 12), (8, 8)])
def test_a_shifted_bias_makes_the_mean_output_exact(m: int, n: int) -> None:
    weight, x = problem(m, n, 50)
    bias = torch.randn(m, generator=generator(9), dtype=torch.float64)
    factors = svd(weight, None)
    approximation = factors.up[:, :3] @ factors.down[:3]
    repaired = shifted_bias(bias, weight, approximation, x.mean(0))
    wanted, got = (nn.functional.linear(x, w, b) for w, b in ((weight, bias), (approximation, repaired)))
    torch.testing.assert_close(got.mean(0), wanted.mean(0), rtol=0, atol=1e-12)
    unrepaired = nn.functional.linear(x, approximation, bias)
    assert (got - wanted).square().sum() < (unrepaired - wanted).square().sum()


@given(st.integers(1, 500))
def test_a_rank_is_split_into_a_fixed_part_and_a_residual(rank: int) -> None:
    fixed, residual = split_rank(rank)
    assert fixed + residual == rank
    assert fixed >= 0
    assert residual >= 1


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 30),
    st.integers(0, 10**6),
)
def test_the_fit_is_never_worse_than_its_start(m: int, n: int, rank: int, tokens: int, seed: int) -> None:
    rank = min(rank, m, n)
    weight, x = problem(m, n, tokens, seed)
    covariance = x.T @ x / tokens
    factors = svd(weight, None)
    up, down = factors.up[:, :rank], factors.down[:rank]
    fitted = fit_residual(weight, up, down, covariance)
    before, after = error_of(weight, up, down, covariance), error_of(weight, *fitted, covariance)
    scale = float((weight @ covariance * weight).sum())
    assert all(torch.isfinite(part).all() for part in fitted)
    assert [part.shape for part in fitted] == [up.shape, down.shape]
    assert after <= before + 1e-9 * scale


@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("m", "n"), [(24, 40), (40, 24)])
def test_the_fit_comes_close_to_the_closed_form_optimum(m: int, n: int, shift: float) -> None:
    """The start is optimal for the dense model's inputs; the inputs after compression are others."""
    weight, x = problem(m, n, 400)
    moved = x + shift * torch.randn(x.shape, generator=generator(5), dtype=torch.float64) * x.abs().mean(0)
    covariance = LinearStats.from_inputs(moved).covariance(centered=True)
    factors = whitened(weight, LinearStats.from_inputs(x))
    rank = 8
    up, down = factors.up[:, :rank], factors.down[:rank]
    fixed, residual = split_rank(rank)
    best = least_error(weight - up[:, :fixed] @ down[:fixed], covariance, residual)
    found = error_of(weight, *fit_residual(weight, up, down, covariance), covariance)
    assert best * (1 - 1e-9) <= found <= 1.01 * best


def test_a_bad_start_reaches_the_optimum_too() -> None:
    weight, x = problem(20, 30, 400)
    covariance = x.T @ x / len(x)
    up, down = torch.randn(20, 8, generator=generator(1)).double(), torch.randn(8, 30, generator=generator(2)).double()
    fixed, residual = split_rank(8)
    best = least_error(weight - up[:, :fixed] @ down[:fixed], covariance, residual)
    start = error_of(weight, up, down, covariance)
    found = error_of(weight, *fit_residual(weight, up, down, covariance), covariance)
    assert found <= 1.2 * best < start


def test_the_fixed_part_stays_as_it_is() -> None:
    weight, x = problem(16, 24, 100)
    factors = svd(weight, None)
    up, down = factors.up[:, :8].clone(), factors.down[:8].clone()
    fixed, _ = split_rank(8)
    new_up, new_down = fit_residual(weight, up, down, x.T @ x / len(x))
    assert torch.equal(new_up[:, :fixed], up[:, :fixed])
    assert torch.equal(new_down[:fixed], down[:fixed])
    assert not torch.equal(new_up, up)
    assert torch.equal(up, factors.up[:, :8])  # the input is not written to
    assert torch.equal(down, factors.down[:8])


@pytest.mark.parametrize(
    "covariance",
    [
        torch.zeros(10, 10, dtype=torch.float64),
        torch.diag(torch.tensor([1.0] + [0.0] * 9, dtype=torch.float64)),
        torch.ones(10, 10, dtype=torch.float64),
        torch.eye(10, dtype=torch.float64) * 1e-200,
        torch.eye(10, dtype=torch.float64) * 1e200,
        torch.diag(torch.logspace(0, -30, 10, dtype=torch.float64)),
    ],
    ids=["zero", "one channel", "rank one", "tiny", "huge", "ill-conditioned"],
)
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_degenerate_statistics_give_finite_factors(covariance: Tensor, rank: int) -> None:
    weight, _ = problem(6, 10, 1)
    factors = svd(weight, None)
    up, down = factors.up[:, :rank], factors.down[:rank]
    fitted = fit_residual(weight, up, down, covariance)
    assert all(torch.isfinite(part).all() for part in fitted)
    rounding = 1e-12 * float((weight @ covariance * weight).sum()) + 1e-300
    assert error_of(weight, *fitted, covariance) <= error_of(weight, up, down, covariance) + rounding


def test_components_that_read_nothing_do_not_explode() -> None:
    """The residual starts where the inputs after compression no longer vary: its error says nothing of its size."""
    weight, _ = problem(12, 20, 1)
    direction = torch.randn(20, generator=generator(3), dtype=torch.float64)
    covariance = torch.outer(direction, direction)
    factors = svd(weight, None)
    down = factors.down[:8].clone()
    fixed, _ = split_rank(8)
    down[fixed:] -= torch.outer(down[fixed:] @ direction, direction) / direction.square().sum()
    up, new_down = fit_residual(weight, factors.up[:, :8], down, covariance)
    assert up.abs().max() < 1e4
    assert new_down.abs().max() < 1e4


def test_the_two_halves_of_the_residual_are_of_the_same_size() -> None:
    """Otherwise one of them could overflow in half precision, though their product would not."""
    weight, x = problem(12, 20, 100)
    factors = svd(weight, None)
    up, down = factors.up[:, :8] * 1e6, factors.down[:8] / 1e6
    fixed, _ = split_rank(8)
    new_up, new_down = fit_residual(weight, up, down, x.T @ x / len(x))
    torch.testing.assert_close(new_up[:, fixed:].norm(dim=0), new_down[fixed:].norm(dim=1))


def test_a_zero_weight_stays_zero() -> None:
    zero = torch.zeros(6, 10, dtype=torch.float64)
    factors = svd(zero, None)
    up, down = fit_residual(zero, factors.up[:, :3], factors.down[:3], torch.eye(10, dtype=torch.float64))
    assert not (up @ down).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused(value: float) -> None:
    weight, x = problem(6, 10, 20)
    covariance = x.T @ x
    covariance[2, 2] = value
    factors = svd(weight, None)
    with pytest.raises(NumericsError, match="NaN or Inf"):
        fit_residual(weight, factors.up[:, :3], factors.down[:3], covariance)
