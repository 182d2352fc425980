"""Run calibration batches through a model and keep the statistics that a method asked for."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from vitshrink.errors import DataError, NumericsError
from vitshrink.runtime.modes import evaluating
from vitshrink.runtime.offloading import at_home
from vitshrink.statistics.needs import Needs
from vitshrink.statistics.stats import LinearStats, Moments


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


class Collector(Protocol):
    """Sums that grow with every batch. What is in ``state`` adds up over disjoint batches, but for ``largest``."""

    def run(self, number: int, batch: CalibrationBatch) -> None:
        """Run the model on a batch, which is the one of this number in the whole of the data."""

    def state(self) -> dict[str, Tensor]:
        """All sums so far, by name."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over the sums of ``state`` in place of those there are."""


OnBatch = Callable[[int], None]
"""Called with the number of samples after each batch."""

Course = Callable[[Collector, Sequence[CalibrationBatch], OnBatch], None]
"""How the batches are gone through, so that in the end the sums are those of all."""


def one_by_one(collector: Collector, batches: Iterable[CalibrationBatch], on_batch: OnBatch) -> None:
    """All batches in their order."""
    for number, batch in enumerate(batches):
        collector.run(number, batch)
        on_batch(samples_of(batch))


Given = TypeVar("Given", bound=CalibrationBatch)


def samples_of(batch: CalibrationBatch) -> int:
    return int(next(iter(batch.inputs.values())).shape[0])


def first_of(batches: Iterable[Given], samples: int | None) -> list[Given]:
    """As many of the batches as it takes for ``samples``; all, if it is None."""
    found: list[Given] = []
    for batch in batches:
        if samples is not None and sum(map(samples_of, found)) >= samples:
            break
        found.append(batch)
    return found


def named_sums(kind: str, sums: Mapping[str, Any]) -> dict[str, Tensor]:
    """``kind|label|field`` -> tensor of all sums in a mapping of dataclasses."""
    found = {}
    for label, entry in sums.items():
        for name in (each.name for each in fields(entry)):
            value = getattr(entry, name)
            if isinstance(value, Tensor):
                found[f"{kind}|{label}|{name}"] = value
            elif isinstance(value, int | float) and not isinstance(value, bool):
                found[f"{kind}|{label}|{name}"] = torch.tensor(value, dtype=torch.float64)
    return found


def put_sums(kind: str, state: Mapping[str, Tensor], sums: dict[str, Any], make: Callable[[], Any]) -> None:
    """The reverse of ``named_sums``; entries that are not there are made."""
    for key, value in state.items():
        of, label, name = key.split("|")
        if of == kind:
            entry = sums.setdefault(label, make())
            before = getattr(entry, name)
            setattr(entry, name, value if isinstance(before, Tensor | None) else type(before)(value.item()))


def real_tokens(activation: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, tokens, k) without the padding, as (tokens, k).

    ``mask`` (batch, tokens) is passed over where rows are no tokens of texts: embeddings of relative positions, say.
    """
    activation = activation.detach()
    if mask is None or activation.shape[:-1] != mask.shape:
        return activation.reshape(-1, activation.shape[-1])
    return activation[mask.to(activation.device)]


@dataclass(eq=False)
class InputSums:
    """Running float64 sums over the tokens that one group of layers reads; x is (tokens, n)."""

    with_gram: bool
    tokens: int = 0
    total: Tensor | None = None
    absolute: Tensor | None = None
    largest: Tensor | None = None
    gram: Tensor | None = None

    def add(self, x: Tensor) -> None:
        magnitude, moments = x.abs(), Moments(x)
        self.tokens += x.shape[0]
        self.total = accumulate(self.total, moments.total())
        self.absolute = accumulate(self.absolute, magnitude.sum(0))
        peak = at_home(magnitude.amax(0).double())
        self.largest = peak if self.largest is None else torch.maximum(self.largest, peak)
        if self.with_gram:
            self.gram = accumulate(self.gram, moments.gram())

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


@dataclass(eq=False)
class OutputSums:
    """The running float64 sum of (Wx)(Wx)ᵀ, (m, m), of one layer."""

    gram: Tensor | None = None


def accumulate(total: Tensor | None, batch: Tensor) -> Tensor:
    """Add a float32 sum over one batch to the float64 sum over all."""
    batch = at_home(batch)
    return batch.double() if total is None else total.add_(batch)


@dataclass(eq=False)
class StatisticsCollector:
    """Hooks on the target layers; removes only its own hooks when the ``with`` block ends.

    Layers that read the same tensor (query, key, value) share one set of sums. A layer with fewer outputs than inputs
    is observed at its output, where the Gram is smaller: E[(Wx)(Wx)ᵀ] is all that its factorization needs.
    """

    model: nn.Module
    targets: Sequence[CalibrationTarget]
    needs: Needs
    full_gram: bool = False
    mask: Tensor | None = None
    batch: int = -1
    _inputs: dict[str, InputSums] = field(default_factory=dict)
    _outputs: dict[str, OutputSums] = field(default_factory=dict)
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

    def next_batch(self, mask: Tensor | None, number: int) -> None:
        """Announce the batch that is about to run, and its mask."""
        self.mask = mask
        self.batch = number

    @torch.no_grad()
    def run(self, number: int, batch: CalibrationBatch) -> None:
        """One forward pass."""
        device = next(self.model.parameters()).device
        self.next_batch(token_mask(batch, device), number)
        self.model(**to_device(batch.inputs, device))

    def state(self) -> dict[str, Tensor]:
        return named_sums("inputs", self._inputs) | named_sums("outputs", self._outputs)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        put_sums("inputs", state, self._inputs, lambda: InputSums(with_gram=False))
        put_sums("outputs", state, self._outputs, OutputSums)

    def statistics(self) -> dict[str, LinearStats]:
        """The statistics of every target. Raises DataError when nothing came through a layer."""
        found: dict[str, LinearStats] = {}
        for target in self.targets:
            sums = self._inputs[target.input_group]
            if not sums.tokens:
                raise DataError(f"no calibration token reached layer {target.name!r}: is the data set empty?")
            output = self._outputs.get(target.name)
            found[target.name] = sums.stats(None if output is None else output.gram)
        return found

    def _observed_at_output(self, target: CalibrationTarget) -> bool:
        return not self.full_gram and target.shape[0] < target.shape[1]

    def _check(self, name: str, sums: Tensor | None, side: str) -> None:
        if sums is not None and not torch.isfinite(sums).all():
            raise NumericsError(
                f"layer {name!r} met NaN or Inf at its {side} in calibration batch {self.batch}. "
                "Check the checkpoint and the preprocessing of that batch."
            )

    def _input_hook(self, target: CalibrationTarget) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums = self._inputs[target.input_group]
            sums.add(real_tokens(inputs[0], self.mask).float())
            self._check(target.name, sums.total, "input")

        return hook

    def _output_hook(self, target: CalibrationTarget) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            moments = Moments(real_tokens(inputs[0], self.mask).float())
            if moments.shift is not None and isinstance(module, nn.Linear):
                moments = moments.through(module.weight.float())
            else:
                y = real_tokens(output, self.mask).float()
                moments = Moments(y - module.bias if isinstance(module.bias, Tensor) else y)
            sums = self._outputs.setdefault(target.name, OutputSums())
            sums.gram = accumulate(sums.gram, moments.gram())
            self._check(target.name, sums.gram, "output")

        return hook


def collect(
    model: nn.Module,
    targets: Sequence[CalibrationTarget],
    batches: Sequence[CalibrationBatch],
    needs: Needs,
    *,
    course: Course = one_by_one,
    on_batch: OnBatch = lambda _samples: None,
) -> dict[str, LinearStats]:
    """Statistics of every target over all batches, one forward pass each.

    Raises:
        NumericsError: NaN or Inf in an activation; names the layer and the batch.
        DataError: no batch at all.
    """
    with evaluating(model), StatisticsCollector(model, targets, needs) as collector:
        course(collector, batches, on_batch)
        return collector.statistics()


def token_mask(batch: CalibrationBatch, device: torch.device) -> Tensor | None:
    """Which tokens are real, (sequences, tokens) as the blocks read them: a sample of several choices has as many."""
    return None if batch.mask is None else batch.mask.to(device).flatten(0, -2)


def to_device(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The model inputs of a batch on ``device``."""
    return {name: tensor.to(device) for name, tensor in inputs.items()}
