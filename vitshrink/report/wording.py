"""Figures and settings as people read them, with their units."""

from collections.abc import Mapping
from typing import Any

from vitshrink.evaluation.quality import Interval

UNKNOWN = "–"
"""What was not measured."""


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
        return f"{value:+z.3f}".replace("-", "−")
    return f"{100 * value:+z.1f} points".replace("-", "−")


def signed_range(metric: str | None, low: float, high: float) -> str:
    return f"{signed(metric, low).removesuffix(' points')} to {signed(metric, high)}"


def interval(metric: str | None, bounds: Interval | None) -> str:
    return UNKNOWN if bounds is None else f"{score(metric, bounds.low)} to {score(metric, bounds.high)}"


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


def prepared(description: Mapping[str, Any] | None) -> str:
    """The effective preprocessing in a line, from ``Preprocessor.description``; empty where there is none."""
    if description is None:
        return ""
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


def _scaled(number: float | None, base: int, units: tuple[str, ...]) -> str:
    if number is None:
        return UNKNOWN
    value, power = float(number), 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / base, power + 1
    digits = 0 if power == 0 else max(0, 3 - len(f"{abs(value):.0f}"))
    return f"{value:.{digits}f}{units[power]}"
