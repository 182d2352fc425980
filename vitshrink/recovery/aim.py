"""What one training aims at: whose answers are compared, on what views, and in what unit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from transformers import PreTrainedModel

from vitshrink.config.options import FinetuneConfig
from vitshrink.data import Preprocessor
from vitshrink.models.tasks import head_of
from vitshrink.recovery.answers import Reader, Teacher
from vitshrink.recovery.checks import asks_dense
from vitshrink.recovery.criteria import Answers, Criterion, HeldOut
from vitshrink.recovery.objectives import Objective, Term, objective_of
from vitshrink.recovery.preparation import Prepared
from vitshrink.recovery.splitting import Split
from vitshrink.recovery.techniques.augmentation import augmentation_of
from vitshrink.recovery.techniques.hidden import usual_weight, weight_from


@dataclass(frozen=True, eq=False)
class Aim:
    """Everything about a training's loss that is known before the first pass of the compressed model."""

    config: FinetuneConfig
    answers: Answers
    objective: Objective
    held_out: HeldOut
    usual: float
    """Weight of the blocks' outputs before anything is known of the loss at the start."""
    spread: float
    """Held-out loss of the best constant answer, in the unit of ``objective``; 0 where nothing depends on it."""

    @classmethod
    def of(
        cls,
        prepared: Prepared,
        dense: PreTrainedModel | None,
        split: Split,
        preprocessor: Preprocessor,
        config: FinetuneConfig,
        seed: int,
    ) -> Self:
        """Runs the dense model on the held-out samples where a unit or a weight depends on its answers."""
        accelerator, model = prepared.accelerator, prepared.model
        teacher = None
        if dense is not None and asks_dense(config):
            teacher = Teacher(Reader(dense), autocast=accelerator.autocast)
        augmentation = augmentation_of(config, preprocessor, model, seed)
        familiar = split.familiar and config.augment
        held_out = HeldOut(accelerator, split.data, split.held_out, config.batch_size, augmentation, familiar)
        head, usual = head_of(model), usual_weight(model, config)
        relative = head.measure == "relative_error" and teacher is not None
        needed = relative or _follows_start(config, usual)
        spread = held_out.spread(teacher, head) if teacher is not None and needed else 0.0
        objective = objective_of(config, head, scale=spread if relative and spread else 1.0)
        answers = Answers(Reader(model, prepared.wrapped), teacher)
        return cls(config, answers, objective, held_out, usual, spread / objective.scale)

    def held_out_losses(self) -> list[float]:
        """The plain loss of every row of the held-out samples, the same in every process."""
        return self.held_out.losses(self.answers, self.objective)

    def features(self, start: float) -> float:
        """Weight of the blocks' outputs; ``start`` is the held-out loss of the compressed model."""
        return weight_from(start, self.spread) if _follows_start(self.config, self.usual) else self.usual

    def criterion(self, terms: Sequence[Term], *, dense_anew: bool) -> Criterion:
        """The loss of training with ``terms`` added."""
        return Criterion(
            self.answers,
            self.objective,
            self.held_out.augmentation,
            self.config.augment,
            self.config.views,
            dropout=self.config.objective == "supervised",
            terms=terms,
            dense_anew=dense_anew,
        )


def _follows_start(config: FinetuneConfig, usual: float) -> bool:
    """Whether the weight of the blocks' outputs follows from how much compression has lost."""
    return usual > 0 and config.features is None and config.objective == "distill"
