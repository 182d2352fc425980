"""From the rows of all samples to the figures of an evaluation."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from vitshrink.errors import DataError
from vitshrink.evaluation import metrics
from vitshrink.evaluation.columns import Columns
from vitshrink.models.fidelity import REGRESSION

METRICS = ("top1", "f1_micro", "spearman")
"""What models are compared by: of classes, of sets of labels, and of numbers."""
SIGNIFICANCE = 0.05
_SHOWN_DISAGREEMENTS = 24


@dataclass(frozen=True)
class Evaluation:
    """What was measured: fractions in [0, 1], divergences in nats, intervals at 95 %.

    ``metric`` names the entry of ``dense`` and ``compressed`` that ``difference`` compares: one of ``METRICS``. A model
    that was not run and a comparison that could not be made are None.
    """

    task: str
    metric: str | None
    samples: int
    dense: dict[str, Any] | None
    compressed: dict[str, Any] | None
    fidelity: dict[str, Any] | None
    difference: dict[str, Any] | None
    classes: list[dict[str, Any]]
    """Accuracy class by class, or F1 label by label, the most samples lost first; without labels the dense model's
    choice takes their place."""
    disagreements: list[dict[str, Any]]
    """Samples that the two models classify differently, the largest divergence first."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(task: str, keys: list[str], columns: Columns, names: Mapping[int, str], seed: int) -> Evaluation:
    """The figures of rows, one a key; ``names`` are those of the classes, ``seed`` drives the resampling.

    Raises DataError when the texts had no token to hide.
    """
    if "units" in columns and not columns["units"].any():
        raise DataError("no token could be masked: the texts hold nothing but special tokens.")
    scores = {role: _scores(role, columns, seed) for role in ("dense", "compressed")}
    measured = [entry for entry in scores.values() if entry]
    metric = next((name for name in METRICS if measured and name in measured[0]), None)
    return Evaluation(
        task=task,
        metric=metric,
        samples=len(keys),
        dense=scores["dense"],
        compressed=scores["compressed"],
        fidelity=_fidelity(columns, seed),
        difference=_difference(columns, seed) if len(measured) == 2 else None,
        classes=_classes(columns, names),
        disagreements=_disagreements(keys, columns, names),
    )


def _scores(role: str, columns: Columns, seed: int) -> dict[str, Any] | None:
    if f"{role}.top1" in columns:
        return _accuracy(role, columns, seed)
    if f"{role}.chosen" in columns and "truth" in columns:
        return _f1(columns[f"{role}.chosen"], columns["truth"], seed)
    if f"{role}.prediction" in columns and "target" in columns:
        return _correlation(columns[f"{role}.prediction"], columns["target"], seed)
    return None


def _correlation(prediction: Tensor, target: Tensor, seed: int) -> dict[str, Any]:
    rank = metrics.spearman(prediction, target)
    linear = [metrics.pearson(*pair) for pair in zip(prediction.unbind(1), target.unbind(1), strict=True)]
    if target.shape[1] == 1:
        interval = metrics.rank_correlation_interval(rank, len(target))
    else:
        interval = metrics.bootstrap_interval(
            lambda rows: metrics.spearman(prediction[rows], target[rows]), len(target), seed
        )
    return {"spearman": _number(rank), "pearson": _number(sum(linear) / len(linear)), "interval": list(interval)}


def _f1(chosen: Tensor, truth: Tensor, seed: int) -> dict[str, Any]:
    """Of a multi-label classifier: F1, and the samples whose labels are all right."""
    micro, macro = metrics.f1_scores(chosen, truth)
    exact = (chosen == truth).all(1)
    return {
        "f1_micro": micro,
        "interval": list(metrics.bootstrap_ratio(*metrics.f1_parts(chosen, truth, 1), seed)),
        "f1_macro": macro,
        "exact_match": float(exact.double().mean()),
        "exact_match_interval": list(metrics.wilson_interval(int(exact.sum()), len(exact))),
    }


def _accuracy(role: str, columns: Columns, seed: int) -> dict[str, Any]:
    units, top1 = columns["units"], columns[f"{role}.top1"]
    scores = {
        "top1": _proportion(top1, units),
        "correct": int(top1.sum()),
        "interval": _interval(top1, units, seed),
    }
    if f"{role}.top5" in columns:
        top5 = columns[f"{role}.top5"]
        scores |= {
            "top5": _proportion(top5, units),
            "top5_correct": int(top5.sum()),
            "top5_interval": _interval(top5, units, seed),
        }
    return scores if _one_each(units) else scores | {"tokens": int(units.sum())}


def _fidelity(columns: Columns, seed: int) -> dict[str, Any] | None:
    fidelity: dict[str, Any] = {}
    if "agreement" in columns:
        units = columns["units"]
        fidelity = {
            "agreement": _proportion(columns["agreement"], units),
            "agreement_interval": _interval(columns["agreement"], units, seed),
            "kl": _proportion(columns["kl"], units),
            "kl_interval": list(metrics.bootstrap_ratio(columns["kl"], units, seed)),
        }
        for name in ("top5_overlap", "label_agreement"):
            if name in columns:
                fidelity[name] = _proportion(columns[name], units)
    for name in ("feature_cosine", "pooled_cosine"):
        if name in columns:
            fidelity[name] = float(columns[name].mean())
    if "dense.prediction" in columns and "compressed.prediction" in columns:
        dense, compressed = columns["dense.prediction"].double(), columns["compressed.prediction"].double()
        fidelity["prediction_spearman"] = _number(metrics.spearman(dense, compressed))
        fidelity["mean_absolute_difference"] = float((dense - compressed).abs().mean())
        if "divergence" not in columns:  # of sentences, the features that the predictions are made of have it
            columns = columns | {
                "divergence": REGRESSION.divergence(dense, compressed),
                "spread": REGRESSION.spread(dense),
            }
    if "divergence" in columns:
        fidelity |= _relative_error(columns["divergence"], columns["spread"], seed)
    return fidelity or None


def _relative_error(divergence: Tensor, spread: Tensor, seed: int) -> dict[str, Any]:
    """The mean divergence as a share of the mean spread; nothing where the dense model says the same of all."""
    if not spread.sum():
        return {}
    return {
        "relative_error": _proportion(divergence, spread),
        "relative_error_interval": list(metrics.bootstrap_ratio(divergence, spread, seed)),
    }


def _difference(columns: Columns, seed: int) -> dict[str, Any]:
    """Dense against compressed on the same samples: the drop in the metric, its interval, and whether it is real."""
    if (found := _paired(columns)) is not None:
        score, target, dense, compressed = found
        drop = score(dense, target) - score(compressed, target)
        interval, p_value = metrics.bootstrap_drop(score, target, dense, compressed, seed)
        test = "paired bootstrap"
    else:
        units = columns["units"]
        worse = columns["dense.top1"].double() - columns["compressed.top1"].double()
        drop = _proportion(worse, units)
        interval = metrics.bootstrap_ratio(worse, units, seed)
        if _one_each(units):
            p_value = metrics.mcnemar_p_value(int((worse > 0).sum()), int((worse < 0).sum()))
            test = "McNemar, exact"
        else:
            p_value = metrics.sign_flip_p_value(worse, seed)
            test = "sign flips, sentence by sentence"
    return {
        "drop": _number(drop),
        "drop_interval": list(interval),
        "p_value": p_value,
        "significant": p_value < SIGNIFICANCE,
        "test": test,
    }


Score = Callable[[Tensor, Tensor], float]
"""Of predictions and what they should be."""


def _paired(columns: Columns) -> tuple[Score, Tensor, Tensor, Tensor] | None:
    """A score that is no mean over samples, what it compares with, and the answers of the two models."""
    if "target" in columns:
        return metrics.spearman, columns["target"], columns["dense.prediction"], columns["compressed.prediction"]
    if "truth" in columns:
        return _micro, columns["truth"], columns["dense.chosen"], columns["compressed.chosen"]
    return None


def _micro(chosen: Tensor, truth: Tensor) -> float:
    return metrics.f1_scores(chosen, truth)[0]


def _classes(columns: Columns, names: Mapping[int, str]) -> list[dict[str, Any]]:
    rows = _of_labels(columns, names) if _has_labels(columns) else _of_classes(columns, names)
    return sorted(rows, key=lambda row: row["samples"] * (row.get("compressed", 0.0) - row.get("dense", 0.0)))


def _of_classes(columns: Columns, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """The part of each class that is recognized."""
    roles = [role for role in ("dense", "compressed") if f"{role}.class" in columns]
    group = columns.get("label", columns.get("dense.class") if len(roles) == 2 else None)
    if group is None:
        return []
    rows = []
    for index in sorted(set(group.tolist())):
        members = group == index
        row: dict[str, Any] = {"class": names.get(index, str(index)), "samples": int(members.sum())}
        row |= {role: float((columns[f"{role}.class"][members] == index).double().mean()) for role in roles}
        rows.append(row)
    return rows


def _of_labels(columns: Columns, names: Mapping[int, str]) -> list[dict[str, Any]]:
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
        {"class": names.get(index, str(index)), "samples": int(truth[:, index].sum())}
        | {role: float(scores[role][index]) for role in roles}
        for index in range(truth.shape[1])
        if truth[:, index].any()
    ]


def _has_labels(columns: Columns) -> bool:
    return any(name.endswith(".chosen") for name in columns)


def _disagreements(keys: list[str], columns: Columns, names: Mapping[int, str]) -> list[dict[str, Any]]:
    several = _has_labels(columns)
    answers = "chosen" if several else "class"
    if "agreement" not in columns or f"dense.{answers}" not in columns:
        return []
    differing = (~columns["agreement"]).nonzero().squeeze(1)
    order = differing[columns["kl"][differing].argsort(descending=True, stable=True)][:_SHOWN_DISAGREEMENTS]

    def name(column: str, row: int) -> str | None:
        if column not in columns:
            return None
        value = columns[column][row]
        indices = value.nonzero().flatten().tolist() if several else [int(value)]
        return ", ".join(names.get(index, str(index)) for index in indices) or "none"

    return [
        {
            "sample": keys[row],
            "label": name("truth" if several else "label", row),
            "dense": name(f"dense.{answers}", row),
            "compressed": name(f"compressed.{answers}", row),
            "kl": float(columns["kl"][row]),
        }
        for row in order.tolist()
    ]


def _proportion(sums: Tensor, units: Tensor) -> float:
    return float(sums.double().sum() / units.double().sum())


def _interval(hits: Tensor, units: Tensor, seed: int) -> list[float]:
    """Wilson's for independent samples; tokens of one sentence are not, so whole sentences are drawn again."""
    if _one_each(units):
        return list(metrics.wilson_interval(int(hits.sum()), len(hits)))
    return list(metrics.bootstrap_ratio(hits, units, seed))


def _one_each(units: Tensor) -> bool:
    return bool((units == 1).all())


def _number(value: float) -> float | None:
    """None for NaN: a correlation with a constant is no number, and JSON has no word for it."""
    return None if value != value else value
