"""What the residual stream of a compressed model lacks, put back by the layers that write to it, block by block."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.compression.repairs.bias import shifted_bias
from vitshrink.compression.repairs.products import product_of
from vitshrink.methods import Factorization
from vitshrink.models.families import Family, Role, family_of
from vitshrink.models.reading import chain_problem
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.structures.narrow import NarrowLinear
from vitshrink.models.targets import Target, blocks_of, linear_of
from vitshrink.runtime import processes
from vitshrink.runtime.modes import evaluating
from vitshrink.runtime.offloading import at_home
from vitshrink.runtime.paging import in_file, rest
from vitshrink.runtime.precision import Passes, narrow_products
from vitshrink.statistics.calibration import CalibrationBatch
from vitshrink.statistics.effects import component_effects
from vitshrink.statistics.halves import half_of, symmetric
from vitshrink.statistics.importance import TokenWeights
from vitshrink.statistics.stats import LinearStats, gram_of
from vitshrink.statistics.walk import HiddenBatch, hidden_batches

SHARE = 0.5
"""Part of what the stream lacks that a layer is asked to add: the layers after it add to it, too."""

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridges to choose from, in units of the mean variance of an output."""

WRITERS: tuple[Role, ...] = ("output", "fc2")
"""The layers whose output is added to the stream, in the order in which they do it."""

Factorize = Callable[[str, Tensor, LinearStats], Factorization]
"""Nested factors of a layer, from its name, a weight (m, n) for it, and the statistics of its inputs."""


def writers(model: nn.Module, targets: Sequence[Target]) -> list[Target]:
    """The smaller layers that can be refitted. Of one with more outputs than inputs, H is known within them only."""
    return [
        target
        for target in targets
        if target.role in WRITERS
        and target.shape[0] <= target.shape[1]
        and isinstance(model.get_submodule(target.name), LowRankLinear | NarrowLinear)
        and model.get_submodule(target.name).bias is not None
    ]


def why_not_restored(model: PreTrainedModel) -> str | None:
    """What keeps ``restore_stream`` from a model; None where nothing does."""
    family = family_of(model)
    if family.norm is None or not {"output", "fc1", "fc2"} <= set(family.modules):
        return f"vitshrink does not know how blocks of {family.model_type} write to it"
    return chain_problem(model)


@torch.no_grad()
def restore_stream(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    targets: Sequence[Target],
    stats: Mapping[str, LinearStats],
    factorize: Factorize,
    batches: Sequence[CalibrationBatch],
    *,
    weights: Sequence[Mapping[str, Tensor]] | None = None,
    seed: int = 0,
    passes: Passes = nullcontext,
    pages: Path | None = None,
    on_layer: Callable[[str], None] = lambda _name: None,
) -> None:
    """Refit the smaller layers that write to the residual stream, in place; no size changes.

    Truncation leaves every layer with an error of its own, and the stream with the sum of them. A part of that sum
    follows from what later layers read. With r what the stream of the compressed model lacks where a layer adds to it,
    and z = W x what the dense layer would add for what is read there, W is replaced by W + ``SHARE`` B W, where B z is
    the ridge regression of r on z, and factorized again for these inputs, at its rank. The regression of r on x itself,
    which has several times as many numbers, is not better. Each layer meets what those before it, already refitted,
    give. The ridge is the one that explains most of either half of the samples by the other; none, where that is
    nothing.

    Args:
        dense: the model that ``model`` was made of.
        targets: of ``model``; those that are ``writers`` are refitted.
        stats: their statistics in the compressed model, of which H is used.
        weights: of the tokens (batch, tokens) of each batch of this process, by target; those in ``model`` if it is
            None.
        pages: where the hidden states of the samples lie, if they take much room; in memory if it is None.
    """
    parts = writers(model, targets)
    mine = processes.block(len(batches))
    own = batches[mine.start : mine.stop]
    family = family_of(model)
    with processes.together():
        if weights is None:
            weighed = TokenWeights([target.name for target in parts])
            component_effects(model, {}, own, seed=seed, first=mine.start, passes=passes, weights=weighed)
            weights = weighed.found
        with passes():
            there = hidden_batches(dense, blocks_of(dense)[0], own, pages)
            here = hidden_batches(model, blocks_of(model)[0], own, pages)
    with evaluating(model, dense):
        for index, (theirs, ours) in enumerate(zip(blocks_of(dense), blocks_of(model), strict=True)):
            with processes.together(), passes():
                wanted = [_wanted(passage(theirs, family, batch), pages) for batch in there]
            for target in (part for part in parts if part.block == index):
                weight, mean = _whole(model, dense, target), stats[target.name].mean
                # what a narrow layer reads is something else
                center = mean if len(mean) == weight.shape[1] else mean.new_zeros(weight.shape[1])
                halves = (Lack.nothing(weight, center), Lack.nothing(weight, center))
                with processes.together():
                    for batch, (stream, _), counted in zip(here, wanted, weights, strict=True):
                        with passes():
                            met = passage(ours, family, batch, until=target.role)
                        lacking = stream[target.role] - met.stream[target.role].float()
                        for number, half in enumerate(halves):
                            each = slice(number, None, 2)
                            half.add(met.read[each].float(), lacking[each], counted[target.name][each], passes)
                        rest()
                refit(model, dense, target, stats[target.name], factorize, [half.of_all() for half in halves])
                on_layer(target.name)
            with processes.together():
                for batch in here:
                    with passes():
                        batch.hidden = in_file(batch.through(ours).float(), pages)
                    rest()
            for batch, (_, left) in zip(there, wanted, strict=True):
                batch.hidden = left


@dataclass(frozen=True, eq=False)
class Passage:
    """A batch on its way through one block, or through the first part of it."""

    stream: Mapping[Role, Tensor]
    """(batch, tokens, width) to which each of the writers adds, as far as the batch came."""
    read: Tensor
    """(batch, tokens, n) that the last writer read to which the batch came."""
    left: Tensor | None
    """(batch, tokens, width) that leaves the block; None where the batch came no further than to a writer."""


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """Ends a passage: what comes after the layer in question does not matter."""


def passage(block: nn.Module, family: Family, batch: HiddenBatch, until: Role | None = None) -> Passage:
    """What a batch meets in a block, or on its way to one of the writers."""
    seen: dict[Role, Tensor] = {}
    written: list[Tensor] = []

    def see(role: Role) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[role] = at_home(inputs[0])
            if role == until:
                raise _Reached

        return hook

    def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        written.append(at_home(output))

    left: Tensor | None = None
    with ExitStack() as stack:
        for role in (*WRITERS, "fc1"):
            layer = block.get_submodule(family.modules[role])
            stack.callback(layer.register_forward_pre_hook(see(role)).remove)
        stack.callback(block.get_submodule(family.modules["output"]).register_forward_hook(keep).remove)
        with suppress(_Reached):
            left = batch.through(block)
    stream: dict[Role, Tensor] = {"output": batch.hidden}
    if written:
        stream["fc2"] = batch.hidden + written[0] if family.norm == "before" else seen["fc1"]
    return Passage(stream, seen[until or "fc2"], left)


def _wanted(met: "Passage", pages: Path | None) -> tuple[dict[Role, Tensor], Tensor]:
    """What a batch met in a block of the dense model, but for what was read: that is large, and not needed."""
    assert met.left is not None
    between, left = (in_file(each.float(), pages) for each in (met.stream["fc2"], met.left))
    rest()
    return {**met.stream, "fc2": between}, left


def _whole(model: nn.Module, dense: nn.Module, target: Target) -> Tensor:
    """The matrix (m, n) of which a smaller layer has factors, or, of one that is narrow instead, its own."""
    layer = product_of(model, target.name)
    return (linear_of(dense, target.name) if isinstance(layer, LowRankLinear) else layer).weight.detach()


@dataclass(frozen=True, eq=False)
class Lack:
    """Weighted sums over tokens: of the inputs x (n,) of a layer, less ``center``, of z = W x, and of what is lacking,
    r (m,)."""

    weight: Tensor
    """W (m, n)"""
    center: Tensor
    sums: Mapping[str, Tensor]
    """Of the weights, (), x, (n,), r, (m,), z zᵀ and r zᵀ, (m, m); float64."""

    @classmethod
    def nothing(cls, weight: Tensor, center: Tensor) -> "Lack":
        m, n = weight.shape
        sizes: dict[str, tuple[int, ...]] = {"weight": (), "x": (n,), "r": (m,), "zz": (m, m), "rz": (m, m)}
        return cls(weight, center, {name: center.new_zeros(size) for name, size in sizes.items()})

    def add(self, x: Tensor, r: Tensor, weights: Tensor, passes: Passes = nullcontext) -> None:
        """Tokens x (batch, tokens, n), r (batch, tokens, m) with their weights (batch, tokens)."""
        x, r, weights = x.flatten(0, 1) - self.center.to(x), r.flatten(0, 1), weights.flatten()
        with passes():
            z = nn.functional.linear(x, self.weight.to(x))
        mixed, z = z.dtype == torch.bfloat16, z.float()
        self.sums["weight"].add_(weights.double().sum())
        self.sums["x"].add_(weights @ x)
        self.sums["r"].add_(weights @ r)
        with narrow_products(mixed):
            self.sums["zz"].add_(gram_of(z * weights.sqrt()[:, None]))
            self.sums["rz"].add_(r.T @ (z * weights[:, None]))

    def of_all(self) -> "Lack":
        """Those of all processes."""
        if not processes.started():
            return self
        shares = {**self.sums, "zz": half_of(self.sums["zz"])}
        found = {name: processes.total(each) for name, each in shares.items()}
        return replace(self, sums={**found, "zz": symmetric(found["zz"])})

    def __add__(self, other: "Lack") -> "Lack":
        return replace(self, sums={name: each + other.sums[name] for name, each in self.sums.items()})

    def __bool__(self) -> bool:
        """Whether there was any token."""
        return bool(self.sums["weight"] > 0)

    def means(self) -> tuple[Tensor, Tensor]:
        """Of x, (n,), and of r, (m,)."""
        return self.center + self.sums["x"] / self.sums["weight"], self.sums["r"] / self.sums["weight"]

    def covariances(self) -> tuple[Tensor, Tensor]:
        """Of z and of r with z, (m, m)."""
        x, r, zz, rz = (self.sums[name] / self.sums["weight"] for name in ("x", "r", "zz", "rz"))
        z = self.weight.double() @ x
        return zz - torch.outer(z, z), rz - torch.outer(r, z)


def refit(
    model: nn.Module,
    dense: nn.Module,
    target: Target,
    stats: LinearStats,
    factorize: Factorize,
    halves: Sequence[Lack],
) -> None:
    """Give one layer the factors and the bias with which it adds its share of what is lacking."""
    one, other = halves
    whole = one + other
    if not whole:
        return
    layer, weight = product_of(model, target.name), whole.weight.double()
    assert layer.bias is not None
    (mean, lacking), (covariance, cross) = whole.means(), whole.covariances()
    ridge = best_ridge(one, other, stats.gradient_gram)
    added = torch.zeros_like(cross) if ridge is None else SHARE * regression(covariance, cross, ridge)
    wanted = weight + added @ weight
    if not isinstance(layer, LowRankLinear):
        layer.weight.copy_(wanted)
        layer.bias.copy_(shifted_bias(layer.bias.double() + SHARE * lacking, weight, wanted, mean))
        return
    raised, shift = torch.eye(len(added)).to(added) + added, wanted @ mean
    gram = raised @ covariance @ raised.T + torch.outer(shift, shift)
    found = factorize(target.name, wanted, replace(stats, mean=mean, gram=None, output_gram=gram))
    up, down = found.up[:, : layer.rank], found.down[: layer.rank]
    layer.set_factors(up, down)
    bias = linear_of(dense, target.name).bias.double()
    layer.bias.copy_(shifted_bias(bias + SHARE * lacking, weight, up @ down, mean))


def best_ridge(one: Lack, other: Lack, metric: Tensor | None) -> float | None:
    """The ridge with which either half of the samples explains most of the other; None where none explains anything.

    ``metric`` (m, m) says what counts at the output, all alike if it is None. Ridges are tried from the middle on, as
    long as they become better. Float32 is enough to tell one from another that is ten times as large. Several processes
    share the trials.
    """
    if not one or not other:
        return None
    halves = _narrow(one), _narrow(other)
    metric = None if metric is None else metric.float()
    middle = len(RIDGES) // 2
    errors = {middle: _missed(middle, halves, metric)}
    for step in (-1, 1):
        number = middle + step
        while 0 <= number < len(RIDGES) and min(errors, key=errors.__getitem__) == number - step:
            errors[number] = _missed(number, halves, metric)
            number += step
    best = min(errors, key=errors.__getitem__)
    return RIDGES[best] if errors[best] < 0 else None


Covariances = tuple[Tensor, Tensor]
"""Of z and of r with z, (m, m)."""


def _narrow(half: Lack) -> Covariances:
    """In float32."""
    covariance, cross = half.covariances()
    return covariance.float(), cross.float()


def _missed(number: int, halves: tuple[Covariances, Covariances], metric: Tensor | None) -> float:
    """What the ridge regressions of either half leave of the other, less what is there without one."""

    def missed(fitted: Covariances, tested: Covariances) -> float:
        (covariance, cross), B = tested, regression(*fitted, RIDGES[number])
        against = B if metric is None else metric @ B
        return float((against * (B @ covariance - 2 * cross)).sum())

    one, other = halves
    trials = [(one, other), (other, one)]
    with processes.together():
        mine = [missed(*trial) for trial in processes.share(trials)]
    return float(sum(error for share in processes.gather(mine) for error in share))


def regression(covariance: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """B (m, k) of the ridge regression r ≈ B z, from Cov(z) (k, k) and Cov(r, z) (m, k)."""
    damped = covariance.clone()
    damped.diagonal().add_(ridge * covariance.diagonal().mean().clamp_min(torch.finfo(covariance.dtype).tiny))
    lower, failed = torch.linalg.cholesky_ex(damped)
    solved: Tensor = torch.cholesky_solve(cross.T, lower)
    if failed:  # moments that are not positive definite, for rounding
        solved = torch.linalg.solve(damped, cross.T)
    return solved.T
