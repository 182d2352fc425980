"""``frontier``: what sizes of a model would lose, before one is chosen."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vitshrink.config.data import CalibrationOptions, ColumnOptions, HoldoutOptions, InputOptions
from vitshrink.config.fields import DATA, METHOD, RUN, SIZE, option, required
from vitshrink.config.job import JobOptions
from vitshrink.config.method import Forms, LayerOptions
from vitshrink.config.options import CompressConfig
from vitshrink.config.run import BatchOptions, NetworkOptions, RunOptions, TypeOptions
from vitshrink.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class FrontierJob(
    TypeOptions,
    BatchOptions,
    NetworkOptions,
    RunOptions,
    InputOptions,
    ColumnOptions,
    HoldoutOptions,
    CalibrationOptions,
    LayerOptions,
    JobOptions,
):
    """Everything ``frontier`` needs to know: what ``compress`` does, but the size."""

    model: str = required("A dense checkpoint: a directory or a Hub id.", positional=True, reads=True)
    points: int = option(24, "Sizes at which the loss is predicted.", panel=SIZE, low=3)
    measured: int = option(
        5, "How many of them are built and measured as well, beside the knee; 0 for none.", panel=SIZE, low=0
    )
    forms: Forms = option(
        "auto",
        "What layers may become. bits: integers of any fineness; rank: two factors; auto: what compress takes.",
        panel=METHOD,
    )
    output: str | None = option(
        None,
        "Write frontier.json, a picture and a page with both to this directory.",
        panel=RUN,
        changes="nothing",
        writes=True,
    )

    command_name: ClassVar = "frontier"
    what: ClassVar = {"model": "the dense checkpoint"}
    example: ClassVar = "vitshrink frontier ./model --calibration ./photos"
    reworded: ClassVar = {
        "holdout": {"help": "How many others measure what is lost; 0 for predictions alone."},
        "calibration": {"help": "Unlabeled samples: a folder, a file, a recipe or a Hub data set.", "panel": DATA},
    }

    def check(self) -> None:
        if self.calibration is None:
            raise UsageError(
                "what sizes lose is learned from samples: pass --calibration with a folder, a file, a recipe or a Hub "
                "data set (a few hundred unlabeled samples do)."
            )

    def at(self, size: str) -> CompressConfig:
        """The job that builds the model of this ``--target-size``."""
        shared = self.shared_with(CompressConfig) | {"output": f"{Path(self.model).name or 'model'}-{size}"}
        return CompressConfig(target_size=size, **shared)
