"""A model made ready for training, and given back as it was lent."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, set_seed
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel

from vitshrink.config.options import FinetuneConfig
from vitshrink.errors import UsageError
from vitshrink.models.checkpoint import compressed_layers
from vitshrink.models.families import precision_for
from vitshrink.recovery.optimizer import optimizer_of
from vitshrink.recovery.splitting import Split
from vitshrink.runtime.modes import borrowed, evaluating, own_random_numbers
from vitshrink.runtime.precision import resolve_precision


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model in the hands of accelerate."""

    accelerator: Accelerator
    model: PreTrainedModel
    wrapped: nn.Module
    """What accelerate made of the model."""
    optimizer: Any
    loader: Any
    parameters: Mapping[str, nn.Parameter]
    """Those that learn."""


@contextmanager
def prepared(
    model: PreTrainedModel, dense: PreTrainedModel | None, split: Split, config: FinetuneConfig, seed: int
) -> Iterator[Prepared]:
    """Inside, ``model`` can be trained. Modes, random numbers and the state of accelerate are the caller's afterwards.

    Raises:
        UsageError: the model has no parameter of the kind that is to learn.
    """
    with (
        _accelerator(model, config) as accelerator,
        own_random_numbers(),
        borrowed(model),
        evaluating(*([] if dense is None else [dense])),
    ):
        set_seed(seed)
        parameters = _trainable(model, config)
        subset = Subset(split.data, split.training)
        loader = DataLoader(subset, config.batch_size, shuffle=True, collate_fn=split.data.collate)
        optimizer = optimizer_of(model, parameters.values())
        wrapped, moved, shared = accelerator.prepare(model, optimizer, loader)
        try:
            yield Prepared(accelerator, model, wrapped, moved, shared, parameters)
        finally:
            _unwrap(accelerator, model, wrapped)


def _trainable(model: PreTrainedModel, config: FinetuneConfig) -> dict[str, nn.Parameter]:
    factors = set()
    for layer in compressed_layers(model).values():
        factors |= {id(each) for each in layer.parameters() if each.ndim > 1 or each is getattr(layer, "weight", None)}
    for parameter in model.parameters():
        parameter.requires_grad_(config.train == "all" or id(parameter) in factors)
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise UsageError("the model has no compressed matrix. Use train=all.")
    return found


def _unwrap(accelerator: Accelerator, model: PreTrainedModel, wrapped: nn.Module) -> None:
    """Take from ``model`` what accelerate put around it: it will be copied, saved and packed."""
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    for name in ("forward", "_original_forward"):
        model.__dict__.pop(name, None)


@contextmanager
def _accelerator(model: PreTrainedModel, config: FinetuneConfig) -> Iterator[Accelerator]:
    """accelerate keeps its choices for a whole process: those of the caller, or of another job, wait meanwhile."""
    device = next(model.parameters()).device
    states = [(each, dict(each._shared_state)) for each in (AcceleratorState, GradientState, PartialState)]
    try:
        for each, _ in states:
            each._reset_state()
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            accelerator = Accelerator(
                cpu=device.type == "cpu",
                mixed_precision=resolve_precision(device, precision_for(model, config.precision)),
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
