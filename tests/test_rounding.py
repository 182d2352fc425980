"""Rounding in a metric: what it loses, what it takes, and what it does where there is little to go by."""

import pytest
import torch
from torch import Tensor

from vitshrink.compression.rounding import Metric, at_each, entropy, rounded
from vitshrink.errors import NumericsError
from vitshrink.statistics.halves import half_of
from vitshrink.statistics.sensitivity import Sensitivity

M, N = 24, 40


def sensitivity(tokens: int = 400, m: int = M, n: int = N, seed: int = 0) -> Sensitivity:
    """Of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator).double() * torch.logspace(-1, 1, n).double()
    x = torch.randn(tokens, n, generator=generator).double() @ mixing
    outputs = torch.rand(m, generator=generator).double() + 0.01
    return Sensitivity(outputs, x.mean(0), half_of(x.mT.cov(correction=0)), tokens=tokens)


def matrix(m: int = M, n: int = N, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(m, n, generator=torch.Generator().manual_seed(100 + seed))


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_what_its_definition_says(seed: int) -> None:
    metric = Metric.of(sensitivity(seed=seed))
    errors = matrix(seed=seed).double()
    lower = metric.lower.double()
    covariance = lower.T @ lower
    expected = 0.5 * sum(h * e @ covariance @ e for h, e in zip(metric.weights, errors, strict=True))
    assert metric.loss(errors) == pytest.approx(float(expected), rel=1e-6)


def test_the_metric_of_many_samples_is_their_covariance() -> None:
    found = sensitivity(tokens=5000)
    assert found.covariance is not None
    metric = Metric.of(found)
    assert torch.equal(metric.lower, metric.lower.tril())
    lower = metric.lower.double()
    assert torch.allclose(lower.T @ lower, found.covariance, atol=0.02 * float(found.covariance.max()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fineness", [0.05, 0.5, 2.0])
def test_feedback_loses_less_than_rounding_to_nearest_with_the_same_steps(seed: int, fineness: float) -> None:
    metric, weight = Metric.of(sensitivity(seed=seed)), matrix(seed=seed)
    found = rounded(weight, metric, fineness)
    steps = found.rows[:, None] * found.codes.columns
    nearest = weight - (weight / steps).round() * steps
    assert metric.loss(found.errors.double()) < metric.loss(nearest.double())
    assert torch.allclose(found.codes.scaled(found.rows) + found.errors, weight, atol=1e-6)


def test_finer_levels_lose_less_and_take_more_bits() -> None:
    metric, weight = Metric.of(sensitivity()), matrix()
    finenesses = [2.0 ** (2 - number) for number in range(8)]
    found = [(entropy(integers), loss) for integers, _, loss in at_each(weight, metric, finenesses)]
    assert [bits for bits, _ in found] == sorted(bits for bits, _ in found)
    assert [loss for _, loss in found] == sorted((loss for _, loss in found), reverse=True)
    # two steps half as wide: a bit more of a weight, a quarter of the loss
    assert found[-1][0] - found[-2][0] == pytest.approx(1, abs=0.2)
    assert found[-2][1] / found[-1][1] == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize("fineness", [0.1, 1.0])
def test_every_level_at_once_is_what_each_is_alone(fineness: float) -> None:
    """Up to the type of the steps."""
    metric, weight = Metric.of(sensitivity()), matrix()
    _, (integers, errors, loss) = at_each(weight, metric, [3 * fineness, fineness])
    alone = rounded(weight, metric, fineness)
    assert entropy(integers) == pytest.approx(entropy(alone.codes.integers.float()), abs=0.05)
    assert loss == pytest.approx(metric.loss(errors.double()), rel=1e-4)
    assert loss == pytest.approx(metric.loss(alone.errors), rel=0.1)


def test_what_is_estimated_is_what_a_metric_promises() -> None:
    """At fine steps every weight loses δ² / 24, in the mean, with steps of columns by their variance."""
    metric, weight = Metric.of(sensitivity()), matrix(256)
    weights = torch.ones(256).double()
    plain = Metric.of_lower(weights, torch.eye(N))
    ((_, _, loss),) = at_each(weight, plain, [0.01])
    assert loss == pytest.approx(0.01**2 / 24 * weight.numel(), rel=0.05)
    assert metric.columns.log().mean() == pytest.approx(-float(metric.diagonal.log().mean()), rel=1e-6)


@pytest.mark.parametrize("tokens", [2, 5, 30])
def test_few_samples_are_enough(tokens: int) -> None:
    """Fewer than columns: what was not seen is not free."""
    metric, weight = Metric.of(sensitivity(tokens=tokens)), matrix()
    coarse, fine = (rounded(weight, metric, each) for each in (1.0, 0.01))
    assert float(metric.diagonal.min()) > 0.01 * float(metric.diagonal.max())
    assert fine.errors.norm() < 0.2 * coarse.errors.norm()
    assert torch.isfinite(coarse.errors).all()


@pytest.mark.parametrize("case", ["gradients", "columns", "row", "everything", "matrix"])
def test_odd_statistics_are_rounded_too(case: str) -> None:
    found, weight = sensitivity(), matrix()
    outputs, covariance = found.outputs.clone(), found.covariance
    assert covariance is not None
    if case == "gradients":
        outputs[:] = 0
    if case == "columns":
        covariance[5:9] = covariance[:, 5:9] = 0
    if case == "everything":
        covariance[:] = 0
    if case == "row":
        outputs, weight = outputs[:1], weight[:1]
    if case == "matrix":
        weight = torch.zeros_like(weight)
    metric = Metric.of(Sensitivity(outputs, found.mean, half_of(covariance), tokens=400))
    made = rounded(weight, metric, 0.1)
    assert torch.isfinite(made.errors).all()
    assert made.codes.scaled(made.rows).shape == weight.shape
    assert torch.allclose(made.codes.scaled(made.rows) + made.errors, weight, atol=1e-5)


def test_a_table_goes_by_the_use_of_its_rows() -> None:
    uses = torch.tensor([0.7, 0.29, 0.01] + [0.0] * 21).double()
    metric = Metric.of(Sensitivity(torch.ones(N).double(), uses=uses))
    made = rounded(matrix(), metric, 0.0005)
    losses = made.errors.square().sum(1)
    assert losses[0] < losses[1] < losses[2] < losses[3:].mean()
    assert (metric.weights > 0).all(), "rows that were not met are used later"


def test_steps_of_rows_are_those_of_the_file() -> None:
    metric = Metric.of(sensitivity())
    for kind in (torch.float16, torch.bfloat16):
        rows = rounded(matrix(), metric, 0.1, kind).rows
        assert torch.equal(rows, rows.to(kind).float())


def test_what_is_not_finite_is_refused() -> None:
    found = sensitivity()
    assert found.half is not None
    found.half[0] = torch.nan
    with pytest.raises(NumericsError, match="NaN or Inf"):
        Metric.of(found)
    with pytest.raises(NumericsError, match="NaN or Inf"):
        Metric.of(Sensitivity(torch.full((3,), torch.inf).double(), uses=torch.ones(2)))
