"""The calls of a layer in one pass of a model: one, or many where blocks share it or positions go through it, too."""

import math

import torch
from torch import Tensor


def joined(parts: list[Tensor]) -> Tensor:
    """The tokens of several calls as one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def by_sample(rows: Tensor, samples: int) -> Tensor:
    """Rows (samples × parts, k), windows of images say, summed over the parts: (samples, k).

    What is no sample's own, such as relative positions, is shared out: independent parts of it have its square in sum.
    """
    if len(rows) == samples:
        return rows
    if len(rows) % samples:
        return (rows.sum(0) / math.sqrt(samples)).expand(samples, -1)
    summed: Tensor = rows.view(samples, -1, rows.shape[-1]).sum(1)
    return summed
