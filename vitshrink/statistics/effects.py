"""What each rank-one component of each layer does to the output of the model, sample by sample."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.errors import NumericsError
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.targets import first_blocks
from vitshrink.runtime.modes import evaluating, frozen
from vitshrink.runtime.offloading import at_home
from vitshrink.runtime.paging import rest
from vitshrink.runtime.precision import Passes
from vitshrink.statistics.calibration import CalibrationBatch, samples_of, to_device, token_mask
from vitshrink.statistics.calls import by_sample
from vitshrink.statistics.functionals import batch_generator, divergences, random_functional, require_gradient
from vitshrink.statistics.importance import TokenWeights
from vitshrink.statistics.recomputing import recomputing
from vitshrink.statistics.reference import Reference

TOGETHER = 0.25
"""Weight of the square of the summed effect in the geometric mean that is the measured loss."""

MEASURED_SAMPLES = 128
"""Samples on which components are measured: they say how much each counts, not what it is, and few suffice for that."""


@dataclass(frozen=True, eq=False)
class Components:
    """A layer as a sum of rank-one maps of what varies: y = Σ up[:, i] down[i] (x − mean) + constant."""

    up: Tensor
    """(m, k)"""
    down: Tensor
    """(k, n)"""
    mean: Tensor
    """(n,)"""
    own: bool = False
    """Whether these are the factors that the layer itself computes with."""


@dataclass(eq=False)
class Effects:
    """First-order effects on random functionals of the output, one row a sample.

    The second moment of an effect is what taking its component out costs to second order, in the unit of
    ``random_functional``: twice the KL divergence for classifiers.
    """

    layers: dict[str, Tensor]
    """(samples, k) of the components of each layer, float32: as large as the model for some hundred samples."""
    shifts: dict[str, Tensor]
    """(samples, m) of a shift of each output of each layer, at every token alike, float32."""
    missing: Tensor | None
    """What the functionals lack compared with the reference, (samples,), where there is one."""


Measure = Callable[..., Effects]
"""``component_effects``, or what does the same in another way."""

Lacking = Callable[..., Tensor]
"""``shortfall``, or what does the same in another way."""


def component_effects(
    model: PreTrainedModel,
    components: Mapping[str, Components],
    batches: Iterable[CalibrationBatch],
    *,
    reference: Reference | None = None,
    seed: int = 0,
    first: int = 0,
    passes: Passes = nullcontext,
    weights: TokenWeights | None = None,
    on_batch: Callable[[int], None] = lambda _samples: None,
) -> Effects:
    """One forward and one backward pass of ``model`` over all batches.

    A functional of ``model`` is that of its own outputs, or of those of ``reference``.

    Args:
        first: number of the first of the batches in the whole of the data, from which their functionals follow.
        weights: takes the weights of tokens from the same passes; there may be no components beside it.

    Raises:
        NumericsError: NaN or Inf; names the layer and the batch.
    """
    watch = Watch(components, passes)
    device = next(model.parameters()).device
    missing: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        for block in first_blocks(model):
            stack.callback(block.register_forward_pre_hook(require_gradient).remove)
        watch.attach(model, stack)
        if weights is not None:
            weights.attach(model, stack)
        for number, batch in enumerate(batches, first):
            watch.mask = token_mask(batch, device)
            watch.batch, watch.samples = number, samples_of(batch)
            if weights is not None:
                weights.begin(watch.mask)
            generator = batch_generator(seed, number)
            wanted = None if reference is None else reference(batch)
            with torch.enable_grad(), recomputing(model):
                with passes():
                    outputs = model(**to_device(batch.inputs, device))
                functional = random_functional(model, outputs if wanted is None else wanted, batch, generator)
                values = functional(outputs)
                torch.autograd.backward(values.sum())
            watch.end(values)
            if wanted is not None:
                missing.append((functional(wanted) - values.detach()).double())
            rest()
            on_batch(len(values))
    nothing = torch.zeros(0, device=device)

    def whole(found: dict[str, list[Tensor]], width: Callable[[Components], int]) -> dict[str, Tensor]:
        empty = {name: [nothing.new_zeros(0, width(parts))] for name, parts in components.items()}
        return {name: torch.cat(found.pop(name) or empty[name]) for name in components}

    layers = whole(watch.effects, lambda parts: parts.up.shape[1])
    shifts = whole(watch.shifts, lambda parts: parts.up.shape[0])
    return Effects(layers, shifts, None if reference is None else torch.cat([nothing.double(), *missing]))


@torch.no_grad()
def shortfall(
    model: PreTrainedModel,
    reference: Reference,
    batches: Iterable[CalibrationBatch],
    *,
    seed: int = 0,
    first: int = 0,
    passes: Passes = nullcontext,
    on_batch: Callable[[int], None] = lambda _samples: None,
) -> Tensor:
    """``missing`` of ``component_effects`` with the same seed, (samples,), from a forward pass alone."""
    missing = [torch.zeros(0, dtype=torch.float64, device=next(model.parameters()).device)]
    for batch, wanted, outputs, generator in _answers(model, reference, batches, seed, first, passes):
        functional = random_functional(model, wanted, batch, generator)
        missing.append((functional(wanted) - functional(outputs)).double())
        on_batch(len(missing[-1]))
    return torch.cat(missing)


@torch.no_grad()
def losses(
    model: PreTrainedModel,
    reference: Reference,
    batches: Iterable[CalibrationBatch],
    *,
    seed: int = 0,
    first: int = 0,
    passes: Passes = nullcontext,
) -> Tensor:
    """``divergences`` of the model from the reference, (samples, 2): what squares of ``shortfall`` are by chance."""
    found = [torch.zeros(0, 2, dtype=torch.float64, device=next(model.parameters()).device)]
    for batch, wanted, outputs, generator in _answers(model, reference, batches, seed, first, passes):
        found.append(divergences(model, wanted, outputs, batch, generator))
    return torch.cat(found)


def _answers(
    model: PreTrainedModel,
    reference: Reference,
    batches: Iterable[CalibrationBatch],
    seed: int,
    first: int,
    passes: Passes,
) -> Iterator[tuple[CalibrationBatch, Any, Any, torch.Generator]]:
    """Each batch, what the reference and the model answer, and its random numbers."""
    device = next(model.parameters()).device
    for number, batch in enumerate(batches, first):
        wanted = reference(batch)
        with evaluating(model), passes():
            outputs = model(**to_device(batch.inputs, device))
        yield batch, wanted, outputs, batch_generator(seed, number)
        rest()


@dataclass(eq=False)
class Watch:
    """Hooks that turn the inputs and output gradients of layers into the effects of their components."""

    components: Mapping[str, Components]
    passes: Passes = nullcontext
    mask: Tensor | None = None
    batch: int = 0
    samples: int = 0
    effects: dict[str, list[Tensor]] = field(default_factory=dict)
    shifts: dict[str, list[Tensor]] = field(default_factory=dict)
    _means: dict[str, Tensor] = field(default_factory=dict)
    """Of what flows through each component, (k,)."""
    _done: int = 0
    """Batches that have run: a layer that has shown more than those is called often in one pass."""

    def end(self, like: Tensor) -> None:
        """A batch has run: what the output does not depend on has no effect."""
        for name, parts in self.components.items():
            for found, width in ((self.effects, parts.up.shape[1]), (self.shifts, parts.up.shape[0])):
                if len(found[name]) == self._done:
                    found[name].append(like.new_zeros(self.samples, width, dtype=torch.float32))
        self._done += 1

    def attach(self, model: nn.Module, stack: ExitStack) -> None:
        for name, parts in self.components.items():
            module = model.get_submodule(name)
            self.effects[name], self.shifts[name] = [], []
            self._means[name] = (parts.down.double() @ parts.mean.double()).float()
            rest()
            stack.callback(module.register_forward_pre_hook(require_gradient).remove)
            if parts.own and isinstance(module, LowRankLinear) and module.spec.pivot is None:
                vars(module)["forward"] = self._within(name, module)
                stack.callback(vars(module).pop, "forward")
            else:
                stack.callback(module.register_forward_hook(self._hook(name, parts)).remove)

    def _within(self, name: str, module: LowRankLinear) -> Callable[[Tensor], Tensor]:
        """What stands for the ``forward`` of a layer: its components are seen between its factors, at no product more.

        The effect of a component is the product of what flows through it and of the gradient there.
        """

        def forward(x: Tensor) -> Tensor:
            inner = F.linear(x, module.down)
            output = F.linear(inner, module.weight, module.bias)
            if torch.is_grad_enabled():
                flows = inner.detach()
                inner.register_hook(partial(self._add_inner, name, flows))  # type: ignore[no-untyped-call]
                output.register_hook(partial(self._add_shift, name))  # type: ignore[no-untyped-call]
            return output

        return forward

    def _add_inner(self, name: str, flows: Tensor, gradient: Tensor) -> None:
        # taken out of what flows, not of what is read: that is wider
        flows = self._real(flows.float() - self._means[name].to(flows.device), gradient)
        # both in float32: torch multiplies numbers of two types in twice the time
        self._keep(name, self.effects, by_sample(flows.mul_(gradient.float()).sum(1), self.samples))

    def _add_shift(self, name: str, gradient: Tensor) -> None:
        found = self._real(gradient.detach(), gradient).sum(1, dtype=torch.float32)
        self._keep(name, self.shifts, by_sample(found, self.samples))

    def _real(self, tokens: Tensor, gradient: Tensor) -> Tensor:
        """Tokens (batch, tokens, k) with nothing in the place of padding, as the shape of a gradient says."""
        if self.mask is None or gradient.shape[:-1] != self.mask.shape:
            return tokens
        return tokens * self.mask[..., None].to(tokens.device)

    def _hook(self, name: str, parts: Components) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if not torch.is_grad_enabled():  # of a block that is computed again
                return
            # of the tensor, as hooks of modules allow no change of an output in place
            output.register_hook(partial(self._add, name, parts, inputs[0].detach()))  # type: ignore[no-untyped-call]

        return hook

    def _add(self, name: str, parts: Components, read: Tensor, gradient: Tensor) -> None:
        gradient, read = gradient.detach().contiguous(), read.contiguous()  # laid out otherwise, they round otherwise
        with self.passes():
            left = gradient @ parts.up.to(gradient)
            right = read @ parts.down.to(read).T
        rest()
        self._add_inner(name, right, left)
        self._add_shift(name, gradient)

    def _keep(self, name: str, found: dict[str, list[Tensor]], each: Tensor) -> None:
        """Add what a call of a layer shows to what its calls before have shown in this batch."""
        if not torch.isfinite(each).all():
            raise NumericsError(
                f"layer {name!r} met NaN or Inf in its gradient in calibration batch {self.batch}. "
                "Check the checkpoint and the preprocessing of that batch."
            )
        each = at_home(each)
        if len(found[name]) > self._done:
            found[name][-1] = found[name][-1] + each
        else:
            found[name].append(each)


def measured_loss(effects: Tensor) -> Tensor:
    """What the layer loses at every rank, (k + 1,), from the effects (samples, k) of its components.

    Two estimates of the loss when the components from r on are left out: the sum of their squared effects, which takes
    them for independent, and the square of their summed effect, which takes the linear model for exact. The first is
    too low where components act alike (those of queries and keys all sharpen the attention), the second too high where
    the rest of the model answers to what is gone. Their geometric mean is taken, the second with a quarter of the
    weight: with half of it small cuts come out a little better and deep ones worse. It never rises with r.
    """
    effects = effects.double()
    alone = effects.square().mean(0).flip(0).cumsum(0).flip(0)
    together = effects.flip(1).cumsum(1).square().mean(0).flip(0)
    loss = torch.cat([alone ** (1 - TOGETHER) * together**TOGETHER, effects.new_zeros(1)])
    return loss.cummin(0).values
