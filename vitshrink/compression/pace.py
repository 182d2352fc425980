"""A budget of time, spent on tokens and ranks under one loss: what they take was timed, what they lose was measured.

A price λ of time is paid by all at once: for every block and number of tokens the best rank of each layer is known, and
a dynamic program finds how many tokens each block keeps. For these tokens the one allocation shares out the ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.compression.candidates import Offer
from vitshrink.compression.clock import CPU, Clock
from vitshrink.compression.merging import DEAREST, Choices, choices_of, least
from vitshrink.compression.static_layers import as_fast_as_integers
from vitshrink.compression.times import (
    Axis,
    BlockTimes,
    LayerTimes,
    block_times,
    layer_times,
    narrower_times,
    whole_time,
)
from vitshrink.config.options import CompressConfig
from vitshrink.config.quantities import parse_latency
from vitshrink.errors import TargetError, UsageError
from vitshrink.methods.ranks import Storage
from vitshrink.models.example import example_inputs
from vitshrink.models.families import Role
from vitshrink.models.merged import Kept, reads_special_only, require_mergeable, special_tokens, tokens_of
from vitshrink.models.runtimes import RUNTIMES, Runtime, find_runtime
from vitshrink.models.targets import Target, blocks_of
from vitshrink.runtime.cache import Cache
from vitshrink.runtime.observer import Job

CLOSE = 0.05
"""By how much of the budget a finished model may miss it without a word."""

RUNTIME = "torch"
"""Where a budget of time counts, if nothing is said."""

INTEGERS, MERGED, RANKS, NARROWER = "integers", "merged tokens", "ranks", "narrower layers"
"""The levers: by what a model may get faster."""

Seen = Literal["asks", "reads", "keeps"]
"""The tokens that a layer works on: those that ask for attention, that the block reads, or that it keeps."""

SEEN: Mapping[Role, Seen] = {
    "query": "asks",
    "key": "reads",
    "value": "reads",
    "output": "asks",
    "qkv": "reads",
    "fc1": "keeps",
    "gate": "keeps",
    "up": "keeps",
    "gated": "keeps",
    "fc2": "keeps",
}


SIDES: Mapping[Role, Axis] = {"query": 0, "key": 0, "value": 0, "fc1": 0, "output": 1, "fc2": 1}
"""The side of a layer that gets smaller where an attention or an MLP does."""


@dataclass(frozen=True, eq=False)
class Prices:
    """Nanoseconds of a model whose blocks read and keep given numbers of tokens."""

    whole: int
    """With its layers dense."""
    layers: LayerTimes
    tokens: Mapping[str, int]
    """That each layer works on, by its name."""

    def of(self, target: Target, rank: int | None) -> int:
        """Of a layer at a rank, or dense."""
        return self.layers.of(target.shape, rank, self.tokens[target.name])

    def resized(self, target: Target, shape: tuple[int, int]) -> int:
        """Of a layer that is dense, and narrower."""
        return self.layers.resized(target.shape, shape, self.tokens[target.name])


@dataclass(frozen=True, eq=False)
class Site:
    """A layer on offer: what its candidates take more than it does as it is, and lose; the first is that."""

    block: int
    seen: Seen
    times: Tensor
    """(candidates, tokens + 1)"""
    losses: Tensor
    """(candidates,)"""

    def best(self, rate: float) -> tuple[Tensor, Tensor]:
        """Loss + ``rate`` · time of the best candidate, and its time, (tokens + 1,) each."""
        paid, chosen = (self.losses[:, None] + rate * self.times).min(0)
        return paid, self.times.gather(0, chosen[None])[0]


@dataclass(frozen=True, eq=False)
class Mixture(Choices):
    """Tokens to merge, and in each block the layers on offer."""

    sites: Sequence[Site]
    special: int

    def cheapest(self, rate: float) -> Kept:
        steps = [losses + rate * self.prices for losses in self.losses]
        for site in self.sites:
            steps[site.block] = steps[site.block] + self._placed(site, site.best(rate)[0])
        return least(steps)

    def price_at(self, rate: float) -> float:
        kept = self.cheapest(rate)
        steps = list(pairwise((len(self.prices) - 1, *kept)))
        return self.price(kept) + sum(
            float(self._placed(site, site.best(rate)[1])[steps[site.block]]) for site in self.sites
        )

    def _placed(self, site: Site, values: Tensor) -> Tensor:
        """Values by tokens (tokens + 1,) as a matrix of tokens read and kept; few ask where the others are given up."""
        shape = self.prices.shape
        if site.seen == "keeps":
            return values[None].expand(shape)
        placed = values[:, None].repeat(1, shape[1])
        if site.seen == "asks":
            placed[self.special + 1 :, self.special] = values[self.special]
        return placed


@dataclass(frozen=True, eq=False)
class Pace:
    """What a dense model and what may stand in its place take, and a budget.

    Attributes:
        targets: layers whose ranks are on offer.
        blocks: of a model whose tokens may be merged; None where they may not.
        whole: nanoseconds of the dense model, as the times of its parts say.
        quick: of the dense model as it will run: the same, or with its layers as integers.
        integers: whether they will be.
        forms: what layers may become beside that, see ``CompressConfig.stores``.
        asked: the share of the dense model's time, or nanoseconds.
        shared: which of the two.
    """

    clock: Clock
    dense: PreTrainedModel
    targets: Sequence[Target]
    layers: LayerTimes
    blocks: BlockTimes | None
    whole: int
    quick: int
    integers: bool
    forms: str
    asked: float
    shared: bool

    @classmethod
    def of(
        cls, config: CompressConfig, dense: PreTrainedModel, targets: Sequence[Target], storage: Storage, job: Job
    ) -> Self:
        """Time what there is to choose. Raises UsageError and DependencyError."""
        assert config.target_latency is not None
        merges = config.merges and mergeable(dense, required=config.tokens == "merge")
        targets = () if config.tokens == "merge" else targets
        cache = None if config.cache is None else Cache.at(config.cache, CPU, job.warn)
        runtime = find_runtime(config.runtime or RUNTIME)
        device = next(dense.parameters()).device if runtime.factors else CPU
        clock = Clock(runtime, config.latency_batch_size or 1, config.threads, cache, device)
        asked, shared = parse_latency(config.target_latency, "--target-latency")
        with job.stage("clock", f"Timing the candidates {clock.described}"):
            runs, whole, quick, integers = dense, 0, 0, False
            if rounds_in(config, runtime):
                rounded = as_fast_as_integers(dense)
                whole, quick = whole_time(clock, dense), whole_time(clock, rounded)
                integers = quick < whole or bool(config.integers)
                runs = rounded if integers else dense
            blocks = block_times(clock, runs) if merges else None
            shapes = (target.shape for target in targets)
            layers = layer_times(clock, shapes, storage, length_of(dense), integers=integers)
            if "narrow" in config.stores:
                sides = [(each.shape, SIDES[each.role]) for each in targets if each.role in SIDES]
                narrower = narrower_times(clock, sides, length_of(dense), integers=integers)
                layers = replace(layers, narrower=narrower)
            if not integers:
                whole = quick = whole_time(clock, dense) if blocks is None else blocks.whole
            elif blocks is not None:
                quick = blocks.whole
        return cls(clock, dense, targets, layers, blocks, whole, quick, integers, config.stores, asked, shared)

    @property
    def budget(self) -> int:
        """Nanoseconds that are asked for."""
        return int(self.asked * self.whole if self.shared else self.asked)

    @property
    def tokens(self) -> Kept:
        """What the blocks keep where none merges."""
        return (length_of(self.dense),) * len(blocks_of(self.dense))

    def prices(self, kept: Kept | None) -> Prices:
        """Where the blocks keep so many tokens; all, if nothing is said."""
        kept = kept or self.tokens
        steps = list(pairwise((self.tokens[0], *kept)))
        special = special_tokens(self.dense) if self.blocks is not None else 0
        found = {}
        for target in self.targets:
            had, has = steps[target.block]
            asking = has if has == special else had
            found[target.name] = {"asks": asking, "reads": had, "keeps": has}[seen_by(target)]
        if self.blocks is None:
            return Prices(self.quick, self.layers, found)
        prices = self.blocks.prices
        taken = self.blocks.rest + sum(float(prices[step]) for step in steps)
        return Prices(round(taken), self.layers, found)

    def mixture(self, curves: Sequence[Tensor] | None, offers: Sequence[Offer]) -> Mixture:
        """Of what blocks lose by merging, nothing if that is not known yet, and of offers by their ranks."""
        assert self.blocks is not None
        special, tokens, prices = special_tokens(self.dense), self.tokens[0], self.blocks.prices
        nothing = [torch.zeros(tokens - special + 1, dtype=torch.float64)] * len(self.tokens)
        found = choices_of(
            curves or nothing, lambda had, has: float(prices[had, has]), special, ends=reads_special_only(self.dense)
        )
        targets = {target.name: target for target in self.targets}
        sites = [self._site(targets[offer.name], offer) for offer in offers if offer.name in targets]
        return Mixture(found.losses, found.prices, sites, special)

    def schedule(self, mixture: Mixture, budget: float) -> Kept | None:
        """How many tokens the blocks keep, for so many nanoseconds or as few as there can be; None for all."""
        assert self.blocks is not None
        found = mixture.within(budget - self.blocks.rest) or mixture.cheapest(DEAREST)
        return None if found == self.tokens else found

    def require_reachable(self, least_time: float) -> None:
        """Raises TargetError where even the fastest model takes longer, or the dense one no longer."""
        if self.budget >= self.whole:
            raise TargetError(
                f"--target-latency {self.said}: the dense model already takes only {_ms(self.whole)} "
                f"{self.clock.described}. Ask for a shorter time."
            )
        if least_time > self.budget:
            share = least_time / self.whole
            raise TargetError(
                f"--target-latency {self.said} cannot be reached {self.clock.described}: the dense model takes "
                f"{_ms(self.whole)}, and the fastest model with {self._offered} takes about {_ms(least_time)}, "
                f"{share:.2f} of it. Use {min(share * 1.05 + 0.005, 0.99):.2f} or more, a smaller --resolution "
                "or another --runtime."
            )

    def fastest(self, offers: Sequence[Offer]) -> float:
        """Nanoseconds of the fastest mixture of tokens and of what is on offer, whatever it loses."""
        assert self.blocks is not None
        return self.blocks.rest + self.mixture(None, offers).price_at(DEAREST)

    def suffices(self, budget: float) -> bool:
        """Whether integers alone are fast enough."""
        return self.integers and self.quick <= budget

    def measured(self, model: PreTrainedModel, *, spare: bool = False) -> "Paced":
        """The time of a finished model, and the dense one's, in turn."""
        inputs = example_inputs(self.dense, self.clock.batch_size)
        ready = {"dense": self._ready, "compressed": self.clock.ready(model)}
        found = self.clock.compared(ready, inputs)
        budget = self.asked * found["dense"] if self.shared else self.asked
        return Paced(budget / 1e9, found["dense"] / 1e9, found["compressed"] / 1e9, self.clock, ready, spare=spare)

    @cached_property
    def _ready(self) -> nn.Module:
        return self.clock.ready(self.dense)

    def _site(self, target: Target, offer: Offer) -> Site:
        losing = [0.0, *(candidate.loss for candidate in offer.graded)]
        ranks = [candidate.grade for candidate in offer.graded]
        times = self.layers.matrix(target.shape, ranks, self.tokens[0])
        return Site(target.block, seen_by(target), times - times[:1], torch.tensor(losing, dtype=torch.float64))

    @property
    def _offered(self) -> str:
        on_offer = {
            INTEGERS: self.integers,
            RANKS: bool(self.layers.tables) and "rank" in self.forms,
            NARROWER: bool(self.layers.narrower),
            MERGED: self.blocks is not None,
        }
        *others, last = (name for name, there in on_offer.items() if there)
        return " and ".join([", ".join(others), last] if others else [last])

    @property
    def said(self) -> str:
        """The budget as it was given."""
        return f"{self.asked:g}" if self.shared else _ms(self.asked)


@dataclass(frozen=True, eq=False)
class Paced:
    """The shortest passes of a finished model and of the dense one, in seconds, and what was asked for."""

    asked: float
    dense: float
    taken: float
    clock: Clock
    ready: Mapping[str, nn.Module]
    """Both, in the runtime."""
    levers: tuple[str, ...] = ()
    """By what the model got faster."""
    spare: bool = False
    """Whether it may well be faster than was asked for: what is slower loses no less."""

    @property
    def over(self) -> float:
        """The time that it takes, as a multiple of what was asked for."""
        return self.taken / self.asked

    @property
    def close(self) -> bool:
        """Whether it is what was asked for."""
        return abs(self.over - 1) <= CLOSE or (self.spare and self.over < 1)


def length_of(dense: PreTrainedModel) -> int:
    """Tokens of a sample that is timed."""
    inputs = example_inputs(dense)
    return inputs["input_ids"].shape[1] if "input_ids" in inputs else tokens_of(dense)


def seen_by(target: Target) -> Seen:
    """The tokens that a layer works on; those that its block reads, where nobody knows what it is for."""
    return SEEN.get(target.role, "reads")


def rounds_in(config: CompressConfig, runtime: Runtime) -> bool:
    """Whether a job makes integers for a runtime. Raises UsageError where it asks for those that do not pay there."""
    if config.integers and not runtime.integers:
        able = " or ".join(name for name, each in RUNTIMES.items() if each.integers)
        raise UsageError(
            f"--quantize int8: {runtime.name} is not faster with static int8: pass --runtime {able}, or remove "
            "--quantize and quantize the result with `vitshrink quantize`."
        )
    return runtime.integers and config.integers is not False


def mergeable(dense: PreTrainedModel, *, required: bool) -> bool:
    """Whether tokens of a model can be merged. Raises UsageError where they cannot and it is ``required``."""
    try:
        require_mergeable(dense)
    except UsageError:
        if required:
            raise
        return False
    return True


def _ms(nanoseconds: float) -> str:
    return f"{nanoseconds / 1e6:.3g}ms"
