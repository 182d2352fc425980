"""From the rows of all samples to the figures of an evaluation."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from vitshrink.errors import DataError
from vitshrink.evaluation import entity_scores, metrics, ranking
from vitshrink.evaluation.entities import kinds_of
from vitshrink.evaluation.neighbors import neighbors_kept
from vitshrink.evaluation.quality import (
    Accuracy,
    AnswerScores,
    ClassScore,
    Correlation,
    Difference,
    Disagreement,
    EntityScores,
    Evaluation,
    Fidelity,
    Interval,
    LabelScores,
    Ranking,
    Retrieval,
)
from vitshrink.evaluation.rows import Columns
from vitshrink.models.fidelity import REGRESSION

SIGNIFICANCE = 0.05
ROLES = ("dense", "compressed")
_SHOWN_DISAGREEMENTS = 24


def summarize(task: str, keys: list[str], columns: Columns, names: Mapping[int, str], seed: int) -> Evaluation:
    """The figures of rows, one a key; ``names`` are those of the classes, ``seed`` drives the resampling.

    Raises DataError when the texts had no token to hide.
    """
    if "units" in columns and not columns["units"].any():
        why = "masked" if task == "masked-lm" else "tagged"
        raise DataError(f"no token could be {why}: the texts contain only special tokens.")
    dense, compressed = (_quality(role, columns, seed) for role in ("dense", "compressed"))
    first = dense or compressed
    return Evaluation(
        task=task,
        metric=None if first is None else first.metric,
        samples=len(keys),
        dense=dense,
        compressed=compressed,
        fidelity=_fidelity(columns, seed),
        difference=None if dense is None or compressed is None else _difference(columns, seed),
        classes=_classes(columns, names),
        disagreements=_disagreements(keys, columns, names),
    )


def _quality(
    role: str, columns: Columns, seed: int
) -> Accuracy | LabelScores | EntityScores | AnswerScores | Correlation | Ranking | Retrieval | None:
    if f"{role}.prediction" in columns and ranking.is_ranking(columns):
        return ranking.ranking(role, columns, seed)
    if f"{role}.answer_f1" in columns:
        return _answers(columns[f"{role}.answer_f1"], columns[f"{role}.exact"], seed)
    if f"{role}.truth.entities" in columns:
        return entity_scores.entity_scores(role, columns, seed)
    if f"{role}.texts_found" in columns:
        return _retrieval(role, columns, seed)
    if f"{role}.top1" in columns:
        return _accuracy(role, columns, seed)
    if f"{role}.chosen" in columns and "truth" in columns:
        return _f1(columns[f"{role}.chosen"], columns["truth"], seed)
    if f"{role}.prediction" in columns and "target" in columns:
        return _correlation(columns[f"{role}.prediction"], columns["target"], seed)
    return None


def _retrieval(role: str, columns: Columns, seed: int) -> Retrieval:
    texts, images = (columns[f"{role}.{side}_found"].double() for side in ("texts", "images"))
    both = (texts + images)[:, 0] / 2
    shares = [float(share) for side in (texts, images) for share in side.mean(0)]
    return Retrieval(float(both.mean()), metrics.bootstrap_ratio(both, torch.ones_like(both), seed), *shares)


def _correlation(prediction: Tensor, target: Tensor, seed: int) -> Correlation:
    rank = metrics.spearman(prediction, target)
    linear = [metrics.pearson(*pair) for pair in zip(prediction.unbind(1), target.unbind(1), strict=True)]
    if target.shape[1] == 1:
        interval = metrics.rank_correlation_interval(rank, len(target))
    else:
        interval = metrics.bootstrap_interval(
            lambda rows: metrics.spearman(prediction[rows], target[rows]), len(target), seed
        )
    return Correlation(spearman=_number(rank), pearson=_number(sum(linear) / len(linear)), interval=interval)


def _f1(chosen: Tensor, truth: Tensor, seed: int) -> LabelScores:
    """Of a multi-label classifier: F1, and the samples whose labels are all right."""
    micro, macro = metrics.f1_scores(chosen, truth)
    exact = (chosen == truth).all(1)
    return LabelScores(
        f1_micro=micro,
        interval=metrics.bootstrap_ratio(*metrics.f1_parts(chosen, truth, 1), seed),
        f1_macro=macro,
        exact_match=float(exact.double().mean()),
        exact_match_interval=metrics.wilson_interval(int(exact.sum()), len(exact)),
    )


def _answers(shared: Tensor, exact: Tensor, seed: int) -> AnswerScores:
    return AnswerScores(
        answer_f1=float(shared.mean()),
        interval=metrics.bootstrap_ratio(shared, torch.ones_like(shared), seed),
        answer_exact=float(exact.double().mean()),
        answer_exact_interval=metrics.wilson_interval(int(exact.sum()), len(exact)),
    )


def _accuracy(role: str, columns: Columns, seed: int) -> Accuracy:
    units, top1, top5 = columns["units"], columns[f"{role}.top1"], columns.get(f"{role}.top5")
    return Accuracy(
        top1=_proportion(top1, units),
        correct=int(top1.sum()),
        interval=_interval(top1, units, seed),
        top5=None if top5 is None else _proportion(top5, units),
        top5_correct=None if top5 is None else int(top5.sum()),
        top5_interval=None if top5 is None else _interval(top5, units, seed),
        tokens=None if _one_each(units) else int(units.sum()),
    )


def _fidelity(columns: Columns, seed: int) -> Fidelity | None:
    def mean(name: str, units: Tensor | None = None) -> float | None:
        if name not in columns:
            return None
        return float(columns[name].mean()) if units is None else _proportion(columns[name], units)

    found = Fidelity(feature_cosine=mean("feature_cosine"), pooled_cosine=mean("pooled_cosine"))
    if "dense.pooled" in columns and "compressed.pooled" in columns:
        kept = neighbors_kept(columns["dense.pooled"], columns["compressed.pooled"], seed)
        if kept is not None:
            found = replace(found, neighbor_agreement=kept[0], nearest_kept=kept[1])
    if "agreement" in columns:
        units = columns["units"]
        found = replace(
            found,
            agreement=_proportion(columns["agreement"], units),
            agreement_interval=_interval(columns["agreement"], units, seed),
            kl=_proportion(columns["kl"], units),
            kl_interval=metrics.bootstrap_ratio(columns["kl"], units, seed),
            top5_overlap=mean("top5_overlap", units),
            label_agreement=mean("label_agreement", units),
            entity_agreement=entity_scores.agreement(columns),
        )
    if "dense.prediction" in columns and "compressed.prediction" in columns:
        dense, compressed = columns["dense.prediction"].double(), columns["compressed.prediction"].double()
        found = replace(
            found,
            prediction_spearman=_number(metrics.spearman(dense, compressed)),
            mean_absolute_difference=float((dense - compressed).abs().mean()),
        )
        if "divergence" not in columns:  # of sentences, the features that the predictions are made of have it
            columns = columns | {
                "divergence": REGRESSION.divergence(dense, compressed),
                "spread": REGRESSION.spread(dense),
            }
    if "divergence" in columns and columns["spread"].sum():  # there is none where the dense model says the same of all
        found = replace(
            found,
            relative_error=_proportion(columns["divergence"], columns["spread"]),
            relative_error_interval=metrics.bootstrap_ratio(columns["divergence"], columns["spread"], seed),
        )
    return None if found == Fidelity() else found


def _difference(columns: Columns, seed: int) -> Difference:
    """Dense against compressed on the same samples: the drop in the metric, its interval, and whether it is real."""
    if ranking.is_ranking(columns):
        lost = ranking.of_queries("dense", columns) - ranking.of_queries("compressed", columns)
        drop, interval = float(lost.mean()), metrics.bootstrap_ratio(lost, torch.ones_like(lost), seed)
        p_value, test = metrics.sign_flip_p_value(lost, seed), "sign flips, query by query"
    elif "dense.texts_found" in columns:
        sides = [columns[f"{role}.{side}_found"][:, 0].double() for role in ROLES for side in ("texts", "images")]
        lost = (sides[0] + sides[1] - sides[2] - sides[3]) / 2
        drop, interval = float(lost.mean()), metrics.bootstrap_ratio(lost, torch.ones_like(lost), seed)
        p_value, test = metrics.sign_flip_p_value(lost, seed), "sign flips, pair by pair"
    elif (found := _paired(columns)) is not None:
        score, target, dense, compressed = found
        drop = score(dense, target) - score(compressed, target)
        interval, p_value = metrics.bootstrap_drop(score, target, dense, compressed, seed)
        test = "paired bootstrap"
    else:
        units = columns["units"]
        figure = next(name for name in ("answer_f1", "top1") if f"dense.{name}" in columns)
        worse = columns[f"dense.{figure}"].double() - columns[f"compressed.{figure}"].double()
        drop = _proportion(worse, units)
        interval = metrics.bootstrap_ratio(worse, units, seed)
        if figure == "answer_f1":
            p_value, test = metrics.sign_flip_p_value(worse, seed), "sign flips, sample by sample"
        elif _one_each(units):
            p_value = metrics.mcnemar_p_value(int((worse > 0).sum()), int((worse < 0).sum()))
            test = "McNemar, exact"
        else:
            p_value = metrics.sign_flip_p_value(worse, seed)
            test = "sign flips, sentence by sentence"
    return Difference(
        drop=_number(drop), drop_interval=interval, p_value=p_value, significant=p_value < SIGNIFICANCE, test=test
    )


Score = Callable[[Tensor, Tensor], float]
"""Of predictions and what they should be."""


def _paired(columns: Columns) -> tuple[Score, Tensor, Tensor, Tensor] | None:
    """A score that is no mean over samples, what it compares with, and the answers of the two models."""
    if "truth.entities" in columns:
        return entity_scores.f1, *entity_scores.paired(columns)
    if "target" in columns:
        return metrics.spearman, columns["target"], columns["dense.prediction"], columns["compressed.prediction"]
    if "truth" in columns:
        return _micro, columns["truth"], columns["dense.chosen"], columns["compressed.chosen"]
    return None


def _micro(chosen: Tensor, truth: Tensor) -> float:
    return metrics.f1_scores(chosen, truth)[0]


def _classes(columns: Columns, names: Mapping[int, str]) -> tuple[ClassScore, ...]:
    if any(name.endswith(".entities") for name in columns):
        rows = entity_scores.of_kinds(columns, kinds_of(names))
    else:
        rows = _of_labels(columns, names) if _has_labels(columns) else _of_classes(columns, names)
    return tuple(sorted(rows, key=lambda row: row.samples * row.gain))


def _of_classes(columns: Columns, names: Mapping[int, str]) -> list[ClassScore]:
    """The part of each class that is recognized."""
    roles = [role for role in ("dense", "compressed") if f"{role}.class" in columns]
    group = columns.get("label", columns.get("dense.class") if len(roles) == 2 else None)
    if group is None:
        return []
    rows = []
    for index in sorted(set(group.tolist())):
        members = group == index
        scores = {role: float((columns[f"{role}.class"][members] == index).double().mean()) for role in roles}
        rows.append(ClassScore(names.get(index, str(index)), int(members.sum()), **scores))
    return rows


def _of_labels(columns: Columns, names: Mapping[int, str]) -> list[ClassScore]:
    """F1 of each label that some sample has."""
    roles = [role for role in ("dense", "compressed") if f"{role}.chosen" in columns]
    truth = columns.get("truth", columns.get("dense.chosen") if len(roles) == 2 else None)
    if truth is None:
        return []
    scores = {}
    for role in roles:
        found, wrong = metrics.f1_parts(columns[f"{role}.chosen"], truth)
        scores[role] = found / wrong.clamp_min(1)
    return [
        ClassScore(
            names.get(index, str(index)),
            int(truth[:, index].sum()),
            **{role: float(scores[role][index]) for role in roles},
        )
        for index in range(truth.shape[1])
        if truth[:, index].any()
    ]


def _has_labels(columns: Columns) -> bool:
    return any(name.endswith(".chosen") for name in columns)


def _disagreements(keys: list[str], columns: Columns, names: Mapping[int, str]) -> tuple[Disagreement, ...]:
    several = _has_labels(columns)
    answers = "chosen" if several else "class"
    if "agreement" not in columns or f"dense.{answers}" not in columns:
        return ()
    differing = (~columns["agreement"]).nonzero().squeeze(1)
    order = differing[columns["kl"][differing].argsort(descending=True, stable=True)][:_SHOWN_DISAGREEMENTS]

    def name(column: str, row: int) -> str | None:
        if column not in columns:
            return None
        value = columns[column][row]
        indices = value.nonzero().flatten().tolist() if several else [int(value)]
        return ", ".join(names.get(index, str(index)) for index in indices) or "none"

    return tuple(
        Disagreement(
            sample=keys[row],
            label=name("truth" if several else "label", row),
            dense=name(f"dense.{answers}", row),
            compressed=name(f"compressed.{answers}", row),
            kl=float(columns["kl"][row]),
        )
        for row in order.tolist()
    )


def _proportion(sums: Tensor, units: Tensor) -> float:
    return float(sums.double().sum() / units.double().sum())


def _interval(hits: Tensor, units: Tensor, seed: int) -> Interval:
    """Wilson's for independent samples; tokens of one sentence are not, so whole sentences are drawn again."""
    if _one_each(units):
        return metrics.wilson_interval(int(hits.sum()), len(hits))
    return metrics.bootstrap_ratio(hits, units, seed)


def _one_each(units: Tensor) -> bool:
    return bool((units == 1).all())


def _number(value: float) -> float | None:
    """None for NaN: a correlation with a constant is no number, and JSON has no word for it."""
    return None if value != value else value
