"""``recover``: train a compressed model until it is as near to the dense one, or to the labels, as the data allow."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from vitshrink.config.options import FinetuneConfig
from vitshrink.data import Preprocessor
from vitshrink.data.opening import warn_of_bad
from vitshrink.errors import NumericsError
from vitshrink.recovery.aim import Aim
from vitshrink.recovery.checkpoints import Checkpoints, identity_of
from vitshrink.recovery.checks import check
from vitshrink.recovery.material import Material
from vitshrink.recovery.outcome import Recovery, warn_without_gain
from vitshrink.recovery.preparation import Prepared, prepared
from vitshrink.recovery.progress import Progress
from vitshrink.recovery.splitting import Split, read_and_split
from vitshrink.recovery.techniques.applied import applied
from vitshrink.recovery.techniques.blockwise import reconstruct
from vitshrink.recovery.techniques.factors import whole_factors
from vitshrink.recovery.techniques.rounding import Rounder, Rounding, round_anew, roundable, take_over, weights_of
from vitshrink.recovery.training import Loop, steps_an_epoch
from vitshrink.runtime.observer import Job
from vitshrink.statistics.digests import model_digest

RATES = {"distill": 5e-5, "supervised": 1e-4}
"""Peak learning rates."""
EPOCHS = 10.0
MOST_EPOCHS = 1000.0
"""Where time is the limit."""
MOST_STEPS_UNJUDGED = 200

Identity = Callable[[], Mapping[str, Any]]
"""All that a result follows from; asked for only where checkpoints are kept, since it reads every weight."""


def recover(
    model: PreTrainedModel,
    dense: PreTrainedModel | None,
    material: Material,
    preprocessor: Preprocessor,
    config: FinetuneConfig,
    job: Job,
    *,
    rounder: Rounder | None = None,
    seed: int = 0,
    attention: str = "sdpa",
    max_bad_samples: int | None = None,
) -> Recovery:
    """Train ``model``, in place, on ``material``; it ends as the best state by held-out loss, at worst as it began.

    Layers with pivots are trained as two whole factors, and stored with pivots again: ranks and sizes stay. What is in
    ``config.checkpoints`` stays there until the caller has saved the model. Modes, random numbers and what accelerate
    keeps for the whole process are the caller's again afterwards.

    Args:
        dense: the model that was compressed; None where only labels count.
        rounder: makes integers, those of the blocks anew before training; None keeps them.

    Raises:
        UsageError: an objective that this model or these data do not allow, or the checkpoints of another job.
        DataError: too few samples, or too many unusable ones.
        NumericsError: the model's answers are not finite before training.
    """
    check(model, config, dense=dense is not None, labeled=material.label_of is not None)
    start = model_digest(model) if config.checkpoints else ""
    split = read_and_split(material, preprocessor, config, job, seed=seed, max_bad_samples=max_bad_samples)
    with whole_factors(model), prepared(model, dense, split, config, seed) as ready:
        aim = Aim.of(ready, dense, split, preprocessor, config, seed)
        identity = partial(identity_of, start, dense, material, preprocessor, config, seed, ready.accelerator)
        loop = _loop(ready, aim, config, identity, job)
        rounded = Rounding()
        if rounder is not None and dense is not None and roundable(model, dense, config):
            rounded = _rounded(ready, loop, dense, split, config, rounder, job, seed)
        resumed = _begin(loop, config, job)
        features = aim.features(loop.progress.start)
        blocks = list(rounded.blocks)
        if config.blockwise and dense is not None and not resumed:
            blocks += reconstruct(ready, dense, split, config, job)
            loop.judge()
        with applied(model, dense, config, features=features, attention=attention) as terms:
            criterion = aim.criterion(terms, dense_anew=bool(features and dense is not None))
            with job.stage("finetune", f"Recovering ({config.objective})", 100) as advance:
                ended = loop.run(criterion, _in_percent(advance))
        settings = loop.settings() | {"features": features}
    warn_without_gain(loop.progress, job, rounded.before, familiar=split.familiar)
    warn_of_bad(split.data.bad, material.samples.source, job)
    return Recovery.of(config, material, split, loop.progress, rounded, ended, settings, blocks)


def _rounded(
    ready: Prepared,
    loop: Loop,
    dense: PreTrainedModel,
    split: Split,
    config: FinetuneConfig,
    rounder: Rounder,
    job: Job,
    seed: int,
) -> Rounding:
    """Make the integers of the blocks anew, or take over those of a killed job; training has the time that is left."""
    kept = None if loop.checkpoints is None else loop.checkpoints.load_rounded()
    if kept is not None:
        take_over(ready.model, kept[0])
        found = Rounding(**kept[1])
    else:
        found = round_anew(ready, dense, split, config, rounder, loop.held_out_losses, job, seed=seed)
        if loop.checkpoints is not None:
            loop.checkpoints.save_rounded(weights_of(ready.model), asdict(found))
    if loop.progress.seconds is not None:
        loop.progress.seconds = max(1.0, loop.progress.seconds - found.seconds)
    return found


def _loop(ready: Prepared, aim: Aim, config: FinetuneConfig, identity: Identity, job: Job) -> Loop:
    steps = steps_an_epoch(len(ready.loader), config.accumulation)
    return Loop(
        ready.accelerator,
        ready.wrapped,
        ready.optimizer,
        ready.loader,
        aim.held_out_losses,
        ready.parameters,
        config.learning_rate or RATES[config.objective],
        config.patience,
        evaluate_every=min(steps, MOST_STEPS_UNJUDGED),
        progress=Progress(
            steps,
            config.epochs or (EPOCHS if config.minutes is None else MOST_EPOCHS),
            None if config.minutes is None else 60 * config.minutes,
        ),
        checkpoints=Checkpoints(Path(config.checkpoints), identity()) if config.checkpoints else None,
        warn=job.warn,
    )


def _begin(loop: Loop, config: FinetuneConfig, job: Job) -> bool:
    """Take up the state that a killed training has left, or judge the model as it is; returns whether there was one."""
    if loop.resume():
        job.warn(f"{config.checkpoints}: training continues from step {loop.progress.step}.")
        return True
    if not math.isfinite(loop.begin()):
        raise NumericsError(
            "the outputs of the compressed model on the held-out samples are not finite, so it cannot be "
            "trained. Compress it less."
        )
    return False


def _in_percent(advance: Callable[[int], None]) -> Callable[[float], None]:
    shown = 0

    def on_progress(fraction: float) -> None:
        nonlocal shown
        percent = round(100 * fraction)
        if percent > shown:
            advance(percent - shown)
            shown = percent

    return on_progress
