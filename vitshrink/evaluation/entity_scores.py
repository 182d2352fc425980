"""Figures of the entities that token classifiers find."""

import torch
from torch import Tensor

from vitshrink.evaluation import metrics
from vitshrink.evaluation.quality import ClassScore, EntityScores
from vitshrink.evaluation.rows import Columns


def entity_scores(role: str, columns: Columns, seed: int) -> EntityScores:
    """Of one model, whose tags and the true ones are known."""
    right, found, true = (
        columns[name].sum(1) for name in (f"{role}.truth.entities", f"{role}.entities", "truth.entities")
    )
    hits, words = columns[f"{role}.top1"], columns["units"]
    return EntityScores(
        entity_f1=f1(torch.stack([right, found], 1), true),
        interval=metrics.bootstrap_ratio(2 * right, found + true, seed),
        entity_precision=float(right.sum() / found.sum().clamp_min(1)),
        entity_recall=float(right.sum() / true.sum().clamp_min(1)),
        entities=int(true.sum()),
        token_accuracy=float(hits.sum() / words.sum()),
        token_accuracy_interval=metrics.bootstrap_ratio(hits, words, seed),
        tokens=int(words.sum()),
    )


def paired(columns: Columns) -> tuple[Tensor, Tensor, Tensor]:
    """What ``f1`` takes of the true entities, and of those of the dense and the compressed model."""
    dense, compressed = (
        torch.stack([columns[f"{role}.truth.entities"].sum(1), columns[f"{role}.entities"].sum(1)], 1)
        for role in ("dense", "compressed")
    )
    return columns["truth.entities"].sum(1), dense, compressed


def f1(answers: Tensor, true: Tensor) -> float:
    """Of right and found entities (samples, 2), and of the number of true ones (samples,)."""
    right, found = answers.double().sum(0)
    return float(2 * right / (found + true.sum()).clamp_min(1))


def agreement(columns: Columns) -> float | None:
    """F1 of the compressed model's entities by the dense one's; None where neither finds any."""
    if "dense.compressed.entities" not in columns:
        return None
    shared, dense, compressed = (
        columns[f"{name}.entities"].sum() for name in ("dense.compressed", "dense", "compressed")
    )
    return float(2 * shared / (dense + compressed)) if dense + compressed else None


def of_kinds(columns: Columns, kinds: list[str]) -> list[ClassScore]:
    """F1 of each kind that is there, or that the dense model finds."""
    roles = [role for role in ("dense", "compressed") if f"{role}.entities" in columns]
    by = "truth" if "truth.entities" in columns else "dense"
    if by == "dense" and len(roles) < 2:
        return []
    true = columns[f"{by}.entities"].sum(0)
    shared = {"dense": "dense", "compressed": "dense.compressed"}
    if by == "truth":
        shared = {role: f"{role}.truth" for role in roles}
    scores = {}
    for role in roles:
        right, found = (columns[f"{name}.entities"].sum(0) for name in (shared[role], role))
        scores[role] = 2 * right / (found + true).clamp_min(1)
    return [
        ClassScore(kind, int(true[index]), **{role: float(scores[role][index]) for role in roles})
        for index, kind in enumerate(kinds)
        if true[index]
    ]
