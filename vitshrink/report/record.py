"""The record of a compression, and its JSON."""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from vitshrink.config.names import shown_text
from vitshrink.errors import DataError

FILE_NAME = "report.json"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that is known of one compressed model; fractions in [0, 1], bytes, seconds, nats.

    The groups are plain dictionaries with the entries named here; an entry that was not measured is left out or
    None, and every rendering says so.
    """

    vitshrink: str
    """Version that wrote it."""
    model: str
    """The dense model: its Hub id, or the name of its folder."""
    task: str
    method: str
    allocation: str
    compensation: str
    parameters: Mapping[str, Any]
    """Of the whole model: ``dense``, ``compressed``, ``kept``."""
    layers_parameters: Mapping[str, Any]
    """Of the weights of the layers that could be factorised: ``dense``, ``compressed``, ``kept``."""
    layers: list[Mapping[str, Any]]
    """``name``, ``shape`` (out, in), ``rank`` (None: dense), ``parameters``, ``relative_error``, ``reason``."""
    quantization: Mapping[str, Any] | None = None
    """``weights`` (``int8``, ``int4``) and ``activations`` (``none``, ``dynamic``); None: all in floating point."""
    bytes: Mapping[str, Any] = field(default_factory=dict)
    """Of the weight files: ``dense``, ``compressed``, ``kept``."""
    memory: Mapping[str, Any] = field(default_factory=dict)
    """Of the weights in memory as they were measured: ``dense``, ``compressed``, ``kept``."""
    macs: Mapping[str, Any] = field(default_factory=dict)
    """Multiply-accumulate operations of one sample: ``dense``, ``compressed``, ``kept``."""
    latency: Mapping[str, Any] = field(default_factory=dict)
    """``dense`` and ``compressed``, each as ``models.cost.Latency``; ``others``: the same for other batch sizes."""
    evaluation: Mapping[str, Any] | None = None
    """As ``vitshrink.evaluation.Evaluation``, with ``source``, ``fingerprint``, ``label_rule``, ``preprocessing``,
    ``pooling`` and ``similarity``; a ``thumbnail`` in disagreements where the user asked for them."""
    calibration: Mapping[str, Any] | None = None
    """``source``, ``samples``, ``tokens``, ``seed``, ``fingerprint``."""
    fitted_to: str = ""
    """Marks of the samples that the model was calibrated on and trained on (``SampleSet.marks``), spaces between."""
    recovery: Mapping[str, Any] | None = None
    """As ``vitshrink.recovery.Recovery``, where the model was trained after compression."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds by stage."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """``python``, ``torch``, ``transformers``, ``platform``, ``device``, ``threads``, ``peak_memory`` in bytes."""
    command: str | None = None
    recipe: Mapping[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Files of the source's directory that are not in the result, and why."""

    @property
    def latency_ratio(self) -> float | None:
        """Median time of a pass, as a fraction of the dense model's."""
        dense, compressed = ((self.latency.get(role) or {}).get("median") for role in ("dense", "compressed"))
        return compressed / dense if dense and compressed else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: what is not a finite number becomes None."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def to_json(self) -> str:
        """Strict JSON (no NaN), the keys in the order of the fields."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = FILE_NAME) -> "Report":
        """Read what ``to_json`` wrote; entries of a newer version are left out.

        Raises DataError, naming ``where``, when it is not a report.
        """
        try:
            entries = json.loads(text)
        except ValueError as error:
            raise DataError(f"{where} is not valid JSON ({error}): write it again with vitshrink compress.") from error
        known = {entry.name: entry for entry in fields(cls)}
        needed = {name for name, entry in known.items() if entry.default is entry.default_factory is MISSING}
        missing = sorted(needed - entries.keys()) if isinstance(entries, dict) else sorted(needed)
        if missing:
            raise DataError(f"{where} is not a report of vitshrink: it has no {', '.join(missing)}.")
        for name, value in entries.items():
            if name in known and not _fits(value, known[name].type):
                raise DataError(f"{where}: the entry {name!r} cannot be {value!r}: the file is damaged.")
        return cls(**{name: value for name, value in entries.items() if name in known})

    @classmethod
    def read(cls, directory: Path) -> "Report":
        """Read the report of a compressed directory. Raises DataError."""
        file = directory / FILE_NAME if directory.is_dir() else directory
        try:
            return cls.from_json(file.read_text(encoding="utf-8"), str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"cannot read {file} ({error}): name a directory that vitshrink compress has written."
            ) from error


def before_after(dense: float, compressed: float) -> dict[str, float]:
    """``dense``, ``compressed`` and the fraction ``kept``."""
    return {"dense": dense, "compressed": compressed, "kept": compressed / dense if dense else 1.0}


def _fits(value: Any, annotation: Any) -> bool:
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return any(isinstance(value, get_origin(kind) or kind) for kind in kinds)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {shown_text(str(key)): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, int | float | bool):
        return value
    return shown_text(str(value))  # names, and paths, dtypes and devices
