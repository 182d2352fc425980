"""``quantize``: integers in the place of matrices, with calibration data or without."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vitshrink.config.compress import CompressConfig, one_size, survey_of
from vitshrink.config.data import (
    COLUMNS,
    CalibrationOptions,
    ColumnOptions,
    DataConfig,
    HoldoutOptions,
    InputOptions,
    LabelOptions,
    columns_of,
)
from vitshrink.config.evaluation import EvaluationColumnOptions, EvaluationOptions
from vitshrink.config.fields import DATA, METHOD, Options, entries_of, option
from vitshrink.config.job import JobOptions
from vitshrink.config.method import LayerOptions
from vitshrink.config.options import A_CHECKPOINT
from vitshrink.config.quantities import quantized_bits
from vitshrink.config.run import CalibrationBatchOptions, NetworkOptions, Paths, RunOptions, SaveOptions, TypeOptions
from vitshrink.config.size import BoundOptions, BytesOptions
from vitshrink.errors import UsageError

Rounding = Literal["auto", "curvature", "nearest"]


@dataclass(frozen=True, kw_only=True)
class IntegerSizeOptions(BoundOptions, BytesOptions):
    """Sizes that integers have."""


@dataclass(frozen=True, kw_only=True)
class CurvatureOptions(
    TypeOptions, EvaluationColumnOptions, HoldoutOptions, CalibrationOptions, LayerOptions, IntegerSizeOptions
):
    """What calibration data give a choice of."""


@dataclass(frozen=True, kw_only=True)
class NearestOptions(Options):
    """What rounding to the nearest has a choice of."""

    weights: str | None = option(
        None, "Round to nearest int8 (default), or int4 in groups of 32.", panel=METHOD, suggested=("int8", "int4")
    )
    activations: str | None = option(
        None,
        "dynamic: compute in int8 (default for int8); static: compute in int8 on fixed grids from --calibration, "
        "for runtimes; none: integer weights only, no faster.",
        panel=METHOD,
        suggested=("dynamic", "static", "none"),
    )
    baseline: str | None = option(None, "Dense model to compare with; MODEL if not given.", panel=DATA, reads=True)


CURVATURE_ONLY, NEAREST_ONLY, INTEGER_SIZES = (
    tuple(entry.name for entry in entries_of(group)) for group in (CurvatureOptions, NearestOptions, IntegerSizeOptions)
)


@dataclass(frozen=True, kw_only=True)
class QuantizeJob(
    SaveOptions,
    CalibrationBatchOptions,
    NetworkOptions,
    RunOptions,
    InputOptions,
    LabelOptions,
    ColumnOptions,
    EvaluationOptions,
    NearestOptions,
    CurvatureOptions,
    Paths,
    JobOptions,
):
    """Options of ``vitshrink quantize``."""

    rounding: Rounding = option(
        "auto",
        "curvature: round with the least loss at the outputs (needs --calibration); nearest: round to nearest (no "
        "data); auto: curvature if there is --calibration, otherwise nearest.",
        panel=METHOD,
    )

    command_name: ClassVar = "quantize"
    what: ClassVar = {"model": "the checkpoint", "output": "the directory to write"}
    example: ClassVar = "vitshrink quantize ./small ./int8"
    reworded: ClassVar = {"model": {"help": A_CHECKPOINT}, "seed": {"help": "Seed for the samples and the intervals."}}

    def check(self) -> None:
        if self.rounds == "static":
            self._check_static()
        elif self.rounds == "nearest":
            self._check_nearest()
        else:
            self._check_curvature()

    @property
    def rounds(self) -> Literal["curvature", "nearest", "static"]:
        """What ``rounding`` comes to; ``static`` where activations are rounded on grids that are chosen beforehand."""
        if self.activations == "static":
            return "static"
        if self.rounding != "auto":
            return self.rounding
        return "nearest" if self.calibration is None else "curvature"

    @property
    def could_lose_less(self) -> bool:
        """Whether nobody chose to do without calibration data."""
        return self.rounding == "auto" and self.calibration is None

    @property
    def eval_data(self) -> DataConfig | None:
        if self.eval is None:
            return None
        return DataConfig(self.eval, self.eval_split, **columns_of(self), labels=self.eval_labels)

    def compression(self) -> CompressConfig:
        """The job that rounds by calibration data; a column has the same name in both sets, if nothing else is said."""
        columns = {f"eval_{name}": getattr(self, f"eval_{name}") or getattr(self, name) for name in COLUMNS}
        if self.max_accuracy_drop is None:  # nothing reads labels of calibration data
            columns["label_column"] = None
        return CompressConfig(**self.shared_with(CompressConfig) | columns | {"forms": "bits"})

    def _check_static(self) -> None:
        if self.calibration is None:
            raise UsageError(
                "--activations static needs to see the inputs of every layer: pass --calibration with a few "
                "hundred unlabeled samples, or use --activations dynamic, which needs none."
            )
        if self.weights not in (None, "int8"):
            raise UsageError(f"--weights {self.weights}: --activations static needs int8 weights.")
        if self.rounding == "nearest":
            raise UsageError("--activations static rounds with calibration data: remove --rounding nearest.")
        if given := self.given(INTEGER_SIZES):
            raise UsageError(f"{given[0]}: --activations static always uses 8-bit weights. Remove {given[0]}.")
        if self.layers != "all":
            raise UsageError(
                f"--layers {self.layers}: with --activations static, choose layers with --include or --exclude."
            )

    def _check_nearest(self) -> None:
        if given := self.given(CURVATURE_ONLY):
            chosen = self.rounding == "nearest"
            how = (
                "remove it, or remove --rounding nearest" if chosen else "pass --calibration with a few hundred samples"
            )
            raise UsageError(f"{given[0]} needs rounding with calibration data: {how}.")
        quantized_bits(self.weights or "int8", self.activations)

    def _check_curvature(self) -> None:
        if self.calibration is None:
            raise UsageError(
                "--rounding curvature needs a few hundred unlabeled samples: pass --calibration with a folder, a "
                "file, a recipe or a Hub data set."
            )
        if given := self.given(NEAREST_ONLY):
            raise UsageError(
                f"{given[0]} is for rounding to nearest, which uses no calibration data: remove --calibration or "
                f"{given[0]}."
            )
        one_size(self.given(INTEGER_SIZES), INTEGER_SIZES, "--bits 4", survey_of(self.model, self.calibration))
        self.compression()
