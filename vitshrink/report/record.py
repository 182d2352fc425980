"""The record of a compression, and its JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, final

from pydantic import TypeAdapter, with_config

from vitshrink.errors import DataError
from vitshrink.evaluation.quality import Evaluation, EvaluationRecord
from vitshrink.report.costs import BeforeAfter, LatencyRecord, LatencyTarget, Timings
from vitshrink.report.making import (
    CODED,
    BlockTokens,
    CalibrationRecord,
    Environment,
    LayerEntry,
    QuantizationRecord,
    RecoveryRecord,
)
from vitshrink.report.reading import RULES, Group, parse
from vitshrink.runtime.records import IfSet, plain

FILE_NAME = "report.json"

SCHEMA: Literal[1] = 1
"""Rises when an entry of the JSON gets another meaning or goes away, not when one is added."""


@final
@with_config(RULES)
@dataclass(frozen=True, kw_only=True)
class Report:
    """All figures of one compressed model: fractions in [0, 1], bytes, seconds, nats.

    What was not measured is None, and every rendering says so.
    """

    vitshrink: str
    """Version of vitshrink that wrote the report."""
    model: str
    """The dense model: its Hub id, or the name of its folder."""
    task: str
    """``image-classification``, ``text-classification``, ``masked-lm`` or ``features``."""
    method: str
    """Method; ``none`` if the weights were only rounded to integers."""
    allocation: str
    """How the parameters were distributed over the layers."""
    compensation: str
    """Repair after truncation."""
    parameters: BeforeAfter
    """Numbers that the model stores."""
    layers_parameters: Group[BeforeAfter]
    """Numbers that the weights of ``layers`` store."""
    layers: tuple[LayerEntry, ...]
    """Layers and attentions that could be compressed."""
    quantization: QuantizationRecord | None = None
    """None if all weights are floating-point numbers."""
    bytes: Group[BeforeAfter] = None
    """Bytes of the weight files."""
    memory: Group[BeforeAfter] = None
    """Bytes of the weights in memory, in the type they were measured in."""
    macs: Group[BeforeAfter] = None
    """Multiply-accumulate operations for one sample."""
    tokens: IfSet[tuple[BlockTokens, ...]] = None
    """What the blocks read and keep, from the first that merges tokens; left out where none does."""
    latency: Group[LatencyRecord] = None
    """Time of a forward pass."""
    target_latency: IfSet[LatencyTarget] = None
    """Requested and measured time; left out if no time was requested."""
    evaluation: EvaluationRecord | None = None
    """Quality of both models on the same samples."""
    calibration: CalibrationRecord | None = None
    """None if the method needs no samples."""
    fitted_to: str = ""
    """Marks of the samples that the model was calibrated on and trained on (``SampleSet.marks``), spaces between."""
    recovery: RecoveryRecord | None = None
    """None if the model was not trained after compression."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds by stage of the job."""
    environment: Environment = field(default_factory=Environment)
    """Software and hardware of the job."""
    command: str | None = None
    """The command line that does the job again."""
    recipe: Mapping[str, Any] | None = None
    """Every setting of the job, as in ``recipe.yaml``."""
    warnings: tuple[str, ...] = ()
    """Warnings of the job."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Files of the source directory that are not in the result, with the reason."""
    schema: Literal[1] = SCHEMA
    """Version of this schema; it rises when an entry gets another meaning or goes away."""

    @property
    def latency_ratio(self) -> float | None:
        """Median time of a pass, as a fraction of the dense model's."""
        return None if self.latency is None else self.latency.ratio

    @property
    def integers(self) -> str | None:
        """Of what kind the weights are, where they are integers: ``int8``, or so many ``bits`` on average."""
        if self.quantization is not None:
            return self.quantization.weights
        return None if self.coded_bits is None else f"{self.coded_bits:.2g} bits"

    @property
    def coded_bits(self) -> float | None:
        """Bits that a weight takes on average, of the integers of any fineness; None where there are none."""
        coded = [(layer.bits or 0.0, layer.shape[0] * layer.shape[1]) for layer in self.layers if layer.form == CODED]
        return sum(bits * count for bits, count in coded) / sum(count for _, count in coded) if coded else None

    @property
    def kind(self) -> str:
        """What was done, in a word or two: ``3.2 bits``, ``narrow``, ``svd``, ``merged tokens``, ``svd, int8``."""
        if self.quantization is not None and self.method == "none":
            static = self.quantization.activations == "static"
            return self.quantization.weights + (" static" if static else "")
        if self.coded_bits is not None:
            return self.integers or self.method
        forms = self.setting("forms")
        parts = [forms if forms in ("narrow", "rank+narrow") else "" if self.layers_are_dense else self.method]
        parts += ["merged tokens" if self.tokens else "", self.integers or ""]
        return ", ".join(filter(None, parts)) or self.method

    @property
    def layers_are_dense(self) -> bool:
        """Whether every layer stayed as it was."""
        return all(layer.dense for layer in self.layers)

    def setting(self, name: str) -> Any:
        """One entry of the recipe; None where there is none."""
        return None if self.recipe is None else self.recipe.get(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: what is not a finite number becomes None."""
        entries: dict[str, Any] = plain(self)
        return entries

    def to_json(self) -> str:
        """Strict JSON (no NaN), the keys in the order of the fields."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = FILE_NAME) -> "Report":
        """Read what ``to_json`` wrote; entries of a newer version are left out.

        Raises DataError, naming ``where`` and the entry, when it is not a report.
        """
        return parse(_adapter(), text, where, SCHEMA)

    @classmethod
    def read(cls, directory: Path) -> "Report":
        """Read the report of a compressed directory. Raises DataError."""
        file = directory / FILE_NAME if directory.is_dir() else directory
        try:
            return cls.from_json(file.read_text(encoding="utf-8"), str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {file} ({error}): name a directory that vitshrink compress wrote.") from error


def report_schema() -> dict[str, Any]:
    """The JSON Schema of ``report.json``."""
    # what a record has from another one is described there
    made = TypeAdapter(tuple[Report, Evaluation, Timings], config=RULES).json_schema()["$defs"]
    for record, base in (("EvaluationRecord", made.pop("Evaluation")), ("LatencyRecord", made["Timings"])):
        made[record]["properties"] |= base["properties"]
    report = made.pop("Report")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **report, "$defs": made}


@cache
def _adapter() -> TypeAdapter[Report]:
    return TypeAdapter(Report)
