"""Which samples a job reads to learn from, and how any samples are read."""

from dataclasses import dataclass
from typing import Any, Literal

from vitshrink.config.fields import DATA, Options, entries_of, option

Preprocessing = Literal["checkpoint", "timm"]


@dataclass(frozen=True)
class DataConfig:
    """Source of samples, and how to read them."""

    source: str
    split: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    labels: str | None = None
    """File with the classes of a flat folder of images."""
    flags: str = "--"
    """How the flags begin that name the columns."""
    texts: str | None = None
    """Texts for a dual encoder, where they do not lie beside the images."""
    texts_flag: str | None = None
    """What names these, where it does not begin as ``flags``."""
    templates: tuple[str, ...] = ()
    """How the name of a class becomes a text for it."""


@dataclass(frozen=True, kw_only=True)
class ColumnOptions(Options):
    """Columns of a table or data set."""

    image_column: str | None = option(None, "Column with the images.", panel=DATA)
    text_column: str | None = option(None, "Column with the texts.", panel=DATA)
    text_pair_column: str | None = option(None, "Column with the second texts of pairs.", panel=DATA)


@dataclass(frozen=True, kw_only=True)
class LabelOptions(Options):
    """Where labels are, and which classes they name."""

    label_column: str | None = option(
        None,
        "Column with the labels. Separate several columns with commas, one for each label or score.",
        panel=DATA,
        in_memory=False,
    )
    class_map: str | None = option(
        None, "File that maps class names to class indices.", panel=DATA, reads=True, in_memory=False
    )


COLUMNS = (*(entry.name for entry in entries_of(ColumnOptions)), "label_column")


def columns_of(options: Options, prefix: str = "") -> dict[str, Any]:
    """The columns that a job names, as ``DataConfig`` takes them; ``prefix`` is that of its fields."""
    return {name: getattr(options, prefix + name, None) for name in COLUMNS}


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(Options):
    """Unlabeled samples to learn from."""

    calibration: str | None = option(
        None, "Unlabeled samples: a folder, a file, a URL, a recipe or a Hub data set.", panel=DATA, in_memory=False
    )
    calibration_split: str | None = option(None, "Split of the calibration data.", panel=DATA)
    calibration_texts: str | None = option(
        None, "Texts for calibration of CLIP and SigLIP, if the images have no captions.", panel=DATA
    )
    samples: int = option(512, "Number of samples to use.", panel=DATA, low=1)

    @property
    def calibration_data(self) -> DataConfig | None:
        if self.calibration is None:
            return None
        columns = columns_of(self)
        return DataConfig(
            self.calibration,
            self.calibration_split,
            **columns,
            texts=self.calibration_texts,
            texts_flag="--calibration-texts",
        )


@dataclass(frozen=True, kw_only=True)
class InputOptions(Options):
    """How samples become inputs of the model, and what becomes of those that cannot."""

    max_length: int | None = option(None, "Maximum number of tokens in a text.", panel=DATA, low=1)
    max_bad_samples: int | None = option(
        None, "Maximum number of unreadable samples; 1 % of the samples if not given.", panel=DATA, low=0
    )
    preprocess: Preprocessing = option(
        "checkpoint", "checkpoint: as the checkpoint says; timm: resize and crop as timm does.", panel=DATA
    )
    workers: int | None = option(
        None, "Threads that decode images; one for each core if not given.", panel=DATA, low=0, changes="report"
    )


@dataclass(frozen=True, kw_only=True)
class HoldoutOptions(Options):
    """Samples that are kept from learning, and judge its result."""

    holdout: int = option(
        64,
        "Number of held-out samples. They check bounds such as --max-kl, and measure fidelity if there is no --eval.",
        panel=DATA,
        low=0,
    )
