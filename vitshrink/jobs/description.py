"""The report of a job, built from what the job knows at its end."""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from vitshrink._version import __version__
from vitshrink.compression.candidates import Candidate, Form, Offer, Plan
from vitshrink.compression.findings import Findings
from vitshrink.compression.forms.narrow import NarrowAttention, NarrowMlp
from vitshrink.compression.pace import INTEGERS, Paced
from vitshrink.compression.rounding import Metric
from vitshrink.compression.shrinking import Shrinking
from vitshrink.config.options import CompressConfig, quantized_bits
from vitshrink.data import Preprocessor
from vitshrink.data.opening import CalibrationData
from vitshrink.evaluation.measurement import Measurement
from vitshrink.models import cost
from vitshrink.models.example import example_inputs
from vitshrink.models.runtimes import find_runtime, running
from vitshrink.models.structures import structure_of
from vitshrink.models.structures.merging import MergedTokens
from vitshrink.models.targets import blocks_of, named_blocks
from vitshrink.models.tasks import task_of
from vitshrink.recovery import Recovery
from vitshrink.report import Report, before_after, with_thumbnails
from vitshrink.report.costs import LatencyRecord, LatencyTarget, Timings
from vitshrink.report.making import (
    CODED,
    BlockError,
    BlockTokens,
    CalibrationRecord,
    Environment,
    LayerEntry,
    QuantizationRecord,
    RecoveryRecord,
    RecoveryStep,
)
from vitshrink.runtime import processes
from vitshrink.runtime.modes import threads
from vitshrink.runtime.observer import Job


def environment(device: torch.device) -> Environment:
    """What a job ran on, and with."""
    on_gpu = device.type == "cuda"
    return Environment(
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        platform=platform.platform(),
        device=torch.cuda.get_device_name(device) if on_gpu else str(device),
        threads=torch.get_num_threads(),
        peak_memory=cost.peak_memory_bytes(),
        peak_device_memory=cost.peak_memory_bytes(device) if on_gpu else None,
    )


def latency_record(timed: Sequence[Mapping[str, cost.Latency]]) -> LatencyRecord | None:
    """The times by batch size; None where there are none."""
    if not timed:
        return None
    first, *others = timed
    return LatencyRecord(**first, others=tuple(Timings(**each) for each in others) or None)


def latency_target(paced: Paced) -> LatencyTarget:
    """What a report says of a budget of time."""
    return LatencyTarget(
        asked=paced.asked,
        dense=paced.dense,
        compressed=paced.taken,
        runtime=paced.clock.runtime.described,
        batch_size=paced.clock.batch_size,
        threads=paced.clock.counted,
        levers=paced.levers,
    )


def tokens_by_block(model: PreTrainedModel) -> tuple[BlockTokens, ...] | None:
    """What the blocks of a model read and keep, where they merge tokens; None where none does."""
    specs = {index: structure_of(block) for index, block in enumerate(blocks_of(model))}
    merged = {index: spec for index, spec in specs.items() if isinstance(spec, MergedTokens)}
    if not merged:
        return None
    names = list(named_blocks(model))
    macs = cost.macs_of_modules(model, example_inputs(model), [names[index] for index in merged])
    return tuple(
        BlockTokens(block=index, tokens=spec.tokens, kept=spec.kept, macs=macs[names[index]])
        for index, spec in merged.items()
    )


def recovery_record(recovery: Recovery) -> RecoveryRecord:
    """What a report says of the training."""
    return RecoveryRecord(
        objective=recovery.objective,
        before=recovery.before,
        after=recovery.after,
        best_step=recovery.best_step,
        ended=recovery.ended,
        samples=recovery.samples,
        held_out=recovery.held_out,
        seconds=recovery.seconds,
        settings=recovery.settings,
        history=tuple(RecoveryStep(**entry) for entry in recovery.history),
        blocks=tuple(BlockError(int(entry["block"]), entry["before"], entry["after"]) for entry in recovery.blocks),
        familiar=recovery.familiar,
    )


@dataclass(frozen=True, eq=False)
class Description:
    """What stays the same in the reports of all sizes of a job."""

    config: CompressConfig
    dense: PreTrainedModel
    offers: Sequence[Offer]
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
            shrinking.offers,
            shrinking.allocated_by,
            shrinking.choices.compensation,
            calibration,
            preprocessor.description if preprocessor else None,
        )

    def planned(self, findings: Findings, plan: Plan, job: Job) -> Report:
        """The report of a dry run: sizes, and nothing that only a written model has."""
        total = cost.parameters(self.dense)
        before, after = self._layer_costs(plan)
        return self._report(
            self.layers(findings, plan),
            plan,
            job,
            parameters=before_after(total, total - before + after),
            quantization=self._quantization(None),
        )

    def layers(self, findings: Findings, plan: Plan) -> tuple[LayerEntry, ...]:
        """What became of each site that the plan names: all that a report needs to know of the findings."""
        return tuple(self._layer(offer, plan[offer.name], findings) for offer in self.offers if offer.name in plan)

    def written(
        self,
        layers: tuple[LayerEntry, ...],
        plan: Plan,
        job: Job,
        model: PreTrainedModel,
        nbytes: tuple[int, int],
        measurement: Measurement | None,
        recovery: Recovery | None = None,
        paced: Paced | None = None,
    ) -> Report:
        """The report of a finished model; ``nbytes`` are those of the stored weights before and after."""
        dense, inputs = self.dense, example_inputs(self.dense)
        with job.stage("cost", "Measuring cost"):
            macs = before_after(cost.macs(dense, inputs), cost.macs(model, inputs))
            memory = before_after(cost.memory_bytes(dense), cost.memory_bytes(model))
            timed = processes.by_main(partial(self._timed, model, paced))
        evaluation = None
        if measurement is not None:
            evaluation = measurement.record(self.preprocessing)
            if self.config.thumbnails:
                shown = with_thumbnails(evaluation.disagreements, measurement.samples)
                evaluation = replace(evaluation, disagreements=shown)
        return self._report(
            layers,
            plan,
            job,
            parameters=before_after(cost.parameters(dense), cost.parameters(model)),
            bytes=before_after(*nbytes),
            macs=macs,
            tokens=tokens_by_block(model),
            memory=memory,
            latency=latency_record(timed),
            target_latency=None if paced is None else latency_target(paced),
            quantization=self._quantization(paced),
            evaluation=evaluation,
            recovery=None if recovery is None else recovery_record(recovery),
            fitted_to=" ".join(self._fitted_to() if recovery is None else sorted(recovery.fitted_to)),
        )

    def _timed(self, model: PreTrainedModel, paced: Paced | None) -> list[dict[str, cost.Latency]]:
        """Both models in turn, in the runtime of the job, where they may be already."""
        config, models = self.config, {"dense": self.dense, "compressed": model}
        if config.offload:  # the time of copies says nothing of the model
            return []
        with threads(config.threads):
            ready: Mapping[str, nn.Module] = models
            if paced is not None:
                ready = paced.ready
            elif config.runtime is not None:
                runtime = find_runtime(config.runtime)
                ready = {name: running(each, runtime) for name, each in models.items()}
            first = () if config.latency_batch_size is None else (config.latency_batch_size,)
            sizes = dict.fromkeys((*first, *config.latency))
            return cost.latency_by_batch_size(ready, lambda size: example_inputs(self.dense, size), sizes, repeats=10)

    def _quantization(self, paced: Paced | None) -> QuantizationRecord | None:
        if paced is not None and INTEGERS in paced.levers:
            return QuantizationRecord("int8", "static")
        return quantization_of(self.config.rounded_to, self.config.activations)

    def _layer_costs(self, plan: Plan) -> tuple[int, int]:
        named = [offer for offer in self.offers if offer.name in plan]  # and not those within them, or around
        before = sum(offer.kept.cost.parameters for offer in named)
        return before, sum(plan[offer.name].cost.parameters for offer in named)

    def _fitted_to(self) -> list[str]:
        return [] if self.calibration is None else sorted(self.calibration.samples.marks)

    def _report(self, layers: tuple[LayerEntry, ...], plan: Plan, job: Job, **measured: Any) -> Report:
        return Report(
            vitshrink=__version__,
            model=self.config.model,
            task=task_of(self.dense),
            method=self.config.method,
            allocation=self.allocation,
            compensation=self.compensation,
            layers_parameters=before_after(*self._layer_costs(plan)),
            layers=layers,
            calibration=self._calibration(),
            timings=dict(job.timings),
            environment=environment(next(self.dense.parameters()).device),
            recipe=self.config.to_dict(),
            command=self.config.command(),
            warnings=tuple(job.warnings),
            **measured,
        )

    def _layer(self, offer: Offer, chosen: Candidate, findings: Findings) -> LayerEntry:
        form = chosen.form
        return LayerEntry(
            name=offer.name,
            shape=offer.site.shape,
            rank=None if form is None else form.rank,
            form=_form_named(form),
            bits=None if form is None else form.bits,
            parameters=chosen.cost.parameters,
            relative_error=0.0 if form is None else _relative_error(findings.layers[offer.name], chosen),
            reason=self._reason(offer, findings) if form is None else None,
        )

    def _reason(self, offer: Offer, findings: Findings) -> str:
        return findings.failures.get(offer.name) or (
            "this rank would not make the layer smaller"
            if self.config.rank is not None
            else "no smaller rank keeps the required variance"
            if self.config.explained_variance is not None
            else "the plan keeps this layer dense because that loses less"
        )

    def _calibration(self) -> CalibrationRecord | None:
        return (
            None if self.calibration is None else calibrated_on(self.calibration, self.config.seed, self.preprocessing)
        )


def calibrated_on(data: CalibrationData, seed: int, preprocessing: Mapping[str, Any] | None) -> CalibrationRecord:
    """What a report says of the samples that were learned from."""
    return CalibrationRecord(
        source=data.samples.source,
        samples=len(data.samples),
        tokens=data.tokens,
        seed=seed,
        fingerprint=data.samples.fingerprint(),
        preprocessing=preprocessing,
    )


def _form_named(form: Form | None) -> str | None:
    """As an entry has it; None where the rank says it, or that there is none."""
    if form is None or form.rank is not None:
        return None
    return form.label if form.bits is None else CODED


def quantization_of(weights: str | None, activations: str | None) -> QuantizationRecord | None:
    """What a report says of integer weights."""
    return None if weights is None else QuantizationRecord(weights, quantized_bits(weights, activations)[1])


def _relative_error(found: Any, chosen: Candidate) -> float | None:
    """Square root of the share of the loss that is left: of a rank in the method's own metric."""
    if isinstance(found, Metric):
        return None
    if isinstance(found, NarrowMlp | NarrowAttention):
        return math.sqrt(chosen.loss / found.whole) if found.whole > 0 else 0.0
    rank = None if chosen.form is None else chosen.form.rank
    if rank is not None:
        return float((found.loss[rank] / found.loss[0]).sqrt()) if found.loss[0] > 0 else 0.0
    whole = float((found.loss if found.measured is None else found.measured)[0])
    return math.sqrt(chosen.loss / whole) if whole > 0 else 0.0
