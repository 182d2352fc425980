"""Whether two models find the same neighbors: what embeddings are used for, without any label."""

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBORS = 10
QUERIES = 1000
"""At most so many samples look for their neighbors among all."""

_CHUNK = 100


def neighbors_kept(dense: Tensor, compressed: Tensor, seed: int) -> tuple[float, float] | None:
    """From vectors (samples, width) of two models, by cosine: the part of a sample's ten nearest that both name, and
    how often the nearest of the dense model is among the ten of the compressed one.

    None where there are not more than twice as many samples to choose from.
    """
    samples = len(dense)
    if samples <= 2 * NEIGHBORS:
        return None
    queries = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))[:QUERIES].sort().values
    shared, found = 0.0, 0
    for rows in torch.split(queries, _CHUNK):
        first, second = (_nearest(vectors, rows) for vectors in (dense, compressed))
        shared += float((first[:, :, None] == second[:, None]).any(-1).double().mean(-1).sum())
        found += int((first[:, :1] == second).any(-1).sum())
    return shared / len(queries), found / len(queries)


def _nearest(vectors: Tensor, rows: Tensor) -> Tensor:
    """The ten samples nearest to each of ``rows``, themselves left out, the nearest first."""
    unit = F.normalize(vectors.float(), dim=-1)
    likeness = unit[rows] @ unit.mT
    likeness[torch.arange(len(rows)), rows] = -torch.inf
    return likeness.topk(NEIGHBORS).indices
