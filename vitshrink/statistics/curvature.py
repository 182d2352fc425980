"""Label-free curvature of a model's output with respect to the outputs of its linear layers."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.errors import DataError, NumericsError
from vitshrink.models.targets import Target, first_blocks
from vitshrink.runtime.modes import frozen
from vitshrink.runtime.precision import Passes, in_full, is_narrow, narrow_products
from vitshrink.statistics.calibration import (
    CalibrationBatch,
    Course,
    OnBatch,
    accumulate,
    named_sums,
    one_by_one,
    put_sums,
    real_tokens,
    to_device,
    token_mask,
)
from vitshrink.statistics.calls import joined
from vitshrink.statistics.functionals import batch_generator, random_functional, require_gradient
from vitshrink.statistics.halves import half_gram, symmetric
from vitshrink.statistics.recomputing import Recomputing, recomputing
from vitshrink.statistics.stats import LinearStats, Moments

TOKEN_WEIGHT = 0.7
"""Share of the gradient-weighted tokens in C; the rest counts all tokens alike, for tokens that no gradient met."""

CLIP = (0.1, 10.0)
"""Bounds of the norm of a token's gradient, in units of the mean over the tokens of a batch: a few tokens with far
longer ones than the others would stand for all of them in C and H."""


@dataclass(eq=False)
class GroupSums:
    """Weighted float64 sums over the inputs x (tokens, n) of the layers that read the same tensor."""

    tokens: int = 0
    weight: float = 0.0
    total: Tensor | None = None
    gram: Tensor | None = None
    """Its half."""

    def add(self, moments: Moments, weights: Tensor, *, with_gram: bool) -> None:
        self.tokens += len(weights)
        self.weight += float(weights.double().sum())
        self.total = accumulate(self.total, moments.total())
        if with_gram:
            self.gram = accumulate(self.gram, moments.half())


@dataclass(eq=False)
class LayerSums:
    """Float64 sums over the output gradients g (tokens, m) of one layer, in the smaller of its two spaces.

    Of matrices, which are symmetric, the halves.
    """

    count: int = 0
    power: float = 0.0
    gradient: Tensor | None = None
    """Σ g gᵀ, (m, m), or Σ (Wᵀg)(Wᵀg)ᵀ, (n, n), where n < m."""
    output_gram: Tensor | None = None
    """Σ s (Wx)(Wx)ᵀ, (m, m), where m < n."""


@dataclass(eq=False)
class CurvatureCollector:
    """Hooks on the targets; parameters need no gradient, so that a backward pass costs what a forward pass does."""

    model: PreTrainedModel
    targets: Sequence[Target]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Dense weights (m, n) of layers that are compressed in ``model``: statistics are those of the dense layer."""
    seed: int = 0
    probes: int = 1
    """Backward passes a batch."""
    passes: Passes = nullcontext
    token_weight: float = TOKEN_WEIGHT
    clip: tuple[float, float] = CLIP
    full: Collection[str] = ()
    """Targets of which the whole of C is wanted, whatever their shape."""
    batch: int = -1
    _mask: Tensor | None = None
    _mixed: bool = False
    """Whether Grams are multiplied in bfloat16, as in the passes. Not where the whole of C is wanted: what others say,
    too, shows in the last digits."""
    _x: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    """Of each call of a layer, by its number, as all of these; one that several blocks share is called often."""
    _z: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    _importance: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    _calls: dict[str, int] = field(default_factory=dict)
    _again: dict[tuple[str, int | None], list[int]] = field(default_factory=dict)
    """Numbers of calls that are to come again, by layer and call of the block, in blocks that are computed twice."""
    _blocks: Recomputing | None = None
    _awaited: dict[str, int] = field(default_factory=dict)
    """Gradients of a layer that are still to come, one for each call and probe."""
    _forward: bool = False
    """Whether the model runs; in the backward pass some blocks are computed again."""
    _inputs: dict[str, Tensor] = field(default_factory=dict)
    """What a layer is about to read."""
    _scales: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """Factors of clipping by call, until the gradient at its input is known."""
    _groups: dict[str, GroupSums] = field(default_factory=dict)
    _layers: dict[str, LayerSums] = field(default_factory=dict)

    def run(self, number: int, batch: CalibrationBatch) -> None:
        """One forward pass, ``probes`` backward passes, and the sums over their tokens."""
        device = next(self.model.parameters()).device
        self._mask = token_mask(batch, device)
        self.batch = number
        self._mixed = not self.full and is_narrow(self.passes, device)
        generator = batch_generator(self.seed, number)
        handles = [block.register_forward_pre_hook(require_gradient) for block in first_blocks(self.model)]
        for target in self.targets:
            module = self.model.get_submodule(target.name)
            handles.append(module.register_forward_pre_hook(partial(self._enter, target)))
            handles.append(module.register_forward_hook(self._forward_hook(target)))
        again = recomputing(self.model) if self.probes == 1 else nullcontext()
        try:
            with torch.enable_grad(), again as self._blocks:
                self._forward = True
                with self.passes():
                    outputs = self.model(**to_device(batch.inputs, device))
                self._forward = False
                for left in reversed(range(self.probes)):
                    functional = random_functional(self.model, outputs, batch, generator)
                    torch.autograd.backward(functional(outputs).sum(), retain_graph=left > 0)
        finally:
            for handle in handles:
                handle.remove()
        for group in list(self._x):  # of which some layers do nothing for the output
            self._sum_inputs(group)
        for counts in (self._calls, self._again, self._awaited):
            counts.clear()

    def state(self) -> dict[str, Tensor]:
        return named_sums("groups", self._groups) | named_sums("layers", self._layers)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        put_sums("groups", state, self._groups, GroupSums)
        put_sums("layers", state, self._layers, LayerSums)

    def statistics(self) -> dict[str, LinearStats]:
        """Statistics of every target; uses up the sums. Raises DataError when no token came through."""
        return dict(self.each())

    def each(self) -> Iterator[tuple[str, LinearStats]]:
        """The same one by one: the sums of a target are let go before the next one's statistics are made of theirs."""
        if not self._groups:
            raise DataError("no calibration token reached the model: is the data set empty?")
        most = max(layer.count for layer in self._layers.values())
        left = Counter(target.input_group for target in self.targets)
        grams: dict[str, Tensor] = {}  # one for all layers that read the same
        for target in self.targets:
            group, layer = self._groups[target.input_group], self._layers.pop(target.name, LayerSums())
            assert group.total is not None
            m, n = target.shape
            if group.gram is not None:
                grams[target.input_group] = symmetric(group.gram).div_(group.weight)
                group.gram = None
            uses = layer.count / most  # of a sample: fewer tokens go through later stages
            if layer.gradient is None:  # the output does not depend on it
                gradient = group.total.new_zeros(min(m, n), min(m, n))
            else:
                gradient = symmetric(layer.gradient).div_(layer.count).mul_(uses)
            left[target.input_group] -= 1
            gram = grams.get(target.input_group)
            if not left[target.input_group]:
                grams.pop(target.input_group, None)
            yield (
                target.name,
                LinearStats(
                    tokens=group.tokens,
                    mean=group.total / group.weight,
                    gram=gram,
                    output_gram=None if layer.output_gram is None else symmetric(layer.output_gram).div_(group.weight),
                    gradient_gram=gradient if m <= n else None,
                    input_gradient_gram=gradient if m > n else None,
                    gradient_power=layer.power / max(layer.count, 1) * uses,
                ),
            )

    def _weight(self, target: Target, like: Tensor) -> Tensor:
        """The dense one, (m, n), on the device of ``like``."""
        weight: Any = self.weights.get(target.name)
        if weight is None:
            weight = self.model.get_submodule(target.name).weight
        assert isinstance(weight, Tensor)
        return weight.detach().float().to(like.device)

    def _real(self, activation: Tensor) -> Tensor:
        return real_tokens(activation, self._mask)

    def _enter(self, target: Target, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Give a layer its input as a tensor of its own, of which the gradient is that of this call alone."""
        if not torch.is_grad_enabled():  # in a block that is computed again
            return inputs
        x, *others = require_gradient(module, inputs)
        self._inputs[target.name] = x.view_as(x)
        return (self._inputs[target.name], *others)

    def _forward_hook(self, target: Target) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        m, n = target.shape

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            number = self._number(target.name)
            if not torch.is_grad_enabled():
                self._again.setdefault((target.name, self._call), []).append(number)
                return
            tokens = self._x.setdefault(target.input_group, {})
            if number not in tokens:  # the first layer of its group
                tokens[number] = self._real(inputs[0])
            if m < n:
                if target.name in self.weights:
                    with in_full(output.device):
                        z = self._real(inputs[0]).float() @ self._weight(target, output).T
                else:
                    z = self._real(output).float()
                    z = z - module.bias if isinstance(module.bias, Tensor) else z
                self._z.setdefault(target.name, {})[number] = z
            # of the tensors, as hooks of modules allow no change of an output in place
            output.register_hook(partial(self._add, target, number))  # type: ignore[no-untyped-call]
            x = self._inputs.pop(target.name)
            if m > n and target.name not in self.weights:
                x.register_hook(partial(self._add_input, target, number))  # type: ignore[no-untyped-call]

        return hook

    @property
    def _call(self) -> int | None:
        """Of the block that is computed."""
        return None if self._blocks is None else self._blocks.call

    def _number(self, name: str) -> int:
        """Of a call of a layer in this pass."""
        if not self._forward:
            return self._again[name, self._call].pop(0)
        number = self._calls.get(name, 0)
        self._calls[name] = number + 1
        self._awaited[name] = self._awaited.get(name, 0) + self.probes
        return number

    def _add(self, target: Target, number: int, gradient: Tensor) -> None:
        """Of the output of a call."""
        m, n = target.shape
        seen_at_input = m > n and target.name not in self.weights
        g = self._real(gradient) if seen_at_input else self._real(gradient).float()
        norms = torch.linalg.vector_norm(g, dim=1, keepdim=True, dtype=torch.float32)
        power = float(norms.double().square().sum())
        if not isfinite(power):
            raise NumericsError(
                f"layer {target.name!r} met NaN or Inf in its gradient in calibration batch {self.batch}. "
                "Check the checkpoint and the preprocessing of that batch."
            )
        sums = self._layers.setdefault(target.name, LayerSums())
        sums.power += power
        sums.count += g.shape[0]
        scale = clipping(norms, self.clip)
        importance = (norms * scale).square().squeeze(1)
        known = self._importance.setdefault(target.name, {})
        known[number] = importance if number not in known else known[number] + importance
        if seen_at_input:
            self._scales[target.name, number] = scale
        else:
            with narrow_products(self._mixed):
                side = g @ self._weight(target, g) if m > n else g
                sums.gradient = accumulate(sums.gradient, half_gram(side * scale))
        self._awaited[target.name] -= 1
        if not any(self._awaited.get(each.name) for each in self._readers[target.input_group]):
            self._sum_inputs(target.input_group)

    def _add_input(self, target: Target, number: int, gradient: Tensor) -> None:
        """Of the input of a call: Wᵀg."""
        side = self._real(gradient).float() * self._scales.pop((target.name, number))
        sums = self._layers[target.name]
        with narrow_products(self._mixed):
            sums.gradient = accumulate(sums.gradient, half_gram(side))

    @cached_property
    def _readers(self) -> Mapping[str, Sequence[Target]]:
        """The layers of each group, in the order of the targets."""
        found: dict[str, list[Target]] = {}
        for target in self.targets:
            found.setdefault(target.input_group, []).append(target)
        return found

    @torch.no_grad()
    def _sum_inputs(self, group: str) -> None:
        """Add what a group has read in this pass, and forget it."""
        readers, tokens = self._readers[group], self._x.pop(group)
        importance = []
        for target in readers:
            known = self._importance.pop(target.name, {})
            importance.append(
                _joined({n: known.get(n, each.new_zeros(len(each), dtype=torch.float32)) for n, each in tokens.items()})
            )
        mixed = token_weights(importance, self.token_weight)
        whole = not _narrow(readers[0]) or readers[0].name in self.full
        moments = Moments(_joined(tokens).float(), mixed, narrow=self._mixed and whole)
        self._groups.setdefault(group, GroupSums()).add(moments, mixed, with_gram=whole)
        for target in filter(_narrow, readers):
            z = _joined(self._z.pop(target.name))
            plain = moments.shift is None
            outputs = Moments(z, mixed, narrow=self._mixed) if plain else moments.through(self._weight(target, z))
            layer = self._layers.setdefault(target.name, LayerSums())
            layer.output_gram = accumulate(layer.output_gram, outputs.half())


def _joined(calls: Mapping[int, Tensor]) -> Tensor:
    """The tokens of all calls, in their order."""
    return joined([calls[number] for number in sorted(calls)])


def _narrow(target: Target) -> bool:
    """Whether a layer has fewer outputs than inputs."""
    return target.shape[0] < target.shape[1]


def clipping(norms: Tensor, bounds: tuple[float, float] = CLIP) -> Tensor:
    """Factors (tokens, 1) that bring the ``norms`` of gradients g (tokens, 1) within ``bounds``, times their mean.

    Σ‖g‖² stays what it is, so that losses of different layers compare as before.
    """
    low, high = (bound * norms.mean() for bound in bounds)
    clipped = torch.where(norms > 0, norms.clamp(low, high), 0)
    scale = torch.where(norms > 0, clipped / norms.clamp_min(1e-30), 1)
    power: Tensor = norms.square().sum() / clipped.square().sum().clamp_min(1e-30)
    return scale * power.sqrt()


def token_weights(importance: Sequence[Tensor], share: float = TOKEN_WEIGHT) -> Tensor:
    """Weights (tokens,) in C, from the squared gradients (tokens,) of every layer that reads the same input.

    ``share`` of them goes by the squared gradient, the rest is the same for all.
    """
    relative = torch.stack([each / each.mean().clamp_min(1e-30) for each in importance]).mean(0)
    return share * relative + (1 - share)


def collect_curvature(
    model: PreTrainedModel,
    targets: Sequence[Target],
    batches: Sequence[CalibrationBatch],
    *,
    weights: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    probes: int = 1,
    passes: Passes = nullcontext,
    full: Collection[str] = (),
    course: Course = one_by_one,
    on_batch: OnBatch = lambda _samples: None,
    keep: Callable[[Iterable[tuple[str, LinearStats]]], dict[str, LinearStats]] = dict,
) -> dict[str, LinearStats]:
    """Input covariances and output curvatures of every target: one forward and ``probes`` backward passes a batch.

    The curvature is H = E[g gᵀ] with g the gradient of ``random_functional`` at the layer's output (Kronecker-factored
    Gauss-Newton, Martens and Grosse 2015, arXiv 1503.05671), without labels. Tokens count in the covariance by their
    squared gradient. Memory is that of one batch.

    Args:
        weights: the dense weights of the targets that ``model`` holds compressed.
        passes: the arithmetic of the passes; what is made of their activations and gradients is summed in float32.
        full: the targets of which the whole of C is wanted, whatever their shape.
        keep: takes the statistics of one target after the other; together they are twice as large as their sums.

    Raises:
        NumericsError: NaN or Inf; names the layer and the batch.
        DataError: no batch at all.
    """
    collector = CurvatureCollector(model, targets, weights or {}, seed, probes, passes, full=full)
    with frozen(model):
        course(collector, batches, on_batch)
    return keep(collector.each())
