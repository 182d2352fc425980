"""How well the passages of queries are ranked."""

import torch
from torch import Tensor

from vitshrink.evaluation import metrics
from vitshrink.evaluation.quality import Ranking
from vitshrink.evaluation.rows import Columns

DEPTH = 10


def ndcg(scores: Tensor, relevance: Tensor, depth: int = DEPTH) -> float:
    """Normalized discounted cumulative gain at ``depth`` of one query, from scores and relevances (passages,).

    A relevance is its own gain, as in trec_eval. Passages of equal scores share the mean of theirs. 0 where nothing is
    relevant.
    """
    relevance = relevance.double().clamp_min(0)
    order = scores.argsort(descending=True, stable=True)
    _, tied = torch.unique_consecutive(scores[order], return_inverse=True)
    gains = relevance[order]
    sums = gains.new_zeros(int(tied[-1]) + 1).index_add_(0, tied, gains)
    shared = (sums / tied.bincount())[tied]
    best = _dcg(relevance.sort(descending=True).values, depth)
    return _dcg(shared, depth) / best if best else 0.0


def _dcg(gains: Tensor, depth: int) -> float:
    gains = gains[:depth]
    return float((gains / torch.arange(2, len(gains) + 2, dtype=torch.float64).log2()).sum())


def of_queries(role: str, columns: Columns) -> Tensor:
    """nDCG of each query that has something relevant, (queries,)."""
    scores, relevance = columns[f"{role}.prediction"][:, 0], columns["target"][:, 0]
    found = [ndcg(scores[rows], relevance[rows]) for rows in _rows(columns["query"]) if (relevance[rows] > 0).any()]
    return torch.tensor(found, dtype=torch.float64)


def _rows(queries: Tensor) -> list[Tensor]:
    return [(queries == number).nonzero()[:, 0] for number in sorted(set(queries.tolist()))]


def is_ranking(columns: Columns) -> bool:
    """Whether the samples are passages of queries, some of them relevant."""
    return "query" in columns and "target" in columns and bool((columns["target"] > 0).any())


def ranking(role: str, columns: Columns, seed: int) -> Ranking:
    """Of one model."""
    found = of_queries(role, columns)
    return Ranking(
        ndcg_at_10=float(found.mean()),
        interval=metrics.bootstrap_ratio(found, torch.ones_like(found), seed),
        queries=len(found),
    )
