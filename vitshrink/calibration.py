"""Run calibration batches through a model and keep the statistics that a method asked for."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from vitshrink.errors import DataError, NumericsError
from vitshrink.methods import Needs
from vitshrink.stats import LinearStats, gram_of


class CalibrationTarget(Protocol):
    """What calibration has to know of a layer: its name, its (m, n), and which layers read the same input."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def input_group(self) -> str: ...


class CalibrationBatch(Protocol):
    """Model inputs, and which tokens are real: (batch, tokens) bool, or None where all are."""

    inputs: dict[str, Tensor]
    mask: Tensor | None


@dataclass
class InputSums:
    """Running float64 sums over the tokens that one group of layers reads; x is (tokens, n)."""

    with_gram: bool
    tokens: int = 0
    total: Tensor | None = None
    absolute: Tensor | None = None
    largest: Tensor | None = None
    gram: Tensor | None = None

    def add(self, x: Tensor) -> None:
        magnitude = x.abs()
        self.tokens += x.shape[0]
        self.total = accumulate(self.total, x.sum(0))
        self.absolute = accumulate(self.absolute, magnitude.sum(0))
        peak = magnitude.amax(0).double()
        self.largest = peak if self.largest is None else torch.maximum(self.largest, peak)
        if self.with_gram:
            self.gram = accumulate(self.gram, gram_of(x))

    def stats(self, output_gram: Tensor | None) -> LinearStats:
        assert self.total is not None
        assert self.absolute is not None
        assert self.largest is not None
        return LinearStats(
            tokens=self.tokens,
            mean=self.total / self.tokens,
            abs_mean=self.absolute / self.tokens,
            abs_max=self.largest,
            gram=None if self.gram is None else self.gram / self.tokens,
            output_gram=None if output_gram is None else output_gram / self.tokens,
        )


def accumulate(total: Tensor | None, batch: Tensor) -> Tensor:
    """Add a float32 sum over one batch to the float64 sum over all."""
    return batch.double() if total is None else total.add_(batch)


@dataclass
class StatisticsCollector:
    """Hooks on the target layers; removes only its own hooks when the ``with`` block ends.

    Layers that read the same tensor (query, key, value) share one set of sums. A layer with fewer outputs than inputs
    is observed at its output, where the Gram is smaller: E[(Wx)(Wx)ᵀ] is all that its factorisation needs.
    """

    model: nn.Module
    targets: Sequence[CalibrationTarget]
    needs: Needs
    full_gram: bool = False
    mask: Tensor | None = None
    batch: int = -1
    _inputs: dict[str, InputSums] = field(default_factory=dict)
    _outputs: dict[str, Tensor] = field(default_factory=dict)
    _handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)

    def __enter__(self) -> Self:
        for target in self.targets:
            module = self.model.get_submodule(target.name)
            if target.input_group not in self._inputs:
                gram = self.needs is Needs.COVARIANCE and not self._observed_at_output(target)
                self._inputs[target.input_group] = InputSums(with_gram=gram)
                self._handles.append(module.register_forward_pre_hook(self._input_hook(target)))
            if self.needs is Needs.COVARIANCE and self._observed_at_output(target):
                self._handles.append(module.register_forward_hook(self._output_hook(target)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def next_batch(self, mask: Tensor | None) -> None:
        """Announce the batch that is about to run and its mask."""
        self.mask = mask
        self.batch += 1

    def statistics(self) -> dict[str, LinearStats]:
        """The statistics of every target. Raises DataError when nothing came through a layer."""
        found: dict[str, LinearStats] = {}
        for target in self.targets:
            sums = self._inputs[target.input_group]
            if not sums.tokens:
                raise DataError(f"no calibration token reached layer {target.name!r}: is the data set empty?")
            found[target.name] = sums.stats(self._outputs.get(target.name))
        return found

    def _observed_at_output(self, target: CalibrationTarget) -> bool:
        return not self.full_gram and target.shape[0] < target.shape[1]

    def _tokens(self, activation: Tensor) -> Tensor:
        """(batch, tokens, k) without the padding, as (tokens, k) float32."""
        activation = activation.detach()
        flat = activation[self.mask] if self.mask is not None else activation.reshape(-1, activation.shape[-1])
        return flat.float()

    def _check(self, name: str, sums: Tensor | None, side: str) -> None:
        if sums is not None and not torch.isfinite(sums).all():
            raise NumericsError(
                f"layer {name!r} met NaN or Inf at its {side} in calibration batch {self.batch}. "
                "Check the checkpoint and the preprocessing of that batch."
            )

    def _input_hook(self, target: CalibrationTarget) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums = self._inputs[target.input_group]
            sums.add(self._tokens(inputs[0]))
            self._check(target.name, sums.total, "input")

        return hook

    def _output_hook(self, target: CalibrationTarget) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            y = self._tokens(output)
            if isinstance(module.bias, Tensor):
                y = y - module.bias
            self._outputs[target.name] = accumulate(self._outputs.get(target.name), gram_of(y))
            self._check(target.name, self._outputs[target.name], "output")

        return hook


@torch.no_grad()
def collect(
    model: nn.Module,
    targets: Sequence[CalibrationTarget],
    batches: Iterable[CalibrationBatch],
    needs: Needs,
    *,
    on_batch: Callable[[int], None] = lambda _samples: None,
) -> dict[str, LinearStats]:
    """Statistics of every target over all batches, one forward pass each.

    Args:
        on_batch: called with the number of samples after each batch.

    Raises:
        NumericsError: NaN or Inf in an activation; names the layer and the batch.
        DataError: no batch at all.
    """
    device = next(model.parameters()).device
    with StatisticsCollector(model, targets, needs) as collector:
        for batch in batches:
            mask = None if batch.mask is None else batch.mask.to(device)
            collector.next_batch(mask)
            model(**to_device(batch.inputs, device))
            on_batch(next(iter(batch.inputs.values())).shape[0])
        return collector.statistics()


def to_device(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The model inputs of a batch on ``device``."""
    return {name: tensor.to(device) for name, tensor in inputs.items()}
