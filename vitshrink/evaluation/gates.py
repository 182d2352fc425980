"""Bounds that the user sets on a compressed model, and by how much a model keeps or misses them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from vitshrink.config.options import FIDELITIES, flag_of, parse_quantity
from vitshrink.errors import GateError, UsageError
from vitshrink.evaluation.quality import Evaluation, Fidelity


@dataclass(frozen=True)
class Verdict:
    """One bound and the figure that was held against it."""

    gate: str
    bound: float
    value: float
    margin: float
    """How far the figure is on the good side of the bound; negative where it is missed."""

    @property
    def passed(self) -> bool:
        return self.margin >= 0

    def __str__(self) -> str:
        kept = "is kept with" if self.passed else "is missed by"
        spare = " to spare" if self.passed else ""
        return (
            f"{flag_of(self.gate)} {self._shown(self.bound)} {kept} {self._shown(abs(self.margin))}{spare} "
            f"({self._shown(self.value)})"
        )

    def _shown(self, figure: float) -> str:
        if self.gate != "max_size":
            return f"{figure:.4g}"
        return f"{figure / 1e6:.4g} MB" if figure >= 1e5 else f"{figure:.0f} bytes"


@dataclass(frozen=True)
class Gates:
    """Bounds that the user sets; None is no bound."""

    min_accuracy: float | None = None
    """Percent (hundredths of a correlation)."""
    max_drop: float | None = None
    """Percentage points below the baseline (hundredths of a correlation)."""
    max_changed: float | None = None
    """Percent of the predictions, which differ from the baseline's; no labels are needed."""
    max_kl: float | None = None
    """Nats from the baseline."""
    max_error: float | None = None
    """Squared error of scores or features, as a share of their spread in the baseline."""
    max_size: int | None = None
    """Bytes of the weight files."""
    max_latency_ratio: float | None = None
    """Median time of a forward pass, as a fraction of the baseline's."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            bound = getattr(self, entry.name)
            if bound is not None and not math.isfinite(bound):
                raise UsageError(f"{flag_of(entry.name)} {bound}: give a number.")

    @classmethod
    def from_mapping(cls, entries: Any, where: str) -> Self:
        """Build from YAML keys; a size may have a unit, as in 90MB. Raises UsageError that names the entry."""
        known = [entry.name for entry in fields(cls)]
        if not isinstance(entries, Mapping):
            raise UsageError(f"{where} must hold bounds such as 'max_drop: 1'. Available: {', '.join(known)}.")
        found: dict[str, Any] = {}
        for key, value in entries.items():
            name = str(key).replace("-", "_")
            if name not in known:
                raise UsageError(f"{where}: unknown gate {key!r}. Available: {', '.join(known)}.")
            if value is None:
                continue
            if name == "max_size":
                found[name] = parse_quantity(str(value), f"{where}: {key}")
            elif isinstance(value, bool) or not isinstance(value, int | float):
                raise UsageError(f"{where}: {key}: {value!r} does not fit; expected a number.")
            else:
                found[name] = float(value)
        return cls(**found)

    def to_dict(self) -> dict[str, float]:
        """The bounds that are set."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: bound for name, bound in found.items() if bound is not None}

    def require(self, *, baseline: str | None) -> None:
        """Raises UsageError for a bound that needs a baseline, where there is none; before any work."""
        for name in ("max_drop", *FIDELITIES, "max_latency_ratio"):
            if getattr(self, name) is not None and baseline is None:
                raise UsageError(f"{flag_of(name)} compares with the dense model: pass it as --baseline.")

    def judge(
        self, evaluation: Evaluation | None, *, nbytes: float | None = None, latency_ratio: float | None = None
    ) -> list[Verdict]:
        """Hold every bound against its figure. Raises UsageError where there is no such figure.

        Args:
            evaluation: None where nothing was evaluated.
            nbytes: bytes of the weight files.
            latency_ratio: median time of a pass over that of the baseline.
        """
        score = drop = fidelity = None
        unlabeled = "nothing was evaluated"
        if evaluation is not None:
            score, fidelity, unlabeled = evaluation.score, evaluation.fidelity, "the data have no labels"
            drop = None if evaluation.difference is None else evaluation.difference.drop
        fidelity = fidelity or Fidelity()
        other = {
            "max_changed": "the models do not predict classes; use --max-error",
            "max_kl": "the models do not give probabilities; use --max-error",
            "max_error": "the models give probabilities, or all scores are equal; use --max-kl",
        }
        figures = (
            ("min_accuracy", _percent(score), unlabeled),
            ("max_drop", _percent(drop), unlabeled),
            ("max_changed", percent_changed(fidelity), other["max_changed"] if evaluation else unlabeled),
            ("max_kl", fidelity.kl, other["max_kl"] if evaluation else unlabeled),
            ("max_error", fidelity.relative_error, other["max_error"] if evaluation else unlabeled),
            ("max_size", nbytes, "the size of the weight files was not measured"),
            ("max_latency_ratio", latency_ratio, "the latency was not measured"),
        )
        verdicts = []
        for name, value, why in figures:
            bound = getattr(self, name)
            if bound is None:
                continue
            if value is None:
                raise UsageError(f"{flag_of(name)} cannot be judged: {why}.")
            verdicts.append(Verdict(name, bound, value, value - bound if name == "min_accuracy" else bound - value))
        return verdicts

    def check(
        self, evaluation: Evaluation | None, *, nbytes: float | None = None, latency_ratio: float | None = None
    ) -> None:
        """Raises GateError naming each bound that is missed and by how much; otherwise as ``judge``."""
        missed = [v for v in self.judge(evaluation, nbytes=nbytes, latency_ratio=latency_ratio) if not v.passed]
        if missed:
            raise GateError("; ".join(map(str, missed)) + ".")


def percent_changed(fidelity: Fidelity) -> float | None:
    """Of the predictions, those that differ from the dense model's; None where there are none."""
    return None if fidelity.agreement is None else _percent(1 - fidelity.agreement)


def points_lost(evaluation: Evaluation) -> float | None:
    """Of accuracy, or of another score; 0 where the dense model has none more, and None without labels."""
    drop = None if evaluation.difference is None else _percent(evaluation.difference.drop)
    return None if drop is None else max(0.0, drop)


def _percent(fraction: float | None) -> float | None:
    """Without what floating point adds: 0.8 less 0.75 is 5 percent, and keeps a bound of 5."""
    return None if fraction is None else round(100 * fraction, 9)
