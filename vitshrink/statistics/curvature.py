"""Label-free curvature of a model's output with respect to the outputs of its linear layers."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from vitshrink.errors import DataError, NumericsError
from vitshrink.models.readings import reading_of
from vitshrink.models.targets import Target, first_blocks
from vitshrink.models.tasks import head_of, task_of
from vitshrink.runtime.modes import frozen
from vitshrink.runtime.precision import Passes
from vitshrink.statistics.calibration import (
    CalibrationBatch,
    Course,
    OnBatch,
    accumulate,
    named_sums,
    one_by_one,
    put_sums,
    real_tokens,
    samples_of,
    to_device,
    token_mask,
)
from vitshrink.statistics.calls import joined
from vitshrink.statistics.stats import LinearStats, Moments, gram_of

TOKEN_WEIGHT = 0.7
"""Share of the gradient-weighted tokens in C; the rest counts all tokens alike, for tokens that no gradient met."""

CLIP = (0.1, 10.0)
"""Bounds of the norm of a token's gradient, in units of the mean over the tokens of a batch: a few tokens with far
longer ones than the others would stand for all of them in C and H."""


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
    head = head_of(model)
    if task_of(model) == "masked-lm":
        logits: Tensor = outputs["logits"]
        texts, positions = _tokens(_masks(logits, batch), generator)
        at_tokens = head.probe(logits[texts, positions], generator)
        zeros = at_tokens.new_zeros(logits.shape[0])
        index = texts.to(logits.device)
        return lambda outputs: zeros.index_add(
            0, index, (outputs["logits"][texts, positions].float() * at_tokens).sum(-1)
        )

    reading = reading_of(model)
    probe = head.probe(reading.rows(outputs, batch), generator)
    owners = reading.owners(outputs, batch)
    nothing = probe.new_zeros(samples_of(batch))

    def of_samples(outputs: ModelOutput) -> Tensor:
        of_rows = (reading.rows(outputs, batch) * probe).sum(-1)
        return of_rows if owners is None else nothing.index_add(0, owners, of_rows)

    return of_samples


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


@dataclass(eq=False)
class GroupSums:
    """Weighted float64 sums over the inputs x (tokens, n) of the layers that read the same tensor."""

    tokens: int = 0
    weight: float = 0.0
    total: Tensor | None = None
    gram: Tensor | None = None

    def add(self, moments: Moments, weights: Tensor, *, with_gram: bool) -> None:
        self.tokens += len(weights)
        self.weight += float(weights.double().sum())
        self.total = accumulate(self.total, moments.total())
        if with_gram:
            self.gram = accumulate(self.gram, moments.gram())


@dataclass(eq=False)
class LayerSums:
    """Float64 sums over the output gradients g (tokens, m) of one layer, in the smaller of its two spaces."""

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
    _x: dict[str, list[Tensor]] = field(default_factory=dict)
    """Of each call of a layer, as all of these; one that several blocks share is called often."""
    _z: dict[str, list[Tensor]] = field(default_factory=dict)
    _importance: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    _calls: dict[str, int] = field(default_factory=dict)
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
        generator = batch_generator(self.seed, number)
        handles = [block.register_forward_pre_hook(require_gradient) for block in first_blocks(self.model)]
        for target in self.targets:
            module = self.model.get_submodule(target.name)
            handles.append(module.register_forward_pre_hook(partial(self._enter, target)))
            handles.append(module.register_forward_hook(self._forward_hook(target)))
        try:
            with torch.enable_grad():
                with self.passes():
                    outputs = self.model(**to_device(batch.inputs, device))
                for left in reversed(range(self.probes)):
                    functional = random_functional(self.model, outputs, batch, generator)
                    torch.autograd.backward(functional(outputs).sum(), retain_graph=left > 0)
        finally:
            for handle in handles:
                handle.remove()
        self._sum_inputs()

    def state(self) -> dict[str, Tensor]:
        return named_sums("groups", self._groups) | named_sums("layers", self._layers)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        put_sums("groups", state, self._groups, GroupSums)
        put_sums("layers", state, self._layers, LayerSums)

    def statistics(self) -> dict[str, LinearStats]:
        """Statistics of every target. Raises DataError when no token came through."""
        if not self._groups:
            raise DataError("no calibration token reached the model: is the data set empty?")
        found = {}
        most = max(layer.count for layer in self._layers.values())
        for target in self.targets:
            group, layer = self._groups[target.input_group], self._layers.get(target.name, LayerSums())
            assert group.total is not None
            m, n = target.shape
            if layer.gradient is None:  # the output does not depend on it
                layer = replace(layer, count=1, gradient=group.total.new_zeros(min(m, n), min(m, n)))
            assert layer.gradient is not None
            uses = layer.count / most  # of a sample: fewer tokens go through later stages
            gradient = layer.gradient / layer.count * uses
            found[target.name] = LinearStats(
                tokens=group.tokens,
                mean=group.total / group.weight,
                gram=None if group.gram is None else group.gram / group.weight,
                output_gram=None if layer.output_gram is None else layer.output_gram / group.weight,
                gradient_gram=gradient if m <= n else None,
                input_gradient_gram=gradient if m > n else None,
                gradient_power=layer.power / layer.count * uses,
            )
        return found

    def _weight(self, target: Target) -> Tensor:
        """The dense one, (m, n)."""
        weight: Any = self.weights.get(target.name)
        if weight is None:
            weight = self.model.get_submodule(target.name).weight
        assert isinstance(weight, Tensor)
        return weight.detach().float()

    def _real(self, activation: Tensor) -> Tensor:
        return real_tokens(activation, self._mask)

    def _enter(self, target: Target, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Give a layer its input as a tensor of its own, of which the gradient is that of this call alone."""
        x, *others = require_gradient(module, inputs)
        self._inputs[target.name] = x.view_as(x)
        return (self._inputs[target.name], *others)

    def _forward_hook(self, target: Target) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        m, n = target.shape

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            number = self._calls.get(target.name, 0)
            self._calls[target.name] = number + 1
            if len(self._x.setdefault(target.input_group, [])) == number:  # the first layer of its group
                self._x[target.input_group].append(self._real(inputs[0]))
            if m < n:
                if target.name in self.weights:
                    with torch.autocast(output.device.type, enabled=False):
                        z = self._real(inputs[0]) @ self.weights[target.name].T
                else:
                    z = self._real(output)
                    z = z - module.bias if isinstance(module.bias, Tensor) else z
                self._z.setdefault(target.name, []).append(z)
            # of the tensors, as hooks of modules allow no change of an output in place
            output.register_hook(partial(self._add, target, number))  # type: ignore[no-untyped-call]
            x = self._inputs.pop(target.name)
            if m > n and target.name not in self.weights:
                x.register_hook(partial(self._add_input, target, number))  # type: ignore[no-untyped-call]

        return hook

    def _add(self, target: Target, number: int, gradient: Tensor) -> None:
        """Of the output of a call."""
        g = self._real(gradient)
        m, n = target.shape
        power = float(g.square().sum(1).double().sum())
        if not torch.isfinite(torch.tensor(power)):
            raise NumericsError(
                f"layer {target.name!r} met NaN or Inf in its gradient in calibration batch {self.batch}. "
                "Check the checkpoint and the preprocessing of that batch."
            )
        sums = self._layers.setdefault(target.name, LayerSums())
        sums.power += power
        sums.count += g.shape[0]
        scale = clipping(g, self.clip)
        importance = (g * scale).square().sum(1)
        known = self._importance.setdefault(target.name, {})
        known[number] = importance if number not in known else known[number] + importance
        if m > n and target.name not in self.weights:
            self._scales[target.name, number] = scale
            return
        side = g @ self.weights[target.name] if m > n else g
        sums.gradient = accumulate(sums.gradient, gram_of(side * scale))

    def _add_input(self, target: Target, number: int, gradient: Tensor) -> None:
        """Of the input of a call: Wᵀg."""
        side = self._real(gradient) * self._scales.pop((target.name, number))
        sums = self._layers[target.name]
        sums.gradient = accumulate(sums.gradient, gram_of(side))

    def _sum_inputs(self) -> None:
        weights: dict[str, list[Tensor]] = {}
        met = [target for target in self.targets if target.input_group in self._x]  # one tower of a dual encoder
        for target in met:
            known, tokens = self._importance.get(target.name, {}), self._x[target.input_group]
            parts = [known.get(number, each.new_zeros(len(each))) for number, each in enumerate(tokens)]
            weights.setdefault(target.input_group, []).append(joined(parts))
        mixed = {group: token_weights(each, self.token_weight) for group, each in weights.items()}
        found: dict[str, Moments] = {}
        for target in met:
            group = target.input_group
            narrow = target.shape[0] < target.shape[1]
            if group not in found:
                found[group] = Moments(joined(self._x[group]), mixed[group])
                sums = self._groups.setdefault(group, GroupSums())
                sums.add(found[group], mixed[group], with_gram=not narrow or target.name in self.full)
            if narrow:
                if found[group].shift is None:
                    outputs = Moments(joined(self._z[target.name]), mixed[group])
                else:
                    outputs = found[group].through(self._weight(target))
                layer = self._layers.setdefault(target.name, LayerSums())
                layer.output_gram = accumulate(layer.output_gram, outputs.gram())
        self._calls.clear()
        self._x.clear()
        self._z.clear()
        self._importance.clear()


def clipping(g: Tensor, bounds: tuple[float, float] = CLIP) -> Tensor:
    """Factors (tokens, 1) that bring the norms of gradients g (tokens, m) within ``bounds``, times their mean.

    Σ‖g‖² stays what it is, so that losses of different layers compare as before.
    """
    norms = g.norm(dim=1, keepdim=True)
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


def batch_generator(seed: int, number: int) -> torch.Generator:
    """Random numbers of one batch, which are the same wherever, and after whatever others, it is run."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**32)


def require_gradient(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients start at the first block, and where layers read something else: nothing before it is a target."""
    if inputs[0].requires_grad:
        return inputs
    return (inputs[0].detach().requires_grad_(), *inputs[1:])


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
) -> dict[str, LinearStats]:
    """Input covariances and output curvatures of every target: one forward and ``probes`` backward passes a batch.

    The curvature is H = E[g gᵀ] with g the gradient of ``random_functional`` at the layer's output (Kronecker-factored
    Gauss-Newton, Martens and Grosse 2015, arXiv 1503.05671), without labels. Tokens count in the covariance by their
    squared gradient. Memory is that of one batch.

    Args:
        weights: the dense weights of the targets that ``model`` holds compressed.
        passes: the arithmetic of the passes; what is made of their activations and gradients is summed in float32.
        full: the targets of which the whole of C is wanted, whatever their shape.

    Raises:
        NumericsError: NaN or Inf; names the layer and the batch.
        DataError: no batch at all.
    """
    collector = CurvatureCollector(model, targets, weights or {}, seed, probes, passes, full=full)
    with frozen(model):
        course(collector, batches, on_batch)
    return collector.statistics()
