"""Work on the calibration data: shared out among the processes of a job, and saved on the way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.runtime import processes
from vitshrink.runtime.state import Progress
from vitshrink.statistics.calibration import CalibrationBatch, Collector, OnBatch, samples_of
from vitshrink.statistics.effects import Components, Effects, component_effects, losses, shortfall
from vitshrink.statistics.reference import Reference


@dataclass(frozen=True)
class Shared:
    """How a collector goes through the batches: from where an interrupted run was, and each process its share."""

    progress: Progress
    step: str
    device: torch.device

    def __call__(self, collector: Collector, batches: Sequence[CalibrationBatch], on_batch: OnBatch) -> None:
        """Raises OtherProcessError where another process has failed."""
        mine = processes.block(len(batches))
        kept = self.progress.sums(self.step)
        done, saved = min(kept, default=0), max(kept, default=0)
        collector.restore(kept.get(done, {}))
        on_batch(sum(samples_of(batches[number]) for number in mine[:done]))
        with processes.together():
            for number in mine[done:]:
                collector.run(number, batches[number])
                on_batch(samples_of(batches[number]) * processes.count())
                collector.restore(kept.get(number + 1, {}))  # the rest has caught up with them
                if number + 1 >= saved:
                    self.progress.keep_sums(self.step, number + 1, collector.state)
        self.progress.finish_sums(self.step)
        if processes.started():
            collector.restore(self._added_up(collector.state()))

    def _added_up(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of all processes; one that had no batch has none of its own."""
        kinds = processes.from_main({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()})
        found = {}
        for name, (shape, dtype) in kinds.items():
            device = self.device if shape else "cpu"
            mine = state.get(name, torch.zeros(shape, dtype=dtype, device=device))
            found[name] = processes.total(mine, largest=name.endswith("|largest"))
        return found


def shared_effects(
    model: PreTrainedModel,
    components: Mapping[str, Components],
    batches: Sequence[CalibrationBatch],
    **rest: Any,
) -> Effects:
    """``component_effects``, to which each process contributes those of its batches; all of them get all."""
    if not processes.started():
        return component_effects(model, components, batches, **rest)
    mine = processes.block(len(batches))
    with processes.together():
        own = component_effects(model, components, batches[mine.start : mine.stop], first=mine.start, **rest)
    device = next(model.parameters()).device
    layers = {name: _joined(effects, device) for name, effects in own.layers.items()}
    shifts = {name: _joined(effects, device) for name, effects in own.shifts.items()}
    missing = None if own.missing is None else _joined(own.missing, device)
    return replace(own, layers=layers, shifts=shifts, missing=missing)


def shared_shortfall(
    model: PreTrainedModel, reference: Reference, batches: Sequence[CalibrationBatch], **rest: Any
) -> Tensor:
    """``shortfall``, to which each process contributes that of its batches; all of them get all."""
    return _shared(shortfall, model, reference, batches, **rest)


def shared_losses(
    model: PreTrainedModel, reference: Reference, batches: Sequence[CalibrationBatch], **rest: Any
) -> Tensor:
    """``losses``, to which each process contributes those of its batches; all of them get all."""
    return _shared(losses, model, reference, batches, **rest)


def _shared(
    found: Callable[..., Tensor],
    model: PreTrainedModel,
    reference: Reference,
    batches: Sequence[CalibrationBatch],
    **rest: Any,
) -> Tensor:
    if not processes.started():
        return found(model, reference, batches, **rest)
    mine = processes.block(len(batches))
    with processes.together():
        own = found(model, reference, batches[mine.start : mine.stop], first=mine.start, **rest)
    return _joined(own, next(model.parameters()).device)


def _joined(rows: Tensor, device: torch.device) -> Tensor:
    return torch.cat(processes.gather(rows.cpu())).to(device)
