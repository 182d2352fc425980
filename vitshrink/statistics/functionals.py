"""Random functionals of what a model gives for a batch, of which gradients and losses are taken."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from vitshrink.models.fidelity import measured
from vitshrink.models.readings import reading_of
from vitshrink.models.tasks import head_of, task_of
from vitshrink.statistics.calibration import CalibrationBatch, samples_of

Functional = Callable[[ModelOutput], Tensor]
"""From the outputs of a batch to one number a sample, (batch,); linear in the logits or features."""


def random_functional(
    model: PreTrainedModel, outputs: ModelOutput, batch: CalibrationBatch, generator: torch.Generator
) -> Functional:
    """A random functional with E[g gᵀ] = Jᵀ F J for its gradient g, F the second derivative of the head's divergence.

    It is ``Head.probe`` of the rows of ``outputs``, as ``readings`` has them, or of the logits at up to 16 tokens a
    text of a masked LM. The tokens of a masked LM are not hidden here: more of them say something at once, and the
    models come out closer at the hidden ones too.
    """
    read, owners = _rows_of(model, outputs, batch, generator)
    probe = head_of(model).probe(read(outputs), generator)
    return lambda outputs: _by_sample((read(outputs) * probe).sum(-1), owners, batch)


def divergences(
    model: PreTrainedModel,
    dense: ModelOutput,
    outputs: ModelOutput,
    batch: CalibrationBatch,
    generator: torch.Generator,
) -> Tensor:
    """How far ``outputs`` are from those of the dense model, and what the best constant answer would lose: (batch, 2).

    Float64. Where both are near to each other, the first is the mean square of what a ``random_functional`` says of
    their difference, up to the factor of ``Head.probe``.
    """
    read, owners = _rows_of(model, dense, batch, generator)
    head, rows = head_of(model), read(dense)
    lost = torch.stack([measured(head, rows, read(outputs)), measured(head, rows, head.constant(rows))], -1)
    return _by_sample(lost, owners, batch)


def _rows_of(
    model: PreTrainedModel, outputs: ModelOutput, batch: CalibrationBatch, generator: torch.Generator
) -> tuple[Callable[[ModelOutput], Tensor], Tensor | None]:
    """How the rows that count are read from outputs, and the sample of each; None where each sample has one."""
    if task_of(model) == "masked-lm":
        logits: Tensor = outputs["logits"]
        texts, positions = _tokens(_masks(logits, batch), generator)
        return lambda outputs: outputs["logits"][texts, positions].float(), texts.to(logits.device)
    reading = reading_of(model)
    return lambda outputs: reading.rows(outputs, batch), reading.owners(outputs, batch)


def _by_sample(of_rows: Tensor, owners: Tensor | None, batch: CalibrationBatch) -> Tensor:
    """Sums over the rows of each sample, (batch, …)."""
    if owners is None:
        return of_rows
    return of_rows.new_zeros(samples_of(batch), *of_rows.shape[1:]).index_add(0, owners, of_rows)


def _masks(logits: Tensor, batch: CalibrationBatch) -> Tensor:
    return torch.ones(logits.shape[:2], dtype=torch.bool) if batch.mask is None else batch.mask.cpu()


def _tokens(masks: Tensor, generator: torch.Generator, most: int = 16) -> tuple[Tensor, Tensor]:
    """Up to ``most`` random real tokens of every row: their rows and positions."""
    found = []
    for mask in masks:
        real = mask.nonzero().flatten()
        found.append(real[torch.randperm(len(real), generator=generator)[:most]])
    rows = torch.arange(len(found)).repeat_interleave(torch.tensor([len(each) for each in found]))
    return rows, torch.cat(found)


def batch_generator(seed: int, number: int) -> torch.Generator:
    """Random numbers of one batch, which are the same wherever, and after whatever others, it is run."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**32)


def require_gradient(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients start at the first block, and where layers read something else: nothing before it is a target."""
    if inputs[0].requires_grad:
        return inputs
    return (inputs[0].detach().requires_grad_(), *inputs[1:])
