"""The contract that every registered method meets by existing."""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vitshrink.errors import NumericsError, UsageError
from vitshrink.methods import Factorization, attention_methods, available_methods, find_method, get_method
from vitshrink.statistics.needs import Needs
from vitshrink.statistics.stats import LinearStats

SHAPES = [(12, 12), (8, 20), (20, 8)]
every_method = pytest.mark.parametrize("name", available_methods())
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def layer(shape: tuple[int, int], tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight (m, n) and correlated inputs (tokens, n) with a mean."""
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    mixing = torch.randn(n, n, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, n, dtype=torch.float64)
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ mixing.T
    return weight, x + torch.randn(n, generator=generator, dtype=torch.float64)


def output_curvature(m: int, seed: int = 1) -> Tensor:
    """H (m, m), of output gradients of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(m, m, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, m, dtype=torch.float64)
    g = torch.randn(300, m, generator=generator, dtype=torch.float64) @ mixing.T
    return g.T @ g / len(g)


def statistics(weight: Tensor, x: Tensor) -> LinearStats:
    """Statistics of inputs x and of output gradients, in the smaller space as calibration gives them."""
    m, n = weight.shape
    H = output_curvature(m)
    return replace(
        LinearStats.from_inputs(x),
        gradient_gram=H if m <= n else None,
        input_gradient_gram=weight.T @ H @ weight if m > n else None,
        gradient_power=float(H.trace()),
    )


def factorize(name: str, weight: Tensor, x: Tensor, *, centered: bool = False) -> Factorization:
    return get_method(name).factorize(weight, statistics(weight, x), centered=centered)


def output_error(weight: Tensor, factors: Factorization, rank: int, x: Tensor) -> float:
    difference = weight - factors.up[:, :rank] @ factors.down[:rank]
    return float((x @ difference.T).square().sum(1).mean())


@every_method
@every_shape
def test_full_rank_reproduces_the_weight(name: str, shape: tuple[int, int]) -> None:
    weight, x = layer(shape)
    factors = factorize(name, weight, x)
    torch.testing.assert_close(factors.up @ factors.down, weight, rtol=1e-7, atol=1e-7)


@every_method
@every_shape
def test_losses_fall_to_zero_and_the_first_is_the_largest(name: str, shape: tuple[int, int]) -> None:
    weight, x = layer(shape)
    loss = factorize(name, weight, x).loss
    assert len(loss) == min(shape) + 1
    assert (loss[:-1] >= loss[1:]).all()
    assert loss[-1] <= 1e-9 * loss[0]


@every_method
@every_shape
def test_inputs_are_left_untouched_and_the_result_is_deterministic(name: str, shape: tuple[int, int]) -> None:
    weight, x = layer(shape)
    stats = statistics(weight, x)
    assert stats.gram is not None
    assert stats.abs_mean is not None
    before = weight.clone(), stats.gram.clone(), stats.mean.clone(), stats.abs_mean.clone()
    first = get_method(name).factorize(weight, stats, centered=True)
    second = get_method(name).factorize(weight, stats, centered=True)
    for was, now in zip(before, (weight, stats.gram, stats.mean, stats.abs_mean), strict=True):
        assert torch.equal(was, now)
    assert torch.equal(first.up, second.up)
    assert torch.equal(first.down, second.down)


@every_method
@every_shape
@pytest.mark.parametrize("damage", ["dead channel", "few tokens", "one token", "zero weight", "rank-one weight"])
def test_finite_where_the_statistics_are_degenerate(name: str, shape: tuple[int, int], damage: str) -> None:
    weight, x = layer(shape)
    if damage == "dead channel":
        x[:, 2] = 0
    elif damage == "few tokens":
        x = x[: shape[1] // 2]
    elif damage == "one token":
        x = x[:1]
    elif damage == "zero weight":
        weight = torch.zeros_like(weight)
    else:
        weight = weight[:, :1] @ weight[:1]
    for centered in (False, True):
        factors = factorize(name, weight, x, centered=centered).check_finite()
        scale = output_error(weight, factors, 0, x)
        assert output_error(weight, factors, min(shape), x) <= 1e-9 * scale + 1e-20


@every_method
@every_shape
def test_every_slice_is_the_best_of_its_rank_in_the_methods_own_metric(name: str, shape: tuple[int, int]) -> None:
    """Nestedness: the loss curve says what slicing really loses, relative to losing everything."""
    weight, x = layer(shape)
    stats = statistics(weight, x)
    factors = get_method(name).factorize(
        weight, stats, centered=False, **({"shrinkage": 0.0} if name == "curvature" else {})
    )
    inputs = {
        Needs.WEIGHTS: torch.eye(shape[1], dtype=torch.float64),
        Needs.SCALES: None if stats.abs_mean is None else stats.abs_mean.diag(),
        Needs.COVARIANCE: stats.gram,
        Needs.CURVATURE: stats.gram,
    }[get_method(name).needs]
    assert inputs is not None
    for rank in (0, 1, 3, min(shape)):
        difference = weight - factors.up[:, :rank] @ factors.down[:rank]
        measured = difference @ inputs @ difference.T
        if get_method(name).needs is Needs.CURVATURE:
            measured = output_curvature(shape[0]) @ measured
        torch.testing.assert_close(measured.trace(), factors.loss[rank], rtol=1e-6, atol=1e-9 * float(factors.loss[0]))


def curvature_loss(difference: Tensor, H: Tensor, C: Tensor) -> float:
    return float((H @ difference @ C @ difference.T).trace())


@every_shape
def test_curvature_loses_least_at_the_output(shape: tuple[int, int]) -> None:
    """tr(H ΔW C ΔWᵀ) is smaller than that of every other method, and no small change of the factors lowers it."""
    weight, x = layer(shape)
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(400, shape[0], generator=generator, dtype=torch.float64) * torch.logspace(0, -2, shape[0])
    H, C = g.T @ g / len(g), LinearStats.from_inputs(x).covariance(centered=False)
    stats = replace(
        LinearStats.from_inputs(x),
        gradient_gram=H if shape[0] <= shape[1] else None,
        input_gradient_gram=weight.T @ H @ weight if shape[0] > shape[1] else None,
        gradient_power=float(H.trace()),
    )
    for rank in (1, 4, 7):
        losses = {}
        for name in available_methods():
            options = {"shrinkage": 0.0} if name == "curvature" else {}
            factors = get_method(name).factorize(weight, stats, centered=False, **options)
            losses[name] = curvature_loss(weight - factors.up[:, :rank] @ factors.down[:rank], H, C)
        assert losses["curvature"] <= min(losses.values()) * (1 + 1e-9)
        best = get_method("curvature").factorize(weight, stats, centered=False, shrinkage=0.0)
        torch.testing.assert_close(torch.tensor(losses["curvature"]).double(), best.loss[rank], rtol=1e-6, atol=0)
        for _ in range(10):
            noise = 1 + 1e-3 * torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
            changed = weight - (best.up[:, :rank] * noise) @ best.down[:rank]
            assert curvature_loss(changed, H, C) >= losses["curvature"] * (1 - 1e-9)


def test_a_layer_that_no_gradient_reaches_costs_nothing() -> None:
    weight, x = layer((6, 9))
    stats = replace(
        LinearStats.from_inputs(x), gradient_gram=torch.zeros(6, 6, dtype=torch.float64), gradient_power=0.0
    )
    factors = get_method("curvature").factorize(weight, stats, centered=True)
    assert (factors.loss == 0).all()
    torch.testing.assert_close(factors.up @ factors.down, weight)


@every_shape
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_whitened_has_the_least_output_error_on_its_calibration_set(shape: tuple[int, int], rank: int) -> None:
    weight, x = layer(shape)
    errors = {name: output_error(weight, factorize(name, weight, x), rank, x) for name in available_methods()}
    assert errors["whitened"] <= min(errors.values()) * (1 + 1e-9)
    generator = torch.Generator().manual_seed(1)
    best = factorize("whitened", weight, x)
    for _ in range(20):  # and no small change of the factors is better
        up = best.up[:, :rank] * (1 + 1e-3 * torch.randn(shape[0], rank, generator=generator, dtype=torch.float64))
        changed = Factorization(up, best.down[:rank], best.loss)
        assert output_error(weight, changed, rank, x) >= errors["whitened"] * (1 - 1e-9)


@pytest.mark.parametrize(
    "shape", [(m, n) for m, n in SHAPES if m <= n], ids=str
)  # tall ones are observed at their input
@every_method
def test_the_output_gram_gives_the_same_factors_as_the_input_gram(name: str, shape: tuple[int, int]) -> None:
    weight, x = layer(shape)
    m = shape[0]
    stats = replace(LinearStats.from_inputs(x), gradient_gram=torch.diag(torch.arange(1.0, m + 1).double()))
    stats = replace(stats, gradient_power=m * (m + 1) / 2)
    z = x @ weight.T
    observed = replace(stats, gram=None, output_gram=z.T @ z / len(x))
    for centered in (False, True):
        one, other = (get_method(name).factorize(weight, each, centered=centered) for each in (stats, observed))
        torch.testing.assert_close(one.up[:, :3] @ one.down[:3], other.up[:, :3] @ other.down[:3])


def test_pca_projects_on_the_principal_components_of_the_inputs() -> None:
    weight, x = layer((9, 9))
    centered = x - x.mean(0)
    V = torch.linalg.svd(centered, full_matrices=False)[2][:4]
    found = get_method("pca").factorize(weight, LinearStats.from_inputs(x), centered=True)
    torch.testing.assert_close(found.up[:, :4] @ found.down[:4], weight @ V.T @ V)


def test_taking_the_mean_out_is_never_worse() -> None:
    weight, x = layer((10, 14))
    mean = x.mean(0)
    plain, centered = (factorize("whitened", weight, x, centered=centered) for centered in (False, True))
    for rank in range(1, 10):
        assert output_error(weight, centered, rank, x - mean) <= output_error(weight, plain, rank, x) * (1 + 1e-9)


def test_asvd_scales_by_the_chosen_statistic() -> None:
    weight, x = layer((8, 8))
    stats = LinearStats.from_inputs(x)
    asvd, svd = get_method("asvd"), get_method("svd")
    flat = asvd.factorize(weight, stats, centered=False, alpha=0.0)
    plain = svd.factorize(weight, None, centered=False)
    torch.testing.assert_close(flat.up[:, :3] @ flat.down[:3], plain.up[:, :3] @ plain.down[:3])
    largest = asvd.factorize(weight, stats, centered=False, scaling="abs-max")
    torch.testing.assert_close(largest.loss[0], (weight.square() * stats.abs_max).sum())
    with pytest.raises(UsageError, match="unknown scaling 'abs_men'"):
        asvd.factorize(weight, stats, centered=False, scaling="abs_men")


@every_method
def test_not_finite_is_an_error_and_not_a_result(name: str) -> None:
    weight, x = layer((6, 6))
    weight[1, 1] = float("inf")
    with pytest.raises(NumericsError, match="NaN or Inf"):
        factorize(name, weight, x).check_finite()


@every_method
def test_methods_that_need_data_say_so(name: str) -> None:
    method = get_method(name)
    weight, _ = layer((6, 6))
    if method.needs is Needs.WEIGHTS:
        assert method.factorize(weight, None, centered=False).up.shape == (6, 6)
    else:
        with pytest.raises(NumericsError, match="needs calibration"):
            method.factorize(weight, None, centered=False)


@pytest.mark.parametrize("name", [*available_methods(), *attention_methods()])
def test_every_method_says_in_a_sentence_what_it_does_and_names_its_paper(name: str) -> None:
    method = find_method(name)
    assert re.fullmatch(r"\S.*\.", method.summary)
    told = " ".join((method.factorize.__doc__ or "").split())
    assert re.search(r"arXiv \d{4}\.\d{5}|[A-Z]\w+,? (19|20)\d\d", told)


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown method 'whitend'. Did you mean 'whitened'\?"):
        get_method("whitend")


def test_a_measured_loss_is_carried_over_measured_again_or_between() -> None:
    up, down = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    loss = torch.tensor([8.0, 4.0, 2.0, 0.0], dtype=torch.float64)
    before = Factorization(up, down, 2 * loss, torch.tensor([4.0, 3.0, 1.0, 0.0], dtype=torch.float64))
    again = Factorization(up, down, 2 * loss, torch.tensor([16.0, 6.0, 1.0, 0.0], dtype=torch.float64))
    new = Factorization(up, down, loss)
    for share, want in ((0.0, [4, 3, 1, 0]), (1.0, [8, 3, 0.5, 0]), (0.5, [32**0.5, 3, 0.5**0.5, 0])):
        measured = new.measured_between(before, again, share).measured
        assert measured is not None
        torch.testing.assert_close(measured, torch.tensor(want, dtype=torch.float64))
    assert new.measured_between(replace(before, measured=None), again, 0.5) is new
