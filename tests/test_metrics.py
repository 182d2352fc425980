import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitshrink.evaluation import metrics
from vitshrink.models import fidelity
from vitshrink.models.fidelity import SOFTMAX, measured
from vitshrink.models.sentences import masked_mean

scipy_stats = pytest.importorskip("scipy.stats")


def test_hits_look_at_the_k_largest_logits() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    labels = torch.tensor([1, 2])
    assert metrics.top_k_hits(logits, labels, 1).tolist() == [False, True]
    assert metrics.top_k_hits(logits, labels, 2).tolist() == [True, True]


def test_overlap_ignores_the_order_inside_the_top_k() -> None:
    dense = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert metrics.top_k_overlap(dense, torch.tensor([[3.0, 4.0, 1.0, 2.0]]), 2).item() == 1
    assert metrics.top_k_overlap(dense, torch.tensor([[4.0, 1.0, 3.0, 2.0]]), 2).item() == 0.5


def test_kl_is_zero_for_equal_logits_and_matches_the_definition() -> None:
    dense, compressed = torch.randn(5, 7), torch.randn(5, 7)
    assert measured(SOFTMAX, dense, dense + 3).max() < 1e-12
    expected = scipy_stats.entropy(dense.double().softmax(-1).numpy(), compressed.double().softmax(-1).numpy(), axis=1)
    assert measured(SOFTMAX, dense, compressed).tolist() == pytest.approx(expected.tolist())


def test_kl_of_float16_logits_is_taken_in_float64() -> None:
    dense = torch.tensor([[60000.0, -60000.0]], dtype=torch.float16)
    assert measured(SOFTMAX, dense, -dense).item() == pytest.approx(120000)


def test_kl_in_pieces_is_the_kl_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, compressed = torch.randn(9, 4), torch.randn(9, 4)
    whole = measured(SOFTMAX, dense, compressed)
    monkeypatch.setattr(fidelity, "_CHUNK", 8)
    assert torch.equal(measured(SOFTMAX, dense, compressed), whole)


def test_masked_mean_sees_real_tokens_only() -> None:
    features = torch.tensor([[[1.0], [3.0], [99.0]]])
    assert masked_mean(features, torch.tensor([[True, True, False]])).item() == 2
    assert masked_mean(features[:, :2], None).item() == 2


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=30))
@settings(max_examples=60, deadline=None)
def test_correlations_match_scipy_with_ties(pairs: list[tuple[int, int]]) -> None:
    first, second = torch.tensor(pairs, dtype=torch.float64).T
    if first.unique().numel() == 1 or second.unique().numel() == 1:
        assert math.isnan(metrics.spearman(first, second))
        return
    expected = scipy_stats.spearmanr(first.numpy(), second.numpy()).statistic
    assert metrics.spearman(first, second) == pytest.approx(expected, abs=1e-9)
    expected = scipy_stats.pearsonr(first.numpy(), second.numpy()).statistic
    assert metrics.pearson(first, second) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (529, 650), (1, 3)])
def test_wilson_matches_scipy(successes: int, trials: int) -> None:
    expected = scipy_stats.binomtest(successes, trials).proportion_ci(method="wilson")
    assert metrics.wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_no_trials_say_nothing() -> None:
    assert metrics.wilson_interval(0, 0) == (0, 1)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (5, 5), (1, 9), (40, 3), (0, 2000)])
def test_mcnemar_is_the_exact_binomial_test(first: int, second: int) -> None:
    expected = scipy_stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert metrics.mcnemar_p_value(first, second) == pytest.approx(expected, rel=1e-6, abs=1e-300)


def test_bootstrap_interval_covers_the_mean_and_repeats_with_its_seed() -> None:
    torch.manual_seed(0)
    values = torch.randn(400, dtype=torch.float64) + 1
    low, high = metrics.bootstrap_ratio(values, torch.ones(400), seed=3)
    error = values.std().item() / 20
    mean = values.mean().item()
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.02)
    assert metrics.bootstrap_ratio(values, torch.ones(400), seed=3) == (low, high)


def test_bootstrap_in_pieces_is_the_bootstrap_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(50)
    whole = metrics.bootstrap_ratio(values, torch.ones(50), seed=0)
    monkeypatch.setattr(metrics, "_CHUNK", 1000)
    assert metrics.bootstrap_ratio(values, torch.ones(50), seed=0) == pytest.approx(whole, abs=1e-12)


def test_tokens_of_one_sentence_do_not_count_as_independent() -> None:
    """40 sentences whose 25 tokens are all right or all wrong hold 40 observations, not 1000."""
    hits = torch.tensor([25.0, 0.0] * 20)
    low, high = metrics.bootstrap_ratio(hits, torch.full((40,), 25.0), seed=0)
    wide = metrics.wilson_interval(20, 40)
    assert high - low == pytest.approx(wide[1] - wide[0], rel=0.15)


def test_sign_flip_tells_a_drop_from_noise() -> None:
    torch.manual_seed(0)
    noise = torch.randn(200)
    assert metrics.sign_flip_p_value(noise - noise.mean(), seed=0) > 0.9
    assert metrics.sign_flip_p_value(noise + 1, seed=0) < 0.002
    assert metrics.sign_flip_p_value(torch.zeros(5), seed=0) == 1


def test_correlation_drop_is_zero_for_the_same_predictions_and_found_for_noise() -> None:
    torch.manual_seed(0)
    target = torch.randn(120)
    (low, high), p_value = metrics.bootstrap_drop(metrics.spearman, target, target, target, seed=0)
    assert (low, high) == (0, 0)
    assert p_value == 1
    (low, _), p_value = metrics.bootstrap_drop(metrics.spearman, target, target, torch.randn(120), seed=0)
    assert low > 0.5
    assert p_value < 0.01


def test_rank_correlation_interval_shrinks_with_samples() -> None:
    few, many = metrics.rank_correlation_interval(0.8, 20), metrics.rank_correlation_interval(0.8, 2000)
    assert few[0] < many[0] < 0.8 < many[1] < few[1]
    assert metrics.rank_correlation_interval(math.nan, 20) == (-1, 1)


@pytest.mark.parametrize("samples", [4, 20, 2000])
def test_a_perfect_rank_correlation_is_not_taken_for_unknown(samples: int) -> None:
    low, high = metrics.rank_correlation_interval(1.0, samples)
    assert high == 1
    # the sample could not show less than the exchange of two neighbors
    below = metrics.rank_correlation_interval(1 - 12 / (samples**3 - samples), samples)
    assert below[0] < low < high
    assert metrics.rank_correlation_interval(-1.0, samples) == (-1, -low)


def test_draws_without_a_token_do_not_spoil_the_interval() -> None:
    low, high = metrics.bootstrap_ratio(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]), seed=0)
    assert (low, high) == (0.5, 0.5)
