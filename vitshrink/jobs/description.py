"""The report of a job, built from what the job knows at its end."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink._version import __version__
from vitshrink.compression.allocation import Offer, Plan
from vitshrink.compression.layers import Factors
from vitshrink.compression.shrinking import Shrinking
from vitshrink.config.options import CompressConfig, quantized_bits
from vitshrink.data import Preprocessor
from vitshrink.data.opening import CalibrationData
from vitshrink.evaluation.measurement import Measurement
from vitshrink.models import cost
from vitshrink.models.example import example_inputs
from vitshrink.models.families import task_of
from vitshrink.recovery import Recovery
from vitshrink.report import Report, before_after, with_thumbnails
from vitshrink.runtime import processes
from vitshrink.runtime.observer import Job


def environment(device: torch.device) -> dict[str, Any]:
    """What a job ran on, and with; memory in bytes."""
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else str(device),
        "threads": torch.get_num_threads(),
        "peak_memory": cost.peak_memory_bytes(),
    } | ({"peak_device_memory": cost.peak_memory_bytes(device)} if on_gpu else {})


def latency_entries(timed: Sequence[Mapping[str, cost.Latency]]) -> dict[str, Any]:
    """Plain data of the first batch size, and under ``others`` those of the others."""
    first, *others = [{role: timing.to_dict() for role, timing in each.items()} for each in timed]
    return first | ({"others": others} if others else {})


@dataclass(frozen=True, eq=False)
class Description:
    """What stays the same in the reports of all sizes of a job."""

    config: CompressConfig
    dense: PreTrainedModel
    units: Sequence[Offer]
    allocation: str
    compensation: str
    calibration: CalibrationData | None
    preprocessing: Mapping[str, Any] | None

    @classmethod
    def of(cls, shrinking: Shrinking, calibration: CalibrationData | None, preprocessor: Preprocessor | None) -> Self:
        """What the reports of all sizes of ``shrinking`` have in common."""
        return cls(
            shrinking.choices.config,
            shrinking.dense,
            shrinking.units,
            shrinking.allocated_by,
            shrinking.choices.compensation,
            calibration,
            preprocessor.description if preprocessor else None,
        )

    def planned(self, factors: Factors, plan: Plan, job: Job) -> Report:
        """The report of a dry run: sizes, and nothing that only a written model has."""
        total = cost.parameters(self.dense)
        before, after = self._layer_costs(plan)
        return self._report(
            self.layers(factors, plan), plan, job, parameters=before_after(total, total - before + after)
        )

    def layers(self, factors: Factors, plan: Plan) -> list[dict[str, Any]]:
        """What became of each target: all that a report needs to know of the factors."""
        return [self._layer(unit, plan[unit.name], factors) for unit in self.units]

    def written(
        self,
        layers: list[dict[str, Any]],
        plan: Plan,
        job: Job,
        model: PreTrainedModel,
        nbytes: tuple[int, int],
        measurement: Measurement | None,
        recovery: Recovery | None = None,
    ) -> Report:
        """The report of a finished model; ``nbytes`` are those of the stored weights before and after."""
        dense, inputs = self.dense, example_inputs(self.dense)
        with job.stage("cost", "Measuring cost"):
            macs = before_after(cost.macs(dense, inputs), cost.macs(model, inputs))
            memory = before_after(cost.memory_bytes(dense), cost.memory_bytes(model))
            timed = processes.by_main(
                lambda: cost.latency_by_batch_size(
                    {"dense": dense, "compressed": model},
                    lambda size: example_inputs(dense, size),
                    self.config.latency,
                    repeats=10,
                )
            )
        evaluation = None
        if measurement is not None:
            evaluation = measurement.to_dict(self.preprocessing)
            if self.config.thumbnails:
                evaluation["disagreements"] = with_thumbnails(evaluation["disagreements"], measurement.samples)
        return self._report(
            layers,
            plan,
            job,
            parameters=before_after(cost.parameters(dense), cost.parameters(model)),
            bytes=before_after(*nbytes),
            macs=macs,
            memory=memory,
            latency=latency_entries(timed),
            evaluation=evaluation,
            recovery=None if recovery is None else recovery.to_dict(),
            fitted_to=" ".join(self._fitted_to() if recovery is None else sorted(recovery.fitted_to)),
        )

    def _layer_costs(self, plan: Plan) -> tuple[int, int]:
        before = sum(unit.cost(None) for unit in self.units)
        return before, sum(unit.cost(plan[unit.name]) for unit in self.units)

    def _fitted_to(self) -> list[str]:
        return [] if self.calibration is None else sorted(self.calibration.samples.marks)

    def _report(self, layers: list[dict[str, Any]], plan: Plan, job: Job, **measured: Any) -> Report:
        return Report(
            vitshrink=__version__,
            model=self.config.model,
            task=task_of(self.dense),
            method=self.config.method,
            allocation=self.allocation,
            compensation=self.compensation,
            quantization=quantization_of(self.config.quantize, self.config.activations),
            layers_parameters=before_after(*self._layer_costs(plan)),
            layers=list(layers),
            calibration=self._calibration(),
            timings=dict(job.timings),
            environment=environment(next(self.dense.parameters()).device),
            recipe=self.config.to_dict(),
            command=self.config.command(),
            warnings=list(job.warnings),
            **measured,
        )

    def _layer(self, unit: Offer, rank: int | None, factors: Factors) -> dict[str, Any]:
        return {
            "name": unit.name,
            "shape": list(unit.shape),
            "rank": rank,
            "parameters": unit.cost(rank),
            "relative_error": 0.0 if rank is None else _relative_error(factors.layers[unit.name].loss, rank),
            "reason": self._reason(unit, factors) if rank is None else None,
        }

    def _reason(self, unit: Offer, factors: Factors) -> str:
        return factors.failures.get(unit.name) or (
            "this rank would not make the layer smaller"
            if self.config.rank is not None
            else "no smaller rank keeps the variance asked for"
            if self.config.explained_variance is not None
            else "the plan spends its parameters best on the whole layer"
        )

    def _calibration(self) -> dict[str, Any] | None:
        if self.calibration is None:
            return None
        return {
            "source": self.calibration.samples.source,
            "samples": len(self.calibration.samples),
            "tokens": self.calibration.tokens,
            "seed": self.config.seed,
            "fingerprint": self.calibration.samples.fingerprint(),
            "preprocessing": self.preprocessing,
        }


def quantization_of(weights: str | None, activations: str | None) -> dict[str, Any] | None:
    """What a report says of quantised weights."""
    return None if weights is None else {"weights": weights, "activations": quantized_bits(weights, activations)[1]}


def _relative_error(loss: Tensor, rank: int) -> float:
    """Square root of the share of the loss, in the method's own metric, that is left at this rank."""
    return float((loss[rank] / loss[0]).sqrt()) if loss[0] > 0 else 0.0
