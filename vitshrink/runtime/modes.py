"""What a job borrows of its caller, models and random numbers, is given back as it was."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def borrowed(*models: nn.Module) -> Iterator[None]:
    """Afterwards every module of the models has its own mode again, and every parameter its wish for a gradient.

    ``model.train(model.training)`` would reach inside: a wrapper is in training mode as long as nobody asks, whatever
    it holds is not, and a model may be trained with some of its modules in evaluation mode.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    wishes = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, wish in wishes:
            if parameter.requires_grad != wish:
                parameter.requires_grad_(wish)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Inside, the models run without the noise of training, dropout for one."""
    with borrowed(*models):
        for model in models:
            model.eval()
        yield


@contextmanager
def frozen(*models: nn.Module) -> Iterator[None]:
    """As ``evaluating``, and no parameter asks for a gradient: a backward pass then costs what a forward pass does."""
    with evaluating(*models):
        for model in models:
            model.requires_grad_(False)
        yield


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Inside, torch and what goes by it take so many threads on the CPU; as many as before, if none are given."""
    before = torch.get_num_threads()
    try:
        if number is not None:
            torch.set_num_threads(number)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Inside, random numbers are drawn, and seeds set, without a trace in those of the caller."""
    python, numpy = random.getstate(), np.random.get_state()
    # a process that has not asked for a GPU so far should not be made to
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
