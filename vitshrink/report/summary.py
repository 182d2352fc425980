"""The first answers anyone wants, from a report: how much smaller, how much faster, how much worse, is it real."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vitshrink.report.record import Report

UNKNOWN = "–"
AUTO_CLASSES = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "masked-lm": "AutoModelForMaskedLM",
}
PIPELINES = {
    "image-classification": "image-classification",
    "text-classification": "text-classification",
    "masked-lm": "fill-mask",
    "features": "feature-extraction",
}
METRIC_NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "f1_micro": "micro-F1",
    "f1_macro": "macro-F1",
    "exact_match": "all labels right",
    "spearman": "Spearman",
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
        _size_row("MACs a sample", report.macs, count),
    ]
    recovery = report.recovery
    if recovery is not None:
        before, after = number(recovery.get("before")), number(recovery.get("after"))
        rows.append(Row("Held-out loss before and after recovery", "", f"{before} → {after}", ""))
    return [*(row for row in rows if row), *latency_rows(report.latency), *accuracy_rows(report.evaluation or {})]


def latency_rows(latency: Mapping[str, Any]) -> list[Row]:
    """Median times and their middle halves, a row a batch size; for batches of more than one also the throughput."""
    rows = []
    for each in (latency, *(latency.get("others") or [])):
        timings = each.get("dense") or {}, each.get("compressed") or {}
        size = max(timing.get("batch_size", 0) for timing in timings)
        if not size:
            continue
        both = _timing(each)
        times = [f"{duration(t['median'])} ({_quartiles(t)})" if t else UNKNOWN for t in timings]
        rows.append(Row(f"Latency, batch of {size}", times[0], times[1], both.change if both else UNKNOWN))
        if size > 1:
            rates = [f"{t['throughput']:,.4g} /s" if t else UNKNOWN for t in timings]
            rows.append(Row(f"Throughput, batch of {size}", rates[0], rates[1], ""))
    return rows


def facts(report: Report) -> list[Fact]:
    """The four answers that a report opens with."""
    return [_smaller(report), _faster(report), _worse(report), _real(report)]


def headline(report: Report) -> str:
    """The same in one sentence."""
    parts = [f"{percent(report.parameters.get('kept'))} of the parameters"]
    if report.quantization is not None:
        parts = [f"{percent(report.bytes.get('kept'))} of the bytes ({report.quantization['weights']})", *parts]
    if report.macs.get("kept") is not None:
        parts.append(f"{percent(report.macs['kept'])} of the operations")
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


def metric_name(report: Report) -> str:
    evaluation = report.evaluation or {}
    name = METRIC_NAMES.get(str(evaluation.get("metric")), "accuracy")
    return f"masked-token {name}" if evaluation.get("task") == "masked-lm" else name


def auto_class(report: Report) -> str:
    """The class of transformers that loads the model."""
    return AUTO_CLASSES.get(report.task, "AutoModel")


def count(number: float | None) -> str:
    """5717416 -> ``5.72 M``."""
    return _scaled(number, 1000, ("", " k", " M", " G", " T"))


def size(number: float | None) -> str:
    """Bytes in decimal units, as file managers and model hubs show them."""
    return _scaled(number, 1000, (" B", " kB", " MB", " GB", " TB"))


def percent(fraction: float | None) -> str:
    return UNKNOWN if fraction is None else f"{100 * fraction:.1f} %"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms" if seconds < 0.1 else f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {seconds % 60:.0f} s"


def number(value: float | None, digits: int = 3) -> str:
    """A plain figure: ``0.451``, and ``<0.001`` rather than a misleading zero."""
    if value is None:
        return UNKNOWN
    if 0 < abs(value) < 10**-digits / 2:
        return f"{'>-' if value < 0 else '<'}{10**-digits:.{digits}f}"
    return f"{value:.{digits}f}"


def p_value(value: float | None) -> str:
    return UNKNOWN if value is None else "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def score(metric: str | None, value: float | None) -> str:
    return number(value) if metric == "spearman" else percent(value)


def signed(metric: str | None, value: float) -> str:
    """A change in a score: points of a percentage, or the plain figure of a correlation."""
    if metric == "spearman":
        return f"{value:+.3f}".replace("-", "−")
    return f"{100 * value:+.1f} points".replace("-", "−")


def signed_range(metric: str | None, low: float, high: float) -> str:
    return f"{signed(metric, low).removesuffix(' points')} to {signed(metric, high)}"


def plain(value: Any) -> str:
    """Nested plain data on one line: ``resize: 224, 224, rescale: no``."""
    if isinstance(value, Mapping):
        return ", ".join(f"{str(key).replace('_', ' ')}: {plain(entry)}" for key, entry in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def prepared(description: Mapping[str, Any]) -> str:
    """The effective preprocessing in a line, from ``Preprocessor.description``; empty where there is none."""
    if description.get("kind") != "image":
        words = [str(description[key]) for key in ("tokenizer",) if key in description]
        if length := description.get("max_length"):
            words.append(f"up to {length} tokens")
        if description.get("lower_case"):
            words.append("in lower case")
        if prompt := description.get("prompt"):
            words.append(f"after the prompt {prompt!r}")
        return ", ".join(words)
    parts = [f"{description['geometry']} geometry:"] if "geometry" in description else []
    steps = []
    if size := description.get("size"):
        steps.append(f"resize to {_pixels(size)}, {description.get('resample', 'default')}")
    if crop := description.get("crop_size"):
        steps.append(f"crop the middle {_pixels(crop)}")
    for key, name in (("image_mean", "mean"), ("image_std", "std")):
        if key in description:
            steps.append(f"{name} {' '.join(f'{value:.4g}' for value in description[key])}")
    return " ".join([*parts, "; ".join(steps)])


def _pixels(size: Any) -> str:
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return f"a short side of {size['shortest_edge']}"
    if isinstance(size, Mapping):
        return f"{size.get('height')} × {size.get('width')}"
    return f"{size} × {size}"


def interval(metric: str | None, bounds: Any) -> str:
    return UNKNOWN if not bounds else f"{score(metric, bounds[0])} to {score(metric, bounds[1])}"


def _scaled(number: float | None, base: int, units: tuple[str, ...]) -> str:
    if number is None:
        return UNKNOWN
    value, power = float(number), 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / base, power + 1
    digits = 0 if power == 0 else max(0, 3 - len(f"{abs(value):.0f}"))
    return f"{value:.{digits}f}{units[power]}"


def _size_row(name: str, group: Mapping[str, Any], show: Callable[[float | None], str]) -> Row | None:
    if group.get("dense") is None:
        return None
    return Row(name, show(group["dense"]), show(group.get("compressed")), f"{percent(group.get('kept'))} kept")


def accuracy_rows(evaluation: Mapping[str, Any]) -> list[Row]:
    """Scores with their intervals, and the fidelity to the dense model."""
    dense, compressed = evaluation.get("dense") or {}, evaluation.get("compressed") or {}
    fidelity, metric = evaluation.get("fidelity") or {}, evaluation.get("metric")
    rows = []
    for name in METRIC_NAMES:
        if compressed.get(name) is None and dense.get(name) is None:
            continue
        before, after = dense.get(name), compressed.get(name)
        change = UNKNOWN if before is None or after is None else signed(name, after - before)
        label = METRIC_NAMES[name]
        label = f"Masked-token {label}" if evaluation.get("task") == "masked-lm" else label[0].upper() + label[1:]
        rows.append(Row(label, score(name, before), score(name, after), change))
        if name == metric:
            before, after = (interval(name, scores.get("interval")) for scores in (dense, compressed))
            drop = (evaluation.get("difference") or {}).get("drop_interval")
            change = signed_range(name, -drop[1], -drop[0]) if drop else UNKNOWN
            rows.append(Row("95 % interval", before, after, change))
    shown: dict[str, tuple[str, Callable[[float | None], str]]] = {
        "agreement": ("Same prediction as dense", percent),
        "label_agreement": ("Same decision as dense, label by label", percent),
        "top5_overlap": ("Top-5 in common with dense", percent),
        "kl": ("KL(dense ‖ compressed), nats", number),
        "relative_error": ("Squared error relative to dense", number),
        "feature_cosine": ("Cosine to dense features, token by token", number),
        "pooled_cosine": ("Cosine to dense features, pooled", number),
        "prediction_spearman": ("Rank correlation with dense predictions", number),
    }
    for name, (label, show) in shown.items():
        if name in fidelity:
            rows.append(Row(label, "", show(fidelity[name]), ""))
    return rows


@dataclass(frozen=True)
class _Timing:
    dense: Mapping[str, Any]
    compressed: Mapping[str, Any]
    change: str
    tone: str
    batch_size: int


def _timing(latency: Mapping[str, Any]) -> _Timing | None:
    """The measured latency; where the middle halves of the two models' times overlap, no difference is claimed."""
    dense, compressed = (latency.get(role) or {} for role in ("dense", "compressed"))
    if not dense or not compressed:
        return None
    ratio = dense["median"] / compressed["median"]
    change, tone = f"{ratio:.2f}× as fast", "good" if ratio > 1 else "bad"
    if _overlap(dense, compressed):
        change, tone = "no clear difference in time", "neutral"
    return _Timing(dense, compressed, change, tone, dense["batch_size"])


def _quartiles(timing: Mapping[str, Any]) -> str:
    """``11.9–12.4``, in the unit of the median."""
    scale = 1000 if timing["median"] < 1 else 1
    digits = 1 if timing["median"] < 0.1 or timing["median"] >= 1 else 0
    return "–".join(f"{scale * timing[name]:.{digits}f}" for name in ("lower_quartile", "upper_quartile"))


def _overlap(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    low, high = (max(t["lower_quartile"] for t in (one, other)), min(t["upper_quartile"] for t in (one, other)))
    return bool(low <= high)


def _smaller(report: Report) -> Fact:
    # integers make the file smaller, not the number of parameters
    kept = (report.bytes if report.quantization and report.bytes else report.parameters).get("kept")
    detail = f"{count(report.parameters.get('dense'))} → {count(report.parameters.get('compressed'))} parameters"
    if report.bytes.get("dense") is not None:
        detail += f", {size(report.bytes['dense'])} → {size(report.bytes.get('compressed'))}"
    answer = UNKNOWN if kept is None else f"{percent(1 - kept)} smaller" if kept <= 1 else f"{percent(kept - 1)} larger"
    return Fact("How much smaller?", answer, detail, "good" if kept is not None and kept < 1 else "neutral")


def _faster(report: Report) -> Fact:
    macs, timing = report.macs, _timing(report.latency)
    counted = f"{count(macs['dense'])} → {count(macs.get('compressed'))} MACs" if macs.get("dense") else ""
    if timing is not None:
        times = " → ".join(duration(each["median"]) for each in (timing.dense, timing.compressed))
        detail = f"measured: {times}, batch of {timing.batch_size}"
        detail = f"{detail}; {counted}" if counted else detail
        return Fact("How much faster?", timing.change, detail, timing.tone)
    if counted and macs.get("kept") is not None:
        answer = f"{percent(1 - macs['kept'])} fewer operations"
        return Fact("How much faster?", answer, f"{counted} a sample; time not measured", "good")
    return Fact("How much faster?", "not measured", "neither operations nor time were counted")


def _worse(report: Report) -> Fact:
    question = "How much worse?"
    evaluation = report.evaluation
    if not evaluation:
        return Fact(question, "not measured", "there were no data to measure it on")
    metric, samples = evaluation.get("metric"), evaluation.get("samples")
    dense, compressed = evaluation.get("dense") or {}, evaluation.get("compressed") or {}
    difference, fidelity = evaluation.get("difference") or {}, evaluation.get("fidelity") or {}
    if difference.get("drop") is not None:
        drop = difference["drop"]
        detail = f"{score(metric, dense[metric])} → {score(metric, compressed[metric])} on {samples:,} samples"
        tone = ("bad" if drop > 0 else "good") if difference.get("significant") else "neutral"
        return Fact(question, f"{signed(metric, -drop)} {metric_name(report)}", detail, tone)
    if "agreement" in fidelity:
        detail = f"{samples:,} samples without labels; KL {number(fidelity.get('kl'))} nats"
        return Fact(question, f"{percent(fidelity['agreement'])} same predictions", detail)
    if "feature_cosine" in fidelity:
        error = f"; relative squared error {number(fidelity['relative_error'])}" if "relative_error" in fidelity else ""
        detail = f"token by token on {samples:,} samples{error}; pooled {number(fidelity.get('pooled_cosine'))}"
        return Fact(question, f"{number(fidelity['feature_cosine'])} cosine to dense features", detail)
    if "relative_error" in fidelity:
        detail = f"of the dense model's scores, as a share of their variance, on {samples:,} samples"
        return Fact(question, f"{number(fidelity['relative_error'])} squared error", detail)
    if metric and compressed.get(metric) is not None:
        detail = f"on {samples:,} samples; the dense model was not run"
        return Fact(question, f"{score(metric, compressed[metric])} {metric_name(report)}", detail)
    return Fact(question, "not measured", f"nothing comparable on {samples} samples")


def _real(report: Report) -> Fact:
    question = "Is the drop real?"
    evaluation = report.evaluation or {}
    difference = evaluation.get("difference") or {}
    if difference.get("drop") is None:
        return Fact(question, "cannot be told", "needs labelled samples for both models")
    metric, drop, bounds = evaluation.get("metric"), difference["drop"], difference.get("drop_interval")
    test = f"{p_value(difference.get('p_value'))} ({difference.get('test', 'paired')})"
    detail = test if not bounds else f"95 % interval {signed_range(metric, -bounds[1], -bounds[0])}; {test}"
    if not difference.get("significant"):
        return Fact(question, "within noise", detail)
    if drop > 0:
        return Fact(question, "a real drop", detail, "bad")
    return Fact(question, "a real gain", detail, "good")
