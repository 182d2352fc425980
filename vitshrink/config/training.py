"""How a compressed model is trained to recover."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from vitshrink.config.fields import DATA, RUN, TECHNIQUES, TRAINING, Entry, Options, option
from vitshrink.config.method import Precision
from vitshrink.errors import UsageError

Objective = Literal["distill", "supervised"]
Trained = Literal["all", "factors"]
GAMMAS = (0.5, 0.25, 0.125)
"""Sizes of γ under BDIA, the published one first."""


@dataclass(frozen=True)
class FinetuneConfig(Options):
    """How a compressed model is trained: flags of ``vitshrink finetune`` and values of ``compress --finetune-option``.

    ``distill`` needs no labels, because the outputs of the dense model are the targets. The default of a field that is
    None depends on the objective.
    """

    objective: Objective = option(
        "distill", "distill: learn from the outputs of the teacher; supervised: learn from labels."
    )
    data: str | None = option(
        None, "Training samples: a folder, a file, a URL, a recipe or a Hub data set.", panel=DATA
    )
    """Samples to train on, other than those of the calibration."""
    split: str | None = option(None, "Split of the training samples.", panel=DATA)
    samples: int | None = option(None, "Number of samples to use; all if not given.", panel=DATA, low=1)
    validation: float = option(
        0.1,
        "Fraction of the samples that is held out to choose the best state.",
        panel=DATA,
        above=0,
        below=1,
        wanted="is the fraction held out: above 0 and below 1.",
    )
    epochs: float | None = option(
        None,
        "Maximum number of passes over the samples; 10 if neither this nor --minutes is given.",
        panel=TRAINING,
        above=0,
    )
    """None: as many as ``minutes`` allow, or else a usual number."""
    minutes: float | None = option(None, "Maximum training time in minutes.", panel=TRAINING, above=0)
    learning_rate: float | None = option(
        None, "Peak learning rate; the default depends on the objective.", panel=TRAINING, above=0
    )
    batch_size: int = option(16, "Samples per batch in each process.", panel=TRAINING, low=1)
    accumulation: int = option(1, "Batches per optimizer step.", panel=TRAINING, low=1)
    patience: int = option(4, "Stop after this many evaluations without improvement.", panel=TRAINING, low=1)
    train: Trained = option("all", "Train all parameters, or only the low-rank factors.", panel=TRAINING)
    label_smoothing: float = option(0.1, "Label smoothing in the supervised objective.", panel=TRAINING, low=0, high=1)
    distillation: float | None = option(
        None, "Weight of the teacher in the supervised objective, 0 to 1.", panel=TRAINING, low=0, high=1
    )
    features: float | None = option(
        None, "Weight of the difference between the block outputs of model and teacher.", panel=TRAINING, low=0
    )
    """None: a usual weight where the dense model is asked and blocks are comparable."""
    temperature: float = option(1.0, "Temperature of the logits in distillation.", panel=TRAINING, above=0)
    augment: bool = option(True, "Augment the samples: crop and mirror images, hide tokens.", panel=TRAINING)
    mixing: float | None = option(
        None,
        "Fraction of the images that are blended with another image in distillation.",
        panel=TRAINING,
        low=0,
        high=1,
    )
    """None: a usual part in distillation without ``views``."""
    views: int | None = option(
        None, "Number of augmented views per sample; new views in every epoch if not given.", panel=TRAINING, low=1
    )
    """A limited number lets the dense model's answers be kept."""
    rounding: int = option(
        1,
        "Epochs of training between the rounding steps of a block with integers; 0 keeps the integers.",
        panel=TECHNIQUES,
        low=0,
    )
    blockwise: int = option(0, "Epochs of block-wise reconstruction before training.", panel=TECHNIQUES, low=0)
    decatt: float = option(
        0.0, "Weight of the penalty on correlated attention heads (DeCAtt).", panel=TECHNIQUES, low=0
    )
    bdia: bool = option(False, "Train with bidirectional integration approximation (BDIA).", panel=TECHNIQUES)
    reversible: bool = option(False, "BDIA that recomputes activations from outputs, to save memory.", panel=TECHNIQUES)
    gamma: float = option(
        GAMMAS[0],
        "Size of γ in BDIA: 0.5 as published; 0.25 or 0.125 change the model less.",
        panel=TECHNIQUES,
        choices=GAMMAS,
    )
    momentum: bool = option(False, "BDIA with γ of one sign: a momentum residual network.", panel=TECHNIQUES)
    gradient_checkpointing: bool = option(
        False, "Recompute activations block by block, to save memory.", panel=TECHNIQUES
    )
    precision: Precision = option("auto", "Precision of the forward and backward passes.", panel=TECHNIQUES)
    checkpoints: str | None = option(
        None,
        "Directory for the training state. After a kill, the same command continues from it.",
        panel=RUN,
        changes="nothing",
        writes=True,
    )

    def naming(self, entry: Entry, value: object) -> str:
        return f"finetune: {entry.name} {value!r}" + (":" if entry.option.choices else "")

    def check(self) -> None:
        if self.mixing and self.objective != "distill":
            raise UsageError(
                "finetune: mixing blends images with different labels: use it with the objective distill only."
            )
        if (self.momentum or self.gamma != GAMMAS[0]) and not (self.bdia or self.reversible):
            raise UsageError("finetune: gamma and momentum belong to bdia and reversible: add one of these.")
        if self.reversible and self.gradient_checkpointing:
            raise UsageError("finetune: reversible already recomputes activations: remove gradient_checkpointing.")
        if self.features and (self.bdia or self.reversible):
            raise UsageError("finetune: bdia and reversible change the block outputs: remove features.")
        if self.reversible and self.decatt:
            raise UsageError(
                "finetune: decatt needs activations that reversible does not keep: choose one, or use bdia."
            )

    def of_size(self, label: str) -> Self:
        """The same for one of several sizes, each with checkpoints of its own."""
        return self if self.checkpoints is None else replace(self, checkpoints=str(Path(self.checkpoints) / label))
