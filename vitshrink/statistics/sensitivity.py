"""What the output of a model says of errors in its matrices: linear layers, embeddings and the patch projection."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate as accumulated
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.errors import DataError, NumericsError
from vitshrink.models.readings import reading_of
from vitshrink.models.structures.coded import has_positions
from vitshrink.models.targets import first_blocks
from vitshrink.runtime.modes import frozen
from vitshrink.runtime.offloading import at_home
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
    token_mask,
)
from vitshrink.statistics.functionals import batch_generator, random_functional
from vitshrink.statistics.halves import blocks, diagonal, half_gram, symmetric
from vitshrink.statistics.recomputing import recomputing
from vitshrink.statistics.stats import Moments

WEIGHTS = (0.1, 10.0)
"""Least and most that a token counts in a covariance, of its squared gradient relative to the mean: a few tokens of
huge gradients would leave little to estimate it from."""


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Of one matrix (m, n): errors E cost ½ Σ_i outputs_i (E C Eᵀ)_ii, in nats for classifiers.

    Vectors are float64. The covariance is float32: it is damped by far more than that rounds, and the halves of all of
    them take nearly as much room as the model.

    Attributes:
        outputs: (m,), squared gradients at each output, summed over the tokens of a sample; of a table, of its columns.
        mean: (n,), of the inputs of a layer, tokens weighted by their gradients.
        half: of their covariance.
        uses: (m,), of a table: the share of each of its rows in the squared gradients.
        tokens: how many tokens of one weight would say as much of the covariance.
    """

    outputs: Tensor
    mean: Tensor | None = None
    half: Tensor | None = None
    uses: Tensor | None = None
    tokens: float = 0.0

    @property
    def covariance(self) -> Tensor | None:
        """Of the inputs of a layer, (n, n), made anew."""
        return None if self.half is None else symmetric(self.half)


@dataclass(eq=False)
class SiteSums:
    """Sums over tokens, float64, but for matrices."""

    samples: int = 0
    weight: float = 0.0
    squared_weight: float = 0.0
    outputs: Tensor | None = None
    total: Tensor | None = None
    gram: Tensor | None = None
    """Its half."""
    uses: Tensor | None = None
    between: Tensor | None = None
    """Of the means of samples, as ``gram``; or such means themselves, (samples, n), where that takes less room."""
    together: Tensor | None = None
    """As ``outputs``, of the gradients that the tokens of a sample have in sum."""


@dataclass(eq=False)
class SensitivityCollector:
    """Hooks on the modules of these names; gradients start at the first of them, or at the first block."""

    model: PreTrainedModel
    names: Sequence[str]
    seed: int = 0
    passes: Passes = nullcontext
    starts: Sequence[int] = ()
    """How many samples come before each batch, and how many there are in all; without it no samples are kept apart."""
    sums: dict[str, SiteSums] = field(default_factory=dict)
    _batch: int = -1
    _samples: int = 0
    _seen: set[str] = field(default_factory=set)
    """Sites of which the samples of this batch have been counted: some are used often in one pass."""
    _mask: Tensor | None = None

    def run(self, number: int, batch: CalibrationBatch) -> None:
        """One forward and one backward pass."""
        device = next(self.model.parameters()).device
        self._mask = token_mask(batch, device)
        self._batch, self._samples = number, samples_of(batch)
        self._seen.clear()
        handles = [self.model.get_submodule(name).register_forward_hook(self._hook(name)) for name in self.names]
        handles += [block.register_forward_pre_hook(_start) for block in first_blocks(self.model)]
        try:
            with torch.enable_grad(), recomputing(self.model):
                with self.passes():
                    outputs = self.model(**to_device(batch.inputs, device))
                functional = random_functional(self.model, outputs, batch, batch_generator(self.seed, number))
                torch.autograd.backward(functional(outputs).sum())
        finally:
            for handle in handles:
                handle.remove()

    def state(self) -> dict[str, Tensor]:
        return named_sums("sites", self.sums)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        put_sums("sites", state, self.sums, SiteSums)

    def found(self) -> dict[str, Sensitivity]:
        """Of every site that the output depends on; uses up the sums. Raises DataError when no token came through."""
        if not self.sums:
            raise DataError("no calibration token reached the model: is the data set empty?")
        return {name: _sensitivity(self.sums.pop(name)) for name in self.names if name in self.sums}

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # of a block that is computed again
                return output
            output = _with_gradient(output)
            x = inputs[0].detach()
            add = partial(self._add, name, module, x)
            output.register_hook(add)  # type: ignore[no-untyped-call]
            return output

        return hook

    def _add(self, name: str, module: nn.Module, x: Tensor, gradient: Tensor) -> None:
        gradient = gradient.detach()
        sums = self.sums.setdefault(name, SiteSums())
        if isinstance(module, nn.Conv2d):
            x = patches(x.float(), module)
            gradient = gradient.flatten(2).mT
        masked = self._masks(gradient)
        g = self._real(gradient, gradient).float()
        squares = g.square()
        importance = squares.sum(1)
        power = importance.double().sum()
        if not torch.isfinite(power):
            raise NumericsError(
                f"layer {name!r} met NaN or Inf in its gradient in calibration batch {self._batch}. "
                "Check the checkpoint and the preprocessing of that batch."
            )
        again = name in self._seen
        if not again:
            self._seen.add(name)
            sums.samples += self._samples
        sums.outputs = accumulate(sums.outputs, g.new_ones(len(g)) @ squares)
        if has_positions(module):  # a table of which every sample uses every row
            sums.uses = accumulate(sums.uses, importance.double().view(gradient.shape[:2]).sum(0))
            return
        if isinstance(module, nn.Embedding):
            tokens = x[self._mask] if masked else x.reshape(-1)
            found = torch.zeros(module.num_embeddings, dtype=torch.float64, device=g.device)
            sums.uses = accumulate(sums.uses, found.index_add_(0, tokens, importance.double()))
            return
        x = self._real(x, gradient).float()
        weights = counted(importance)
        sums.weight += float(weights.double().sum())
        sums.squared_weight += float(weights.double().square().sum())
        # in float32, as the means of samples beside it: their difference must stay positive
        moments = Moments(x, weights)
        sums.total = accumulate(sums.total, moments.total())
        sums.gram = _added(sums.gram, moments.half().float())
        owners = self._owners(gradient, masked)
        totals, shares = (_by_owner(each, owners) for each in (x * weights[:, None], weights[:, None]))
        shares = shares.clamp_min(1e-30)
        sums.between = self._between(sums.between, totals * shares.rsqrt(), again=again)
        sums.together = accumulate(sums.together, _by_owner(g, owners).square().sum(0))

    def _between(self, total: Tensor | None, means: Tensor, *, again: bool) -> Tensor:
        """``total`` and the means (owners, n) of one batch: in their places among those of all, or their Gram.

        The latter where a layer is used ``again`` in a pass, or reads something that is not of the samples.
        """
        samples, n = self.starts[-1] if self.starts else 0, means.shape[1]
        if 0 < samples < n and len(means) == self._samples and not again:
            means = at_home(means)
            total = means.new_zeros(samples, n) if total is None else total
            if len(total) == samples:
                total[self.starts[self._batch] :][: len(means)] = means
                return total
        if total is not None and total.dim() == 2:
            total = half_gram(total)
        return _added(total, half_gram(means))

    def _masks(self, gradient: Tensor) -> bool:
        """Whether some tokens are padding; a pooler's outputs may be as wide as the texts are long."""
        return self._mask is not None and gradient.dim() == 3 and gradient.shape[:2] == self._mask.shape

    def _real(self, x: Tensor, gradient: Tensor) -> Tensor:
        """x (…, n) of all tokens that are no padding, (tokens, n)."""
        return x[self._mask] if self._masks(gradient) else x.reshape(-1, x.shape[-1])

    def _owners(self, gradient: Tensor, masked: bool) -> Tensor:
        """The sample of each token; each token is one of its own where the first dimension has no samples."""
        shape = gradient.shape[:-1]
        numbers = torch.arange(shape.numel(), device=gradient.device)
        choices = masked and shape[0] % self._samples == 0  # several texts a sample
        if len(shape) == 1 or not (choices or shape[0] == self._samples):
            return numbers
        owners = numbers.view(shape) // (shape.numel() // self._samples)
        return owners[self._mask] if masked else owners.flatten()


def _added(total: Tensor | None, batch: Tensor) -> Tensor:
    """A sum in the type of what is added, in place."""
    batch = at_home(batch)
    return batch if total is None else total.add_(batch)


def counted(importance: Tensor) -> Tensor:
    """How much tokens of these squared gradients count, 1 on average."""
    return (importance / importance.mean().clamp_min(1e-30)).clamp(*WEIGHTS)


def _by_owner(rows: Tensor, owners: Tensor) -> Tensor:
    """Rows of a sample summed."""
    return rows.new_zeros(int(owners[-1]) + 1, rows.shape[1]).index_add_(0, owners, rows)


def patches(x: Tensor, module: nn.Conv2d) -> Tensor:
    """What each output of a convolution reads of images (batch, channels, height, width): (batch, outputs, n)."""
    padding: Any = module.padding
    if isinstance(padding, str):  # "valid" or "same", which torch keeps in numbers, too
        x, padding = F.pad(x, module._reversed_padding_repeated_twice), 0
    settings: Any = (module.kernel_size, module.dilation, padding, module.stride)
    return F.unfold(x, *settings).mT


def _start(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (_with_gradient(inputs[0]), *inputs[1:]) if inputs and isinstance(inputs[0], Tensor) else inputs


def _with_gradient(output: Tensor) -> Tensor:
    """Gradients start here where they did not before; a model may change this in place, which it may not in a leaf."""
    return output if output.requires_grad else output.requires_grad_().clone()


def _sensitivity(sums: SiteSums) -> Sensitivity:
    assert sums.outputs is not None
    outputs = sums.outputs / sums.samples
    if sums.uses is not None:
        return Sensitivity(outputs, uses=sums.uses / sums.uses.sum().clamp_min(1e-300))
    assert sums.total is not None
    assert sums.gram is not None
    mean = sums.total / sums.weight
    half = _centered(sums.gram, sums.weight, mean)
    outputs, half = joined(sums, mean, outputs, half)
    return Sensitivity(outputs, mean, half, tokens=sums.weight**2 / sums.squared_weight)


def _centered(gram: Tensor, weight: float, mean: Tensor) -> Tensor:
    """The half of a covariance, from that of a Gram, in its place."""
    for start, rows in blocks(gram.div_(weight)):
        rows.sub_(torch.outer(mean[start : start + len(rows)], mean[start:]).to(gram.dtype))
    return gram


def joined(sums: SiteSums, mean: Tensor, outputs: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Both for errors that the tokens of a sample share as well as for those that they do not.

    What differs between tokens counts by the squares of their gradients, and what all of a sample have in common by the
    square of the sum of its gradients: nothing at a key, which shifts all scores alike, ten times as much at a value.
    ``half``, of the covariance, is changed in place.
    """
    assert sums.between is not None
    assert sums.together is not None
    between = half_gram(sums.between) if sums.between.dim() == 2 else sums.between
    between = _centered(between, sums.weight, mean)
    together = sums.together / sums.samples
    ratio = float(together.sum() / outputs.sum().clamp_min(1e-300))
    common = _trace(between)
    own = max(_trace(half) - common, 0.0)
    shared = (own * outputs + common * together) / max(own + ratio * common, 1e-300)
    return shared, half.add_(between, alpha=ratio - 1)


def _trace(half: Tensor) -> float:
    return float(diagonal(half).double().sum().to(half.dtype))


def collect_sensitivity(
    model: PreTrainedModel,
    names: Sequence[str],
    batches: Sequence[CalibrationBatch],
    *,
    seed: int = 0,
    passes: Passes = nullcontext,
    course: Course = one_by_one,
    on_batch: OnBatch = lambda _samples: None,
) -> dict[str, Sensitivity]:
    """Input covariances and output sensitivities of the modules of these names, without labels.

    The batches are walked over once for each of the ``probes`` of the model's reading, with other directions each time.

    A linear layer has the curvature of ``collect_curvature``, of which the diagonal is kept. Far means are no concern:
    what is rounded here goes by covariances that are damped by far more than float32 loses. What the output does not
    depend on, such as a pooler where only the last hidden state is asked for, is left out.

    Raises:
        NumericsError: NaN or Inf; names the layer and the batch.
        DataError: no batch at all.
    """
    walks = list(batches) * reading_of(model).probes
    starts = [0, *accumulated(map(samples_of, walks))]
    collector = SensitivityCollector(model, names, seed, passes, starts)
    with frozen(model):
        course(collector, walks, on_batch)
    return collector.found()
