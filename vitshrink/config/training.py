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
    """How a compressed model is trained to recover: the flags of ``finetune``, the options of ``compress --finetune``.

    ``distill`` needs no labels: the dense model's answers are the targets. What is None depends on the objective.
    """

    objective: Objective = option("distill", "distill: the answers of the teacher; supervised: labels.")
    data: str | None = option(None, "Samples to train on: a folder, a file, a recipe …", panel=DATA)
    """Samples to train on, other than those of the calibration."""
    split: str | None = option(None, "Their split.", panel=DATA)
    samples: int | None = option(None, "How many to use; all if not given.", panel=DATA, low=1)
    validation: float = option(
        0.1,
        "Part of them that is held out to choose the best state.",
        panel=DATA,
        above=0,
        below=1,
        wanted="is the part held out: above 0 and below 1.",
    )
    epochs: float | None = option(
        None, "Passes over the samples at most; 10, or what --minutes allows.", panel=TRAINING, above=0
    )
    """None: as many as ``minutes`` allow, or else a usual number."""
    minutes: float | None = option(None, "Time that training may take at most.", panel=TRAINING, above=0)
    learning_rate: float | None = option(None, "Peak; that of the objective if not given.", panel=TRAINING, above=0)
    batch_size: int = option(16, "Samples a batch, for each process.", panel=TRAINING, low=1)
    accumulation: int = option(1, "Batches for each step of the optimizer.", panel=TRAINING, low=1)
    patience: int = option(4, "Stop after this many evaluations without a gain.", panel=TRAINING, low=1)
    train: Trained = option("all", "all parameters, or only the low-rank factors.", panel=TRAINING)
    label_smoothing: float = option(0.1, "Of the supervised objective.", panel=TRAINING, low=0, high=1)
    distillation: float | None = option(
        None, "Share of the teacher in the supervised objective, 0 to 1.", panel=TRAINING, low=0, high=1
    )
    features: float | None = option(
        None, "Weight of what the blocks hand on, compared with the teacher's.", panel=TRAINING, low=0
    )
    """None: a usual weight where the dense model is asked and blocks are comparable."""
    temperature: float = option(1.0, "Divides the logits in distillation.", panel=TRAINING, above=0)
    augment: bool = option(True, "Crop and mirror images, hide tokens.", panel=TRAINING)
    mixing: float | None = option(
        None, "Part of the images that are blended with another, in distillation.", panel=TRAINING, low=0, high=1
    )
    """None: a usual part in distillation without ``views``."""
    views: int | None = option(
        None, "Different augmentations of a sample; new ones forever if not given.", panel=TRAINING, low=1
    )
    """A limited number lets the dense model's answers be kept."""
    rounding: int = option(
        1,
        "Epochs between the roundings of a block, whose integers are made anew; 0 keeps them.",
        panel=TECHNIQUES,
        low=0,
    )
    blockwise: int = option(0, "Epochs of block-wise reconstruction before.", panel=TECHNIQUES, low=0)
    decatt: float = option(0.0, "Weight of the correlation of attention heads.", panel=TECHNIQUES, low=0)
    bdia: bool = option(False, "Bidirectional integration approximation.", panel=TECHNIQUES)
    reversible: bool = option(False, "BDIA, with activations recomputed from outputs.", panel=TECHNIQUES)
    gamma: float = option(
        GAMMAS[0],
        "Of BDIA: 0.5 as published; 0.25 or 0.125 stay nearer to the model.",
        panel=TECHNIQUES,
        choices=GAMMAS,
    )
    momentum: bool = option(False, "BDIA with one sign: a momentum residual network.", panel=TECHNIQUES)
    gradient_checkpointing: bool = option(False, "Recompute activations block by block.", panel=TECHNIQUES)
    precision: Precision = option("auto", "Of the passes, forward and backward.", panel=TECHNIQUES)
    checkpoints: str | None = option(
        None,
        "A directory for the state of training: the same command goes on after a kill.",
        panel=RUN,
        changes="nothing",
        writes=True,
    )

    def naming(self, entry: Entry, value: object) -> str:
        return f"finetune: {entry.name} {value!r}" + (":" if entry.option.choices else "")

    def check(self) -> None:
        if self.mixing and self.objective != "distill":
            raise UsageError("finetune: mixing blends images of different labels: it is for the objective distill.")
        if (self.momentum or self.gamma != GAMMAS[0]) and not (self.bdia or self.reversible):
            raise UsageError("finetune: gamma and momentum belong to bdia and reversible: add one of these.")
        if self.reversible and self.gradient_checkpointing:
            raise UsageError("finetune: reversible already recomputes activations: leave gradient_checkpointing out.")
        if self.features and (self.bdia or self.reversible):
            raise UsageError("finetune: bdia and reversible change what blocks hand on: leave features out.")
        if self.reversible and self.decatt:
            raise UsageError("finetune: decatt reads activations that reversible does not keep: choose one, or bdia.")

    def of_size(self, label: str) -> Self:
        """The same for one of several sizes, each with checkpoints of its own."""
        return self if self.checkpoints is None else replace(self, checkpoints=str(Path(self.checkpoints) / label))
