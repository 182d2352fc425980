"""``frontier``: what sizes of a model would lose, before one is chosen."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vitshrink.config.data import CalibrationOptions, ColumnOptions, HoldoutOptions, InputOptions
from vitshrink.config.fields import DATA, METHOD, RUN, SIZE, option, required
from vitshrink.config.job import JobOptions
from vitshrink.config.method import Forms, LayerOptions
from vitshrink.config.options import CompressConfig
from vitshrink.config.run import CalibrationBatchOptions, NetworkOptions, RunOptions, TypeOptions
from vitshrink.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class FrontierJob(
    TypeOptions,
    CalibrationBatchOptions,
    NetworkOptions,
    RunOptions,
    InputOptions,
    ColumnOptions,
    HoldoutOptions,
    CalibrationOptions,
    LayerOptions,
    JobOptions,
):
    """Options of ``vitshrink frontier``: those of ``compress``, without the size."""

    model: str = required("A dense checkpoint: a directory or a Hub id.", positional=True, reads=True)
    points: int = option(24, "Number of sizes for which the loss is predicted.", panel=SIZE, low=3)
    measured: int = option(
        5, "Number of sizes that are also built and measured, besides the knee; 0 for none.", panel=SIZE, low=0
    )
    forms: Forms = option(
        "auto",
        "How layers may be stored. bits: integers of any bit width; rank: two low-rank factors; auto: the choice "
        "of compress.",
        panel=METHOD,
    )
    output: str | None = option(
        None,
        "Write frontier.json, a picture and an HTML page to this directory.",
        panel=RUN,
        changes="nothing",
        writes=True,
    )

    command_name: ClassVar = "frontier"
    what: ClassVar = {"model": "the dense checkpoint"}
    example: ClassVar = "vitshrink frontier ./model --calibration ./photos"
    reworded: ClassVar = {
        "holdout": {"help": "Number of held-out samples that measure the loss; 0 for predictions only."},
        "calibration": {
            "help": "Unlabeled samples: a folder, a file, a URL, a recipe or a Hub data set.",
            "panel": DATA,
        },
    }

    def check(self) -> None:
        if self.calibration is None:
            raise UsageError(
                "the frontier needs samples: pass --calibration with a folder, a file, a recipe or a Hub data set. "
                "A few hundred unlabeled samples are enough."
            )

    def at(self, size: str) -> CompressConfig:
        """The job that builds the model of this ``--target-size``."""
        shared = self.shared_with(CompressConfig) | {"output": f"{Path(self.model).name or 'model'}-{size}"}
        return CompressConfig(target_size=size, **shared)
