"""``recover``: train a compressed model until it is as near to the dense one, or to the labels, as the data allow."""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, set_seed
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel

from vitshrink._version import __version__
from vitshrink.config.options import FinetuneConfig
from vitshrink.data import Preprocessor
from vitshrink.data.opening import warn_of_bad
from vitshrink.errors import DataError, NumericsError, UsageError
from vitshrink.models.checkpoint import compressed_layers
from vitshrink.models.families import head_of, task_of
from vitshrink.models.fidelity import Head
from vitshrink.models.loading import FLASH, flash_attention
from vitshrink.models.structures.tokens import MixedTokens
from vitshrink.models.targets import blocks_of
from vitshrink.recovery.answers import Reader, Teacher
from vitshrink.recovery.augmentation import TOKENS_HIDDEN, Augmentation
from vitshrink.recovery.blockwise import reconstruct
from vitshrink.recovery.checkpoints import Checkpoints
from vitshrink.recovery.criteria import Criterion
from vitshrink.recovery.decatt import observed_heads
from vitshrink.recovery.factors import pack, unpack
from vitshrink.recovery.hidden import observed_blocks
from vitshrink.recovery.material import Material
from vitshrink.recovery.objectives import Distillation, Supervision
from vitshrink.recovery.optimizer import optimizer_of
from vitshrink.recovery.progress import Progress
from vitshrink.recovery.reversible import bidirectional
from vitshrink.recovery.samples import TrainingSet
from vitshrink.recovery.training import Loop, steps_an_epoch
from vitshrink.runtime.modes import borrowed, evaluating, own_random_numbers
from vitshrink.runtime.observer import Job
from vitshrink.runtime.precision import resolve_precision
from vitshrink.statistics.digests import model_digest

RATES = {"distill": 5e-5, "supervised": 1e-4}
"""Peak learning rates."""
EPOCHS = 10.0
MOST_EPOCHS = 1000.0
"""Where time is the limit."""
FEATURES = 5.0
"""Weight of what the blocks hand on, where it is far from what the dense model's do, or labels must be heard."""
MOST_FEATURES = 200.0
"""The same where a distillation begins near: a few hundred samples teach by it, and overfit without."""
MIXING = 0.5
"""Part of the images that are blended with another one."""
BLOCKWISE_RATE = 1e-4
TOKENS_AUGMENTED = 0.05
"""Part of the tokens of a text that augmentation hides."""
LEAST_HELD_OUT = 8
MOST_HELD_OUT = 512
MOST_STEPS_UNJUDGED = 200


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
    """Relative errors ``before`` and ``after`` of every block, where blocks were reconstructed first."""
    familiar: bool
    """Whether the held-out samples had been calibrated on or trained on before: other views of them judged then."""
    fitted_to: frozenset[str]
    """Marks of all samples that the model was fitted to by now."""

    def to_dict(self) -> dict[str, Any]:
        entries = asdict(self)
        del entries["fitted_to"]
        return entries


def recover(
    model: PreTrainedModel,
    dense: PreTrainedModel | None,
    material: Material,
    preprocessor: Preprocessor,
    config: FinetuneConfig,
    job: Job,
    *,
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

    Raises:
        UsageError: an objective that this model or these data do not allow, or the checkpoints of another job.
        DataError: too few samples, or too many unusable ones.
        NumericsError: the model's answers are not finite before training.
    """
    check(model, config, dense=dense is not None, labelled=material.label_of is not None)
    samples = material.samples
    start = model_digest(model) if config.checkpoints else ""
    data = _read(material, preprocessor, config, job, max_bad_samples)
    training, held_out, familiar = _split(data, material.seen, config, seed)
    pivots = unpack(model)
    with _accelerator(next(model.parameters()).device, config) as accelerator, ExitStack() as inside:
        inside.enter_context(own_random_numbers())
        set_seed(seed)
        inside.enter_context(borrowed(model))
        inside.enter_context(evaluating(*([] if dense is None else [dense])))
        parameters = _trainable(model, config)
        loader = DataLoader(Subset(data, training), config.batch_size, shuffle=True, collate_fn=data.collate)
        optimizer: torch.optim.Optimizer = optimizer_of(model, parameters.values())
        wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        inside.callback(_unwrap, accelerator, model, wrapped)
        criterion = Criterion(
            accelerator,
            Reader(model, wrapped),
            Teacher(Reader(dense), autocast=accelerator.autocast) if dense is not None and _asks(config) else None,
            _objective(config, head_of(model)),
            _augmentation(config, preprocessor, model, seed),
            data,
            held_out,
            config.batch_size,
            config.augment,
            familiar and config.augment,
            config.views,
            config.decatt,
            features=_features(model, config),
            training_mode=lambda: train_mode(model, dropout=config.objective == "supervised"),
        )
        steps = steps_an_epoch(len(loader), config.accumulation)
        relative = criterion.objective.head.measure == "relative_error" and criterion.teacher is not None
        weighed = criterion.features > 0 and config.features is None and config.objective == "distill"
        spread = criterion.spread() if relative or weighed else 0.0  # a pass of the dense model
        if relative and spread:
            criterion.objective, spread = replace(criterion.objective, scale=spread), 1.0
        loop = Loop(
            accelerator,
            wrapped,
            optimizer,
            loader,
            criterion,
            parameters,
            config.learning_rate or RATES[config.objective],
            config.patience,
            evaluate_every=min(steps, MOST_STEPS_UNJUDGED),
            progress=Progress(
                steps,
                config.epochs or (EPOCHS if config.minutes is None else MOST_EPOCHS),
                None if config.minutes is None else 60 * config.minutes,
            ),
            warn=job.warn,
        )
        resumed = False
        if config.checkpoints:
            identity = _identity(start, dense, material, preprocessor, config, seed, accelerator)
            loop.checkpoints = Checkpoints(Path(config.checkpoints), identity)
            resumed = loop.resume()
            if resumed:
                job.warn(f"{config.checkpoints}: training goes on from step {loop.progress.step}.")
        if not resumed and not math.isfinite(loop.begin()):
            raise NumericsError(
                "the answers of the compressed model to the held-out samples are not finite: it cannot be trained. "
                "Compress it again, less strongly."
            )
        if weighed:
            criterion.features = _features_from(loop.progress.start, spread)
        blocks: list[dict[str, float]] = []
        if config.blockwise and dense is not None and not resumed:
            stage = job.stage("blockwise", "Reconstructing blocks", len(blocks_of(model)))
            with stage as advance, evaluating(model):
                sets = (data.batches(training, config.batch_size), data.batches(held_out, config.batch_size))
                blocks = reconstruct(
                    model,
                    dense,
                    *([batch.to(accelerator.device) for batch in batches] for batches in sets),
                    epochs=config.blockwise,
                    learning_rate=BLOCKWISE_RATE,
                    parameters=parameters,
                    autocast=accelerator.autocast,
                    on_block=advance,
                )
            loop.judge()
        if config.gradient_checkpointing:
            inside.callback(recompute(model))
        if attention == FLASH:
            inside.enter_context(flash_attention(model, *([] if dense is None else [dense])))
        if config.bdia or config.reversible:
            kind = bidirectional(model, reversible=config.reversible, gamma=config.gamma, momentum=config.momentum)
            inside.enter_context(kind)
        if criterion.features and dense is not None:
            criterion.blocks = inside.enter_context(observed_blocks(model, dense))
        if config.decatt:
            criterion.heads = inside.enter_context(observed_heads(model))
        with job.stage("finetune", f"Recovering ({config.objective})", 100) as advance:
            loop.on_progress = _in_percent(advance)
            ended = loop.run()
        progress = loop.progress
        settings = {
            "learning_rate": loop.learning_rate,
            "features": criterion.features,
            "precision": accelerator.mixed_precision,
            "processes": accelerator.num_processes,
        }
    before = progress.start
    if not progress.best < before:
        job.warn(
            f"recovery gained nothing: no state had a held-out loss below {before:.4g}, that of the compressed model, "
            "which is kept as it was. "
            + (
                "The compression was fitted to them, which flatters it: add samples that it has not seen. "
                if familiar
                else ""
            )
            + "More samples, more time or a lower learning rate may help."
        )
    warn_of_bad(data.bad, samples.source, job)
    if pivots:
        pack(model, pivots)
    return Recovery(
        objective=config.objective,
        before=before,
        after=progress.best,
        best_step=progress.best_step,
        ended=ended,
        samples=len(training),
        held_out=len(held_out),
        seconds=progress.elapsed,
        settings=asdict(config) | settings,
        history=progress.history,
        blocks=blocks,
        familiar=familiar,
        fitted_to=material.seen | {samples.marks[i] for i in training},
    )


def check(model: PreTrainedModel, config: FinetuneConfig, *, dense: bool, labelled: bool) -> None:
    """Raises UsageError for an objective that a model does not allow, or that lacks what it needs; before any work."""
    if _has_mixed_tokens(model):
        for name in ("blockwise", "features"):
            if getattr(config, name):
                raise UsageError(
                    f"--{name} compares blocks token by token, and this model has mixed tokens: leave it out."
                )
        if task_of(model) == "features":
            raise UsageError(
                "a headless model with mixed tokens cannot be trained: its tokens are not the dense one's."
            )
    if config.objective == "distill":
        if not dense:
            raise UsageError("distillation learns from the dense model: pass it as --teacher.")
        return
    task = task_of(model)
    if task in ("features", "masked-lm"):
        raise UsageError(f"supervised fine-tuning needs a model that predicts labels, and this is one for {task}.")
    if not labelled:
        raise UsageError("supervised fine-tuning needs labels, and the samples have none: pass labelled data.")
    if (config.distillation or config.features) and not dense:
        raise UsageError("distillation learns from the dense model: pass it as --teacher.")
    if config.features and not config.distillation:
        raise UsageError("--features compares with the dense model, which is not asked here: pass --distillation too.")


def _has_mixed_tokens(model: PreTrainedModel) -> bool:
    return any(isinstance(layer.spec, MixedTokens) for layer in compressed_layers(model).values())


def _features(model: PreTrainedModel, config: FinetuneConfig) -> float:
    """The weight of what the blocks hand on; 0 where the dense model is not asked, or gives something else."""
    if config.features is not None:
        return config.features
    comparable = _asks(config) and not (config.bdia or config.reversible or _has_mixed_tokens(model))
    return FEATURES if comparable else 0.0


def _features_from(start: float, nothing: float) -> float:
    """The usual weight in distillation: less, the more is lost at the ``start`` of what saying ``nothing`` loses.

    A model that has lost nearly all of them has to learn them anew, and what its blocks hand on is of no use before.
    """
    kept = max(0.0, 1 - start / max(nothing, 1e-12))
    return max(FEATURES, MOST_FEATURES * kept**2)


def _asks(config: FinetuneConfig) -> bool:
    """Whether the dense model is asked at all."""
    return config.objective == "distill" or bool(config.distillation)


def _objective(config: FinetuneConfig, head: Head) -> Distillation | Supervision:
    if config.objective == "distill":
        return Distillation(head, config.temperature)
    return Supervision(head, config.label_smoothing, config.distillation or 0.0, config.temperature)


def _augmentation(
    config: FinetuneConfig, preprocessor: Preprocessor, model: PreTrainedModel, seed: int
) -> Augmentation:
    if preprocessor.kind == "image":
        usual = MIXING if config.objective == "distill" and config.views is None else 0.0
        return Augmentation(seed, mixing=usual if config.mixing is None else config.mixing)
    guessing = task_of(model) == "masked-lm"
    tokenizer = preprocessor.processor
    return Augmentation(
        seed,
        tokens=TOKENS_HIDDEN if guessing else TOKENS_AUGMENTED,
        mask_token=tokenizer.mask_token_id,
        special_tokens=tuple(tokenizer.all_special_ids),
        guessing=guessing,
    )


def _read(
    material: Material, preprocessor: Preprocessor, config: FinetuneConfig, job: Job, max_bad_samples: int | None
) -> TrainingSet:
    labels = None
    if config.objective == "supervised" and material.label_of is not None:
        labels = [material.label_of(sample.label) for sample in material.samples.samples]
    data = TrainingSet(material.samples, preprocessor, labels=labels, max_bad_samples=max_bad_samples)
    data.take(material.read)
    if data.missing():
        with job.stage("training data", "Reading training data", len(data.missing())) as advance:
            data.fill(config.batch_size, advance)
    return data


def held_out_count(usable: int, validation: float, source: str) -> int:
    """How many of so many samples judge what training gains. Raises DataError where they are too few."""
    if usable < 2 * LEAST_HELD_OUT:
        raise DataError(
            f"{source} has {usable} usable samples: recovery needs at least {2 * LEAST_HELD_OUT}, of which "
            f"{LEAST_HELD_OUT} are held out to judge it. A few hundred unlabelled ones do."
        )
    return min(MOST_HELD_OUT, max(LEAST_HELD_OUT, round(validation * usable)))


def _split(
    data: TrainingSet, seen: frozenset[str], config: FinetuneConfig, seed: int
) -> tuple[list[int], list[int], bool]:
    """Samples to train on, those that choose the best state, and whether the model was fitted to the latter before.

    What it was fitted to flatters it, and hides what training gains: others are preferred, though they be half as many.
    """
    usable = data.usable()
    count = held_out_count(len(usable), config.validation, data.samples.source)
    unseen = set(data.unseen(seen))
    familiar = len(unseen) < max(LEAST_HELD_OUT, count // 2)
    shuffled = list(usable)
    random.Random(seed).shuffle(shuffled)
    judging = [i for i in shuffled if familiar or i in unseen][:count]
    training = set(usable).difference(judging)
    return [i for i in shuffled if i in training], judging, familiar


def _trainable(model: PreTrainedModel, config: FinetuneConfig) -> dict[str, nn.Parameter]:
    factors = set()
    for layer in compressed_layers(model).values():
        factors |= {id(parameter) for parameter in layer.parameters() if parameter.ndim > 1}
    for parameter in model.parameters():
        parameter.requires_grad_(config.train == "all" or id(parameter) in factors)
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise UsageError("the model has no low-rank factor to train: it is not compressed. Use train=all.")
    return found


def _unwrap(accelerator: Accelerator, model: PreTrainedModel, wrapped: nn.Module) -> None:
    """Take from ``model`` what accelerate put around it: it will be copied, saved and packed."""
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    for name in ("forward", "_original_forward"):
        model.__dict__.pop(name, None)


def train_mode(model: PreTrainedModel, *, dropout: bool) -> None:
    """Training mode, but where the dense model is the target without the noise of dropout."""
    model.train(dropout)
    model.training = True
    for block in blocks_of(model):
        block.training = True  # where transformers looks whether to recompute activations


def recompute(model: PreTrainedModel) -> Callable[[], None]:
    """Have the blocks recompute their activations in the backward pass; returns what ends it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
        return model.activation_checkpointing_disable  # type: ignore[no-any-return]
    model.gradient_checkpointing_enable({"use_reentrant": False})  # transformers before 5.2x
    return model.gradient_checkpointing_disable  # type: ignore[no-any-return]


@contextmanager
def _accelerator(device: torch.device, config: FinetuneConfig) -> Iterator[Accelerator]:
    """accelerate keeps its choices for a whole process: those of the caller, or of another job, wait meanwhile."""
    states = [(each, dict(each._shared_state)) for each in (AcceleratorState, GradientState, PartialState)]
    try:
        for each, _ in states:
            each._reset_state()
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            accelerator = Accelerator(
                cpu=device.type == "cpu",
                mixed_precision=resolve_precision(device, config.precision),
                gradient_accumulation_steps=config.accumulation,
                dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
                kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
            )
            try:
                yield accelerator
            finally:
                accelerator.free_memory()
    finally:
        for each, before in states:
            each._reset_state()
            each._shared_state.update(before)


def _identity(
    start: str,
    dense: PreTrainedModel | None,
    material: Material,
    preprocessor: Preprocessor,
    config: FinetuneConfig,
    seed: int,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """All that the result of a training follows from."""
    return {
        "vitshrink": __version__,
        "torch": torch.__version__,
        "model": start,
        "teacher": None if dense is None else model_digest(dense),
        "data": material.identity(),
        "preprocessing": preprocessor.identity(),
        "seed": seed,
        "settings": asdict(replace(config, checkpoints=None)),
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
    }


def _in_percent(advance: Callable[[int], None]) -> Callable[[float], None]:
    shown = 0

    def on_progress(fraction: float) -> None:
        nonlocal shown
        percent = round(100 * fraction)
        if percent > shown:
            advance(percent - shown)
            shown = percent

    return on_progress
