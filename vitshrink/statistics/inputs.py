"""What reaches matrices whose inputs are to be rounded: some tokens, beside what the output says of errors there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.runtime.modes import frozen
from vitshrink.statistics.calibration import CalibrationBatch, one_by_one
from vitshrink.statistics.functionals import batch_generator
from vitshrink.statistics.sensitivity import Sensitivity, SensitivityCollector, counted, patches

TOKENS = 1024
"""Kept of what reaches a matrix, over all batches."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Of one matrix (m, n).

    Attributes:
        tokens: (t, n) that reach it, drawn as often as errors in them count.
        bounds: (2, n), the least and the largest value of each channel in all tokens: some are huge in very few.
        count: of all tokens.
    """

    tokens: Tensor
    bounds: Tensor
    count: int
    sensitivity: Sensitivity

    def cpu(self) -> Self:
        seen = self.sensitivity
        tensors: dict[str, Any] = {name: each.cpu() for name, each in vars(seen).items() if isinstance(each, Tensor)}
        return replace(self, tokens=self.tokens.cpu(), bounds=self.bounds.cpu(), sensitivity=replace(seen, **tensors))


@dataclass(eq=False)
class InputCollector(SensitivityCollector):
    """Draws tokens by their squared gradients, within the limits that also bound how much one counts."""

    drawn: int = TOKENS
    """Tokens a batch."""
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)
    bounds: dict[str, list[Tensor]] = field(default_factory=dict)
    """The least and the largest values of each batch."""
    counts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, names: Sequence[str], batches: int, seed: int) -> Self:
        return cls(model, names, seed, drawn=max(1, TOKENS // batches))

    def _add(self, name: str, module: nn.Module, x: Tensor, gradient: Tensor) -> None:
        super()._add(name, module, x, gradient)
        if isinstance(module, nn.Conv2d):
            x, gradient = patches(x.float(), module), gradient.flatten(2).mT
        x, gradient = self._real(x, gradient), self._real(gradient, gradient)
        weights = counted(gradient.detach().float().square().sum(1))
        generator = batch_generator(self.seed, self._batch)
        found = torch.multinomial(weights.cpu(), min(self.drawn, len(weights)), generator=generator)
        self.tokens.setdefault(name, []).append(x[found.to(x.device)].float())
        self.bounds.setdefault(name, []).append(torch.stack(x.float().aminmax(dim=0)))
        self.counts[name] = self.counts.get(name, 0) + len(x)

    def inputs(self) -> dict[str, Inputs]:
        return {name: self._inputs(name, found) for name, found in self.found().items()}

    def _inputs(self, name: str, found: Sensitivity) -> Inputs:
        bounds = torch.stack(self.bounds[name])
        extremes = torch.stack([bounds[:, 0].amin(0), bounds[:, 1].amax(0)])
        return Inputs(torch.cat(self.tokens[name]), extremes, self.counts[name], found)


def collect_inputs(
    model: PreTrainedModel,
    names: Sequence[str],
    batches: Sequence[CalibrationBatch],
    *,
    seed: int = 0,
    on_batch: Callable[[int], None] = lambda _samples: None,
) -> dict[str, Inputs]:
    """Of linear layers and convolutions, by name, in one walk without labels.

    What the output does not depend on is left out. Raises as ``collect_sensitivity``.
    """
    collector = InputCollector.of(model, names, len(batches), seed)
    with frozen(model):
        one_by_one(collector, batches, on_batch)
    return collector.inputs()
