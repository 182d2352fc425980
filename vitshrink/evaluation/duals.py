"""Dual encoders measured: classes told by their names, texts found by images, images by texts, and vectors compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitshrink.evaluation.rows import Batch, Columns, Step, finite, forward, hits
from vitshrink.models.fidelity import FEATURES, SOFTMAX

DEPTHS = (1, 5, 10)
"""How many of the nearest are looked at in retrieval."""

_CHUNK = 512  # rows of similarities held at a time


@dataclass(frozen=True)
class _Vectors:
    batch: Batch

    def outputs(self, role: str, model: nn.Module) -> Tensor:
        return finite(role, forward(model, self.batch.inputs).embeds.double(), self.batch.keys).cpu()

    def columns(self, outputs: Mapping[str, Tensor]) -> Columns:
        columns = {f"{role}.pooled": rows.float() for role, rows in outputs.items()}
        if len(outputs) == 2:
            dense, compressed = outputs["dense"], outputs["compressed"]
            columns |= {
                "divergence": FEATURES.divergence(dense, compressed),
                "spread": FEATURES.spread(dense),
                "pooled_cosine": torch.cosine_similarity(dense, compressed, dim=-1),
            }
        return columns


def vectors_step() -> Step:
    """For dual encoders: the vector of each image or text, columns ``dense.pooled`` (samples, width)."""
    return _Vectors


def of_classes(images: Columns, prompts: Columns, classes: Tensor, labels: Tensor | None, scale: float) -> Columns:
    """The columns of a classifier whose classes are texts.

    Args:
        prompts: the columns of texts; the vector of a class is the mean of those of its prompts.
        classes: the class of each prompt.
        labels: the class of each image.
        scale: what the model multiplies similarities with.
    """
    roles = [role for role in ("dense", "compressed") if f"{role}.pooled" in images]
    count = int(classes.max()) + 1
    logits = {}
    for role in roles:
        vectors = prompts[f"{role}.pooled"]
        means = vectors.new_zeros(count, vectors.shape[1]).index_add_(0, classes, vectors)
        logits[role] = scale * images[f"{role}.pooled"] @ F.normalize(means, dim=-1).T
    columns = (
        images | hits(logits, labels) | {f"{role}.class": SOFTMAX.decisions(rows) for role, rows in logits.items()}
    )
    columns["units"] = torch.ones(len(next(iter(logits.values()))), dtype=torch.long)
    return columns if labels is None else columns | {"label": labels}


def of_pairs(images: Columns, texts: Columns, pairs: Sequence[tuple[int, int]]) -> Columns:
    """For each pair whether its text, or one as good, is among the nearest to its image, and the other way round.

    ``pairs`` are the rows of ``images`` and ``texts``, each of which is there once however many pairs it is in. Columns
    ``dense.texts_found`` and ``dense.images_found`` are bool (pairs, depths).
    """
    left, right = torch.tensor(pairs).unbind(1)
    count, others = len(next(iter(images.values()))), len(next(iter(texts.values())))
    belong = torch.zeros(count, others, dtype=torch.bool)
    belong[left, right] = True
    columns: Columns = {}
    for name in images.keys() & texts.keys():
        if name.endswith(".pooled"):
            role, (one, other) = name.removesuffix(".pooled"), (images[name], texts[name])
            columns[f"{role}.texts_found"] = _found(one, other, belong)[left]
            columns[f"{role}.images_found"] = _found(other, one, belong.T)[right]
        else:
            columns[name] = (images[name][left] + texts[name][right]) / 2
    if count > len(pairs) // 2:  # the same image twice would be its own neighbor
        columns |= {name: rows[left] for name, rows in images.items() if name.endswith(".pooled")}
    return columns


def _found(queries: Tensor, among: Tensor, belong: Tensor) -> Tensor:
    """Whether one that belongs to a query is among its nearest, bool (queries, depths)."""
    found = []
    for rows, own in zip(torch.split(queries, _CHUNK), torch.split(belong, _CHUNK), strict=True):
        likeness = rows @ among.T
        best = likeness.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        before = (likeness > best).sum(1, keepdim=True)
        found.append(before < torch.tensor(DEPTHS))
    return torch.cat(found)
