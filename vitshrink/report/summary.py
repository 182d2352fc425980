"""The first answers anyone wants, from a report: how much smaller, how much faster, how much worse, is it real."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from vitshrink.evaluation.quality import Evaluation, Fidelity, Interval
from vitshrink.models.cost import Latency
from vitshrink.report.costs import BeforeAfter, LatencyRecord, Timings
from vitshrink.report.record import Report
from vitshrink.report.wording import (
    UNKNOWN,
    count,
    duration,
    interval,
    number,
    p_value,
    percent,
    score,
    signed,
    signed_range,
    size,
)

AUTO_CLASSES = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "masked-lm": "AutoModelForMaskedLM",
}
PIPELINES = {
    "image-classification": "image-classification",
    "text-classification": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "masked-lm": "fill-mask",
    "features": "feature-extraction",
    "image-text": "zero-shot-image-classification",
}
METRIC_NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "f1_micro": "micro-F1",
    "f1_macro": "macro-F1",
    "exact_match": "all labels right",
    "entity_f1": "entity F1",
    "entity_precision": "entity precision",
    "entity_recall": "entity recall",
    "token_accuracy": "token accuracy",
    "answer_f1": "answer F1",
    "answer_exact": "exact match",
    "spearman": "Spearman",
    "ndcg_at_10": "nDCG@10",
    "recall_at_1": "recall@1",
    "text_at_1": "texts of images, recall@1",
    "text_at_5": "texts of images, recall@5",
    "text_at_10": "texts of images, recall@10",
    "image_at_1": "images of texts, recall@1",
    "image_at_5": "images of texts, recall@5",
    "image_at_10": "images of texts, recall@10",
}


@dataclass(frozen=True)
class Row:
    """One line of the before/after table; each cell is text with its unit, or "–" where nothing was measured."""

    name: str
    dense: str
    compressed: str
    change: str


@dataclass(frozen=True)
class Fact:
    """One of the first answers: a question, the figure that answers it, and what it rests on."""

    question: str
    answer: str
    detail: str
    tone: str = "neutral"
    """``good``, ``bad`` or ``neutral``."""


def summary_rows(report: Report) -> list[Row]:
    """The before/after table: sizes, operations, time, accuracy."""
    rows = [
        _size_row("Parameters", report.parameters, count),
        _size_row("Parameters of the compressible layers", report.layers_parameters, count),
        _size_row("Weight files", report.bytes, size),
        _size_row("Weights in memory", report.memory, size),
        _size_row("MACs per sample", report.macs, count),
    ]
    if report.tokens:
        tokens = [report.tokens[0].tokens, *(each.kept for each in report.tokens)]
        merging = f"from block {report.tokens[0].block}: {' → '.join(map(str, tokens))}"
        rows.append(Row("Tokens, block by block", str(tokens[0]), merging, ""))
    if (timed := report.target_latency) is not None:
        asked, levers = duration(timed.asked), " and ".join(timed.levers) or "nothing"
        name = f"Shortest pass, batch of {timed.batch_size}, target {asked}"
        faster = f"{percent(timed.compressed / timed.dense)} of the time, by {levers}"
        rows.append(Row(name, duration(timed.dense), duration(timed.compressed), faster))
    if report.recovery is not None:
        losses = f"{number(report.recovery.before)} → {number(report.recovery.after)}"
        rows.append(Row("Held-out loss before and after recovery", "", losses, ""))
    return [*(row for row in rows if row), *latency_rows(report.latency), *accuracy_rows(report.evaluation)]


def latency_rows(latency: LatencyRecord | None) -> list[Row]:
    """Median times and their middle halves, a row a batch size; for batches of more than one also the throughput."""
    rows = []
    for each in () if latency is None else latency.by_batch_size:
        size, timings = each.batch_size, (each.dense, each.compressed)
        if size is None:
            continue
        dense, compressed = (UNKNOWN if t is None else f"{duration(t.median)} ({_quartiles(t)})" for t in timings)
        rows.append(Row(f"Latency, batch of {size}", dense, compressed, _speed(each)[0]))
        if size > 1:
            dense, compressed = (UNKNOWN if t is None else f"{t.throughput:,.4g} /s" for t in timings)
            rows.append(Row(f"Throughput, batch of {size}", dense, compressed, ""))
    return [*rows, *_runtime_rows(latency)]


def timed_on(timing: Latency) -> str:
    """``onnxruntime 1.22.0, float32, 1 thread``: what ran the model."""
    return f"{timing.runtime or 'PyTorch'}, {timing.threads} thread{'s' if timing.threads > 1 else ''}"


def _runtime_rows(latency: LatencyRecord | None) -> list[Row]:
    """What ran the models, where that was not PyTorch alone."""
    timings = () if latency is None else (latency.dense, latency.compressed)
    if all(each is None or each.runtime is None for each in timings):
        return []
    dense, compressed = (UNKNOWN if each is None else timed_on(each) for each in timings)
    return [Row("Timed in", dense, compressed, "")]


def facts(report: Report) -> list[Fact]:
    """The four answers that a report opens with."""
    return [_smaller(report), _faster(report), _worse(report), _real(report)]


def headline(report: Report) -> str:
    """The same in one sentence."""
    parts = [f"{percent(report.parameters.kept)} of the parameters"]
    if report.integers is not None:
        kept = None if report.bytes is None else report.bytes.kept
        parts = [f"{percent(kept)} of the bytes ({report.integers})", *parts]
    if report.macs is not None:
        parts.append(f"{percent(report.macs.kept)} of the operations")
    worse, real = _worse(report), _real(report)
    counted = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return f"{counted}; {worse.answer} ({worse.detail}); {real.answer}."


def is_hub_id(source: str) -> bool:
    """Whether ``owner/name`` is meant, and no folder."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source))


def model_name(report: Report) -> str:
    """The Hub id, or the last part of a local path: a title, and nobody else's business where it lay."""
    return report.model if is_hub_id(report.model) else base_name(report.model)


def base_name(source: str) -> str:
    return re.split(r"[\\/]", source.rstrip("\\/"))[-1] or source


def metric_name(evaluation: Evaluation) -> str:
    name = METRIC_NAMES.get(str(evaluation.metric), "accuracy")
    return f"masked-token {name}" if evaluation.task == "masked-lm" else name


def auto_class(report: Report) -> str:
    """The class of transformers that loads the model."""
    return AUTO_CLASSES.get(report.task, "AutoModel")


def _size_row(name: str, cost: BeforeAfter | None, show: Callable[[float | None], str]) -> Row | None:
    if cost is None:
        return None
    return Row(name, show(cost.dense), show(cost.compressed), f"{percent(cost.kept)} kept")


def accuracy_rows(evaluation: Evaluation | None) -> list[Row]:
    """Scores with their intervals, and the fidelity to the dense model."""
    if evaluation is None:
        return []
    rows = []
    for name in METRIC_NAMES:
        before, after = (quality and quality.score(name) for quality in (evaluation.dense, evaluation.compressed))
        if before is None and after is None:
            continue
        change = UNKNOWN if before is None or after is None else signed(name, after - before)
        label = METRIC_NAMES[name]
        label = f"Masked-token {label}" if evaluation.task == "masked-lm" else label[0].upper() + label[1:]
        rows.append(Row(label, score(name, before), score(name, after), change))
        if name == evaluation.metric:
            rows.append(_interval_row(evaluation))
    return rows + _fidelity_rows(evaluation.fidelity or Fidelity())


def _interval_row(evaluation: Evaluation) -> Row:
    name, difference = evaluation.metric, evaluation.difference
    qualities = (evaluation.dense, evaluation.compressed)
    before, after = (interval(name, None if quality is None else quality.interval) for quality in qualities)
    change = UNKNOWN if difference is None else _gain_range(name, difference.drop_interval)
    return Row("95 % interval", before, after, change)


def _gain_range(metric: str | None, drop: Interval) -> str:
    return signed_range(metric, -drop.high, -drop.low)


def _fidelity_rows(fidelity: Fidelity) -> list[Row]:
    compared = fidelity.mean_absolute_difference is not None  # their correlation may be no number
    shown: list[tuple[str, float | None, Callable[[float | None], str], bool]] = [
        ("Same prediction as dense", fidelity.agreement, percent, False),
        ("Same decision as dense, label by label", fidelity.label_agreement, percent, False),
        ("Same entities as dense, F1", fidelity.entity_agreement, percent, False),
        ("Top-5 in common with dense", fidelity.top5_overlap, percent, False),
        ("KL(dense ‖ compressed), nats", fidelity.kl, number, False),
        ("Squared error relative to dense", fidelity.relative_error, number, False),
        ("Cosine to dense features, token by token", fidelity.feature_cosine, number, False),
        ("Cosine to dense features, pooled", fidelity.pooled_cosine, number, False),
        ("Ten nearest samples in common with dense", fidelity.neighbor_agreement, percent, False),
        ("Nearest sample of dense among the ten nearest", fidelity.nearest_kept, percent, False),
        ("Rank correlation with dense predictions", fidelity.prediction_spearman, number, compared),
    ]
    return [Row(label, "", show(value), "") for label, value, show, known in shown if known or value is not None]


def _speed(timings: Timings) -> tuple[str, str]:
    """By how much the model is faster, and the tone of that.

    Where the middle halves of the two models' times overlap, no difference is claimed.
    """
    if timings.dense is None or timings.compressed is None:
        return UNKNOWN, "neutral"
    if timings.dense.overlaps(timings.compressed):
        return "no clear difference in time", "neutral"
    ratio = timings.dense.median / timings.compressed.median
    return f"{ratio:.2f}× as fast", "good" if ratio > 1 else "bad"


def _quartiles(timing: Latency) -> str:
    """``11.9–12.4``, in the unit of the median."""
    scale = 1000 if timing.median < 1 else 1
    digits = 1 if timing.median < 0.1 or timing.median >= 1 else 0
    return f"{scale * timing.lower_quartile:.{digits}f}–{scale * timing.upper_quartile:.{digits}f}"


def _smaller(report: Report) -> Fact:
    # integers make the file smaller, not the number of parameters
    kept = (report.bytes if report.integers and report.bytes else report.parameters).kept
    detail = f"{count(report.parameters.dense)} → {count(report.parameters.compressed)} parameters"
    if report.bytes is not None:
        detail += f", {size(report.bytes.dense)} → {size(report.bytes.compressed)}"
    answer = f"{percent(1 - kept)} smaller" if kept <= 1 else f"{percent(kept - 1)} larger"
    return Fact("How much smaller?", answer, detail, "good" if kept < 1 else "neutral")


def _faster(report: Report) -> Fact:
    question, macs, timings = "How much faster?", report.macs, report.latency
    counted = "" if macs is None else f"{count(macs.dense)} → {count(macs.compressed)} MACs"
    if timings is not None and timings.dense is not None and timings.compressed is not None:
        times = " → ".join(duration(each.median) for each in (timings.dense, timings.compressed))
        detail = f"measured: {times}, batch of {timings.batch_size}"
        if timings.compressed.runtime is not None:
            detail += f", in {timed_on(timings.compressed)}"
        answer, tone = _speed(timings)
        return Fact(question, answer, f"{detail}; {counted}" if counted else detail, tone)
    if macs is not None:
        answer = f"{percent(1 - macs.kept)} fewer operations"
        return Fact(question, answer, f"{counted} per sample; time not measured", "good")
    return Fact(question, "not measured", "neither operations nor time were counted")


def _worse(report: Report) -> Fact:
    question = "How much worse?"
    if report.evaluation is None:
        return Fact(question, "not measured", "no data to measure it on")
    answer, detail, tone = (
        _drop_of(report.evaluation)
        or _distance_of(report.evaluation)
        or _score_of(report.evaluation)
        or ("not measured", f"nothing comparable on {report.evaluation.samples} samples", "neutral")
    )
    return Fact(question, answer, detail, tone)


def _drop_of(evaluation: Evaluation) -> tuple[str, str, str] | None:
    """Answer, detail and tone of the drop in the metric."""
    difference, metric = evaluation.difference, evaluation.metric
    dense, compressed = evaluation.dense, evaluation.compressed
    if difference is None or difference.drop is None or dense is None or compressed is None:
        return None
    scores = f"{score(metric, dense.score(metric))} → {score(metric, compressed.score(metric))}"
    tone = ("bad" if difference.drop > 0 else "good") if difference.significant else "neutral"
    answer = f"{signed(metric, -difference.drop)} {metric_name(evaluation)}"
    return answer, f"{scores} on {evaluation.samples:,} samples", tone


def _distance_of(evaluation: Evaluation) -> tuple[str, str, str] | None:
    """Answer, detail and tone of the distance from the dense model."""
    fidelity, samples = evaluation.fidelity or Fidelity(), evaluation.samples
    if fidelity.agreement is not None:
        detail = f"{samples:,} samples without labels; KL {number(fidelity.kl)} nats"
        return f"{percent(fidelity.agreement)} same predictions", detail, "neutral"
    if fidelity.feature_cosine is not None:
        known = fidelity.relative_error is not None
        error = f"; relative squared error {number(fidelity.relative_error)}" if known else ""
        detail = f"token by token on {samples:,} samples{error}; pooled {number(fidelity.pooled_cosine)}"
        return f"{number(fidelity.feature_cosine)} cosine to dense features", detail, "neutral"
    if fidelity.relative_error is not None:
        detail = f"of the dense model's scores, as a fraction of their variance, on {samples:,} samples"
        return f"{number(fidelity.relative_error)} squared error", detail, "neutral"
    return None


def _score_of(evaluation: Evaluation) -> tuple[str, str, str] | None:
    """Answer, detail and tone of the compressed model alone."""
    if evaluation.compressed is None or evaluation.score is None:
        return None
    detail = f"on {evaluation.samples:,} samples; the dense model was not run"
    return f"{score(evaluation.metric, evaluation.score)} {metric_name(evaluation)}", detail, "neutral"


def _real(report: Report) -> Fact:
    question = "Is the drop significant?"
    difference = None if report.evaluation is None else report.evaluation.difference
    if report.evaluation is None or difference is None or difference.drop is None:
        return Fact(question, "cannot be decided", "needs labeled samples for both models")
    drop = _gain_range(report.evaluation.metric, difference.drop_interval)
    detail = f"95 % interval {drop}; {p_value(difference.p_value)} ({difference.test})"
    if not difference.significant:
        return Fact(question, "within noise", detail)
    if difference.drop > 0:
        return Fact(question, "a real drop", detail, "bad")
    return Fact(question, "a real gain", detail, "good")
