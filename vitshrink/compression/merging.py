"""How many tokens each block keeps: what merging loses is measured block by block, and a price is paid with it.

The tokens that a block keeps are chosen for all blocks at once, by a dynamic program over blocks and numbers of tokens
that minimizes loss + λ · price, with λ found by bisection. The price is any function of a block's tokens: operations,
or the time of the shapes that are on offer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.errors import UsageError
from vitshrink.models.fidelity import feature_rows, measured
from vitshrink.models.merged import (
    Kept,
    Operations,
    merge_tokens,
    reads_special_only,
    require_mergeable,
    special_tokens,
    tokens_of,
)
from vitshrink.models.targets import block_list, blocks_of
from vitshrink.models.tasks import head_of, task_of
from vitshrink.models.views import view_of
from vitshrink.runtime import processes
from vitshrink.runtime.modes import evaluating
from vitshrink.runtime.observer import Job
from vitshrink.statistics.calibration import CalibrationBatch, first_of, to_device
from vitshrink.statistics.walk import HiddenBatch, hidden_batches

SAMPLES = 64
"""That the losses are measured on, at most."""

STEPS = (0.06, 0.13, 0.22, 0.34, 0.5)
"""Shares of the patches whose merging in one block is measured: a curve goes through them."""

BEFORE, ALONE = 0.5, 0.2
"""How losses of blocks add up, see ``choices_of``: fits ten schedules of DeiT-tiny within a sixth."""

SMALLEST = 1e-8
"""Nats: losses below are rounding."""

DEAREST, BISECTIONS = 1e12, 60
"""Of the search for λ: what is out of reach, and how often an interval is halved."""

Price = Callable[[int, int], float]
"""Of a block that reads so many tokens, and keeps so many."""


@dataclass(frozen=True, eq=False)
class Choices:
    """What every block of a model may do, as matrices (tokens + 1, tokens + 1) of tokens read and tokens kept."""

    losses: Sequence[Tensor]
    """Of each block; infinite for what it cannot do."""
    prices: Tensor
    """The same for each block."""

    def cheapest(self, rate: float) -> Kept:
        """The schedule that minimizes loss + ``rate`` · price."""
        return least([losses + rate * self.prices for losses in self.losses])

    def price(self, kept: Kept) -> float:
        """Of all blocks."""
        return float(sum(self.prices[had, has] for had, has in pairwise((self.prices.shape[0] - 1, *kept))))

    def price_at(self, rate: float) -> float:
        """Of what is cheapest at this rate."""
        return self.price(self.cheapest(rate))

    def loss(self, kept: Kept) -> float:
        """Of all blocks, as predicted."""
        steps = pairwise((self.prices.shape[0] - 1, *kept))
        return float(sum(losses[had, has] for losses, (had, has) in zip(self.losses, steps, strict=True)))

    def within(self, budget: float) -> Kept | None:
        """The best schedule that bisection finds for a price of at most ``budget``; None where there is none."""
        low, high = 0.0, 1 / float(self.prices.max())
        while self.price_at(high) > budget:
            low, high = high, high * 4
            if high > DEAREST:
                return None
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.price_at(middle) <= budget else (middle, high)
        return self.cheapest(high)


def least(steps: Sequence[Tensor]) -> Kept:
    """The way through all blocks that costs least, where each is a matrix (tokens read, tokens kept) of costs."""
    tokens = len(steps[0]) - 1
    following = torch.zeros(tokens + 1, dtype=torch.float64)
    choices = []
    for costs in reversed(steps):
        following, best = (costs + following).min(1)
        choices.append(best)
    kept = []
    for best in reversed(choices):
        tokens = int(best[tokens])
        kept.append(tokens)
    return tuple(kept)


def choices_of(curves: Sequence[Tensor], price: Price, special: int, *, ends: bool) -> Choices:
    """From what each block loses by merging 0, 1, 2 … patches of all, (patches + 1,).

    A block that reads fewer tokens would lose the difference, if those most alike were merged before, and as much as
    if it read all of them, if what blocks merge were not related. What they lose together is a mixture of the two.
    ``ends``: nothing reads the patches after the last block, which may then give them up for nothing.
    """
    patches = len(curves[0]) - 1
    tokens = special + patches
    prices = torch.zeros(tokens + 1, tokens + 1, dtype=torch.float64)
    possible = torch.zeros_like(prices, dtype=torch.bool)
    for had in range(special, tokens + 1):
        for has in {special, *range(had - (had - special) // 2, had + 1)}:
            prices[had, has], possible[had, has] = price(had, has), has > special or had == special
    gone = (tokens - torch.arange(tokens + 1)).clamp(0, patches)
    losses = []
    for curve in curves:
        lost, merged = curve[gone], curve[(gone[None] - gone[:, None]).clamp_min(0)]
        matrix = BEFORE * (lost[None] - lost[:, None]) + ALONE * merged
        losses.append(matrix.masked_fill(~possible, math.inf))
    if ends:
        losses[-1][special:, special] = 0
    return Choices(losses, prices)


def fitted_curve(gone: Sequence[int], losses: Sequence[float], patches: int) -> Tensor:
    """What merging 0, 1, 2 … of ``patches`` loses, (patches + 1,), from some that were measured.

    exp(a) xᵇ exp(c x) with b ≥ 1 and c ≥ 0, by least squares of logarithms: convex, and smooth where samples are few.
    """
    x, y = torch.tensor(gone).double() / patches, torch.tensor(losses).double()
    logarithm = y.clamp_min(SMALLEST).log()
    columns = torch.stack([torch.ones_like(x), x.log(), x], 1)
    free = [0, 1, 2]
    exponents = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    for _ in range(3):
        known = [each for each in range(3) if each not in free]
        rest = logarithm - columns[:, known] @ exponents[known]
        exponents[free] = torch.linalg.lstsq(columns[:, free], rest[:, None]).solution[:, 0]
        bound = next((each for each, low in ((1, 1.0), (2, 0.0)) if each in free and exponents[each] < low), None)
        if bound is None:
            break
        exponents[bound] = 1.0 if bound == 1 else 0.0
        free.remove(bound)
    share = torch.arange(patches + 1).double() / patches
    start, power, growth = exponents
    curve: Tensor = start.exp() * share.pow(power) * (growth * share).exp()
    return curve


@dataclass(frozen=True, eq=False)
class Trials:
    """A dense model and some samples, on which schedules are tried."""

    dense: PreTrainedModel
    batches: Sequence[CalibrationBatch]

    @classmethod
    def on(cls, dense: PreTrainedModel, batches: Sequence[CalibrationBatch]) -> Self:
        """On the first of the ``batches``."""
        return cls(dense, first_of(batches, SAMPLES))

    def curves(self, on_block: Callable[[int], None] = lambda _blocks: None) -> list[Tensor]:
        """What each block loses by merging some of all patches; every block runs on what really reaches it."""
        tokens, special, blocks = tokens_of(self.dense), special_tokens(self.dense), blocks_of(self.dense)
        hidden = hidden_batches(self.dense, blocks[0], self.batches)
        reference = self._rows(self.dense, 0, hidden)
        gone = [max(1, round(step * (tokens - special))) for step in STEPS]
        found = []
        for index, block in enumerate(blocks):
            losses = []
            for number in gone:
                kept = (tokens,) * index + (tokens - number,) * (len(blocks) - index)
                losses.append(self._loss(self._rows(self._merged(kept), index, hidden), reference))
            found.append(fitted_curve(gone, losses, tokens - special))
            hidden = [replace(batch, hidden=self._through(block, batch)) for batch in hidden]
            on_block(1)
        return found

    def loss(self, model: PreTrainedModel) -> float:
        """What a model loses, a view of the dense one or another."""
        hidden = hidden_batches(self.dense, blocks_of(self.dense)[0], self.batches)
        return self._loss(self._rows(model, 0, hidden), self._rows(self.dense, 0, hidden))

    def _merged(self, kept: Kept) -> PreTrainedModel:
        model = view_of(self.dense)
        merge_tokens(model, kept)
        return model

    @torch.no_grad()
    def _through(self, block: nn.Module, batch: HiddenBatch) -> Tensor:
        with evaluating(self.dense):
            return batch.through(block)

    def _loss(self, rows: Tensor, reference: Tensor) -> float:
        return float(measured(head_of(self.dense), reference, rows).mean())

    @torch.no_grad()
    def _rows(self, model: PreTrainedModel, start: int, hidden: Sequence[HiddenBatch]) -> Tensor:
        """What ``model``, a view or the dense one, gives for hidden states that reach its block ``start``."""
        found = []
        model = view_of(model)
        blocks = block_list(model)
        del blocks[:start]
        entering: list[Tensor] = []
        blocks[0].register_forward_pre_hook(lambda _block, given: (entering.pop(), *given[1:]))
        device = next(model.parameters()).device
        with evaluating(model):
            for batch, states in zip(self.batches, hidden, strict=True):
                entering.append(states.hidden)
                output = model(**to_device(batch.inputs, device))[0]
                headless = task_of(model) == "features"
                rows: Tensor = feature_rows(output, None, first_token=True) if headless else output.float()
                found.append(rows)
        return torch.cat(found)


def measured_curves(trials: Trials, job: Job) -> list[Tensor]:
    """What each block of a dense model loses by merging 0, 1, 2 … of all patches."""
    with job.stage("tokens", "Measuring the loss of merged tokens", len(blocks_of(trials.dense))) as advance:
        return processes.by_main(lambda: trials.curves(advance))


def require_reachable(dense: PreTrainedModel, fraction: float) -> None:
    """Raises UsageError for a model whose tokens cannot be merged, or not that much; before any work."""
    require_mergeable(dense)
    patches = tokens_of(dense) - special_tokens(dense)
    kept_within(dense, [torch.zeros(patches + 1, dtype=torch.float64)] * len(blocks_of(dense)), fraction)


def kept_within(dense: PreTrainedModel, curves: Sequence[Tensor], fraction: float) -> Kept:
    """How many tokens each block keeps, for a ``fraction`` of the dense model's operations.

    Raises UsageError where merging alone does not reach it.
    """
    price, tokens = Operations.of(dense), tokens_of(dense)
    choices = choices_of(curves, price.block, special_tokens(dense), ends=reads_special_only(dense))
    whole = price.total(tokens, (tokens,) * len(blocks_of(dense)))
    found = choices.within(fraction * whole - price.rest)
    if found is None:
        least = (price.rest + choices.price(choices.cheapest(DEAREST))) / whole
        raise UsageError(
            f"--token-operations {fraction:g} cannot be reached: the smallest possible fraction is {least:.2f}. "
            "Use a larger fraction, or a smaller --resolution."
        )
    return found
