"""The arithmetic of evaluation: hits, divergences, correlations, intervals and tests, in torch alone.

Functions of logits return one value a row, so that a caller can stream batches and keep scalars only.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vitshrink.evaluation.quality import Interval

_Z95 = 1.959963984540054
_RESAMPLES = 2000
_CHUNK = 1 << 22  # numbers held at a time where a result is built in pieces


def top_k_hits(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the label (n,) is among the ``k`` largest of logits (n, classes); bool (n,)."""
    return (logits.topk(k, dim=-1).indices == labels.unsqueeze(-1)).any(-1)


def top_k_overlap(dense: Tensor, compressed: Tensor, k: int) -> Tensor:
    """Share of the dense top ``k`` that the compressed top ``k`` has too; logits (n, classes) to (n,)."""
    ours, theirs = dense.topk(k, dim=-1).indices, compressed.topk(k, dim=-1).indices
    return (ours.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1).double().mean(-1)


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1 of values (n,), ties sharing their mean rank; float64 (n,)."""
    inverse: Tensor
    _, inverse, counts = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    middle: Tensor = counts.cumsum(0).double() - (counts.double() - 1) / 2
    return middle[inverse]


def pearson(first: Tensor, second: Tensor) -> float:
    """Linear correlation of two (n,); NaN where one of them is constant."""
    a, b = first.double() - first.double().mean(), second.double() - second.double().mean()
    scale = a.norm() * b.norm()
    return float("nan") if scale == 0 else float((a @ b / scale).clamp(-1, 1))


def spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation of two (n,), or the mean of those of the columns of two (n, outputs); NaN for a constant."""
    if first.ndim == 1:
        return pearson(ranks(first), ranks(second))
    columns = zip(first.unbind(1), second.unbind(1), strict=True)
    return math.fsum(spearman(*pair) for pair in columns) / first.shape[1]


def f1_scores(chosen: Tensor, truth: Tensor) -> tuple[float, float]:
    """Micro and macro F1 of labels, bool (n, labels); a label that is never chosen nor true counts 0, as usual."""
    found, wrong = f1_parts(chosen, truth)
    macro = (found / wrong.clamp_min(1)).mean()
    return float(found.sum() / wrong.sum().clamp_min(1)), float(macro)


def f1_parts(chosen: Tensor, truth: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of F1 = 2 TP / (2 TP + FP + FN), summed over one dimension; float64."""
    return 2 * (chosen & truth).sum(dim).double(), (chosen.double() + truth.double()).sum(dim)


def wilson_interval(successes: float, trials: int) -> Interval:
    """95 % interval of a proportion (Wilson, 1927): honest at 0, at 1 and for few trials."""
    if trials == 0:
        return Interval(0.0, 1.0)
    rate, z2 = successes / trials, _Z95**2
    center = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z95 / (1 + z2 / trials) * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials**2))
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == trials else center + half
    return Interval(low, high)


def rank_correlation_interval(correlation: float, samples: int) -> Interval:
    """95 % interval of a Spearman correlation: Fisher's z, variance of Fieller and others (1957).

    Fisher's z of ±1 is infinite: it is replaced by that of the correlation half a step below, where one step is what
    the exchange of two neighbors changes, and the interval then ends at ±1.
    """
    if samples < 4 or math.isnan(correlation):
        return Interval(-1.0, 1.0)
    half = _Z95 * math.sqrt(1.06 / (samples - 3))
    limit = 1 - 6 / (samples**3 - samples)
    z = math.atanh(min(max(correlation, -limit), limit))
    low, high = math.tanh(z - half), math.tanh(z + half)
    return Interval(-1.0 if correlation < -limit else low, 1.0 if correlation > limit else high)


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value that two classifiers are equally good.

    ``only_first`` and ``only_second`` count the samples that one of them alone has right.
    """
    trials, few = only_first + only_second, min(only_first, only_second)
    if trials == 0:
        return 1.0
    log_terms = [
        math.lgamma(trials + 1) - math.lgamma(i + 1) - math.lgamma(trials - i + 1) - trials * math.log(2)
        for i in range(few + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, log_terms)))


def bootstrap_ratio(numerator: Tensor, denominator: Tensor, seed: int) -> Interval:
    """95 % percentile interval of Σ numerator / Σ denominator when samples, (n,) each, are drawn again.

    With a denominator of ones it is the interval of a mean; with token counts, that of a rate over tokens
    that come in sentences. Paired differences in, interval of the difference out.
    """
    pairs = torch.stack([numerator.double(), denominator.double()]).cpu()
    count = pairs.shape[1]
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _CHUNK // count)
    ratios = []
    for start in range(0, _RESAMPLES, rows):
        drawn = torch.randint(count, (min(rows, _RESAMPLES - start), count), generator=generator)
        sums = pairs[:, drawn].sum(-1)
        ratios.append(sums[0] / sums[1])
    ratio = torch.cat(ratios)
    return _percentiles(ratio[~ratio.isnan()])  # a draw of samples without a single token has no rate


def bootstrap(figure: Callable[[Tensor], float], samples: int, seed: int) -> Tensor:
    """A figure of samples drawn again, from their indices (samples,); those draws that have one, float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randint(samples, (samples,), generator=generator) for _ in range(_RESAMPLES))
    values = torch.tensor([figure(rows) for rows in drawn], dtype=torch.float64)
    return values[values.isfinite()]  # a draw of one sample n times has no correlation


def bootstrap_interval(figure: Callable[[Tensor], float], samples: int, seed: int, *, most: float = 1.0) -> Interval:
    """95 % percentile interval of a figure between -``most`` and ``most``."""
    values = bootstrap(figure, samples, seed)
    return _percentiles(values) if len(values) else Interval(-most, most)


def bootstrap_drop(
    score: Callable[[Tensor, Tensor], float], target: Tensor, dense: Tensor, compressed: Tensor, seed: int
) -> tuple[Interval, float]:
    """95 % interval and two-sided p-value of the fall in a score (at most 1) of predictions (n, …)."""
    target, dense, compressed = target.cpu(), dense.cpu(), compressed.cpu()

    def fall(rows: Tensor) -> float:
        truth = target[rows]
        return score(dense[rows], truth) - score(compressed[rows], truth)

    drop = bootstrap(fall, len(target), seed)
    if not len(drop):
        return Interval(-2.0, 2.0), 1.0
    beyond = min(int((drop <= 0).sum()), int((drop >= 0).sum()))
    return _percentiles(drop), min(1.0, 2 * (beyond + 1) / (len(drop) + 1))


def sign_flip_p_value(differences: Tensor, seed: int) -> float:
    """Two-sided p-value that paired per-sample differences (n,) have no preferred sign.

    A Monte-Carlo permutation test: each sample's sign is flipped at random, whole samples at a time, so that
    the tokens of one sentence count as one observation.
    """
    values = differences.double().cpu()
    values = values[values != 0]
    if not len(values):
        return 1.0
    observed = values.sum().abs() * (1 - 1e-12)
    generator = torch.Generator().manual_seed(seed)
    rows, beyond = max(1, _CHUNK // len(values)), 0
    for start in range(0, _RESAMPLES, rows):
        shape = (min(rows, _RESAMPLES - start), len(values))
        signs = torch.randint(2, shape, generator=generator).double() * 2 - 1
        beyond += int(((signs @ values).abs() >= observed).sum())
    return (beyond + 1) / (_RESAMPLES + 1)


def _percentiles(values: Tensor) -> Interval:
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return Interval(low, high)
