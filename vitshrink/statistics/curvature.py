"""Label-free curvature of a model's output with respect to the outputs of its linear layers."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from vitshrink.errors import DataError, NumericsError
from vitshrink.models.readings import reading_of
from vitshrink.models.targets import Target, blocks_of
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
    samples_of,
    to_device,
)
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
    batch: int = -1
    _mask: Tensor | None = None
    _x: dict[str, Tensor] = field(default_factory=dict)
    _z: dict[str, Tensor] = field(default_factory=dict)
    _importance: dict[str, Tensor] = field(default_factory=dict)
    _groups: dict[str, GroupSums] = field(default_factory=dict)
    _layers: dict[str, LayerSums] = field(default_factory=dict)

    def run(self, number: int, batch: CalibrationBatch) -> None:
        """One forward pass, ``probes`` backward passes, and the sums over their tokens."""
        device = next(self.model.parameters()).device
        self._mask = None if batch.mask is None else batch.mask.to(device)
        self.batch = number
        generator = batch_generator(self.seed, number)
        handles = [blocks_of(self.model)[0].register_forward_pre_hook(require_gradient)]
        for target in self.targets:
            module = self.model.get_submodule(target.name)
            handles.append(module.register_forward_hook(self._forward_hook(target)))
            handles.append(module.register_full_backward_hook(self._backward_hook(target)))
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
        for target in self.targets:
            group, layer = self._groups[target.input_group], self._layers[target.name]
            assert group.total is not None
            assert layer.gradient is not None
            m, n = target.shape
            gradient = layer.gradient / layer.count
            found[target.name] = LinearStats(
                tokens=group.tokens,
                mean=group.total / group.weight,
                gram=None if group.gram is None else group.gram / group.weight,
                output_gram=None if layer.output_gram is None else layer.output_gram / group.weight,
                gradient_gram=gradient if m <= n else None,
                input_gradient_gram=gradient if m > n else None,
                gradient_power=layer.power / layer.count,
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
        """(batch, tokens, k) without the padding, as (tokens, k) float32."""
        activation = activation.detach()
        flat = activation[self._mask] if self._mask is not None else activation.reshape(-1, activation.shape[-1])
        return flat.float()

    def _forward_hook(self, target: Target) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if target.input_group not in self._x:
                self._x[target.input_group] = self._real(inputs[0])
            if target.shape[0] < target.shape[1]:
                if target.name in self.weights:
                    with torch.autocast(output.device.type, enabled=False):
                        self._z[target.name] = self._real(inputs[0]) @ self.weights[target.name].T
                else:
                    z = self._real(output)
                    self._z[target.name] = z - module.bias if isinstance(module.bias, Tensor) else z

        return hook

    def _backward_hook(
        self, target: Target
    ) -> Callable[[nn.Module, tuple[Tensor | None, ...], tuple[Tensor, ...]], None]:
        m, n = target.shape

        def hook(_module: nn.Module, grad_input: tuple[Tensor | None, ...], grad_output: tuple[Tensor, ...]) -> None:
            g = self._real(grad_output[0])
            sums = self._layers.setdefault(target.name, LayerSums())
            power = float(g.square().sum(1).double().sum())
            if not torch.isfinite(torch.tensor(power)):
                raise NumericsError(
                    f"layer {target.name!r} met NaN or Inf in its gradient in calibration batch {self.batch}. "
                    "Check the checkpoint and the preprocessing of that batch."
                )
            sums.power += power
            sums.count += g.shape[0]
            scale = clipping(g, self.clip)
            side = g
            if m > n and target.name in self.weights:
                side = g @ self.weights[target.name]
            elif m > n:
                assert grad_input[0] is not None
                side = self._real(grad_input[0])
            side = side * scale
            importance = (g * scale).square().sum(1)
            sums.gradient = accumulate(sums.gradient, gram_of(side))
            known = self._importance.get(target.name)
            self._importance[target.name] = importance if known is None else known + importance

        return hook

    def _sum_inputs(self) -> None:
        weights: dict[str, list[Tensor]] = {}
        for target in self.targets:
            weights.setdefault(target.input_group, []).append(self._importance[target.name])
        mixed = {group: token_weights(each, self.token_weight) for group, each in weights.items()}
        found: dict[str, Moments] = {}
        for target in self.targets:
            group = target.input_group
            narrow = target.shape[0] < target.shape[1]
            if group not in found:
                found[group] = Moments(self._x[group], mixed[group])
                sums = self._groups.setdefault(group, GroupSums())
                sums.add(found[group], mixed[group], with_gram=not narrow)
            if narrow:
                if found[group].shift is None:
                    outputs = Moments(self._z[target.name], mixed[group])
                else:
                    outputs = found[group].through(self._weight(target))
                layer = self._layers[target.name]
                layer.output_gram = accumulate(layer.output_gram, outputs.gram())
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
    """Gradients start at the first block: nothing before it is a target."""
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

    Raises:
        NumericsError: NaN or Inf; names the layer and the batch.
        DataError: no batch at all.
    """
    collector = CurvatureCollector(model, targets, weights or {}, seed, probes, passes)
    with frozen(model):
        course(collector, batches, on_batch)
    return collector.statistics()
