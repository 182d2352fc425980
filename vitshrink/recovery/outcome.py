"""What training did."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from vitshrink.config.options import FinetuneConfig
from vitshrink.recovery.material import Material
from vitshrink.recovery.progress import Progress
from vitshrink.recovery.splitting import Split
from vitshrink.recovery.techniques.rounding import Rounding
from vitshrink.runtime.observer import Job


@dataclass(frozen=True)
class Recovery:
    """What training did; losses are those of the held-out samples, in nats where the model gives probabilities."""

    objective: str
    before: float
    """As compression left the model."""
    after: float
    best_step: int
    ended: str
    """``done``, ``time``, ``early`` (nothing gained any more) or ``diverged``."""
    samples: int
    held_out: int
    seconds: float
    settings: Mapping[str, Any]
    history: list[dict[str, Any]]
    blocks: list[dict[str, float]]
    """Relative errors ``before`` and ``after`` of every block that was rounded anew or reconstructed first."""
    familiar: bool
    """Whether the held-out samples had been calibrated on or trained on before: other views of them judged then."""
    fitted_to: frozenset[str]
    """Marks of all samples that the model was fitted to by now."""

    @classmethod
    def of(
        cls,
        config: FinetuneConfig,
        material: Material,
        split: Split,
        progress: Progress,
        rounded: Rounding,
        ended: str,
        settings: Mapping[str, Any],
        blocks: list[dict[str, float]],
    ) -> Self:
        """``settings`` are those that the config leaves open."""
        return cls(
            objective=config.objective,
            before=progress.start if rounded.before is None else rounded.before,
            after=progress.best,
            best_step=progress.best_step,
            ended=ended,
            samples=len(split.training),
            held_out=len(split.held_out),
            seconds=progress.elapsed + rounded.seconds,
            settings=asdict(config) | dict(settings),
            history=progress.history,
            blocks=blocks,
            familiar=split.familiar,
            fitted_to=material.seen | {material.samples.marks[i] for i in split.training},
        )


def warn_without_gain(progress: Progress, job: Job, rounded: float | None, *, familiar: bool) -> None:
    """Say so where no state was better than the compressed model; ``rounded``: its loss, if it was rounded anew."""
    before = progress.start if rounded is None else rounded
    if progress.best < before:
        return
    flattered = "The compression was fitted to these samples, so they look too good: add samples that it did not use. "
    job.warn(
        f"recovery gained nothing: no state had a held-out loss below {before:.4g}, the loss of the compressed "
        f"model, so this model is kept. {flattered if familiar else ''}More samples, more time or a lower "
        "learning rate may help."
    )
