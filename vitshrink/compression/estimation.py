"""What a method learns of linear layers: statistics, nested factors, and what their components do to the output."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink._version import __version__
from vitshrink.compression.candidates import Plan
from vitshrink.compression.effort import Effort, Repairs, effort_of
from vitshrink.compression.findings import Findings, Measured, Rebuild
from vitshrink.compression.keeping import Cached, Memory, Step
from vitshrink.compression.repairs.bias import SHIFTING
from vitshrink.compression.repairs.stream import WRITERS
from vitshrink.config.options import CompressConfig
from vitshrink.data import Batch
from vitshrink.data.opening import CalibrationData
from vitshrink.errors import NumericsError
from vitshrink.methods import Factorization, LayerMethod
from vitshrink.models.families import passes_of, precision_for
from vitshrink.models.targets import Target, linear_of
from vitshrink.runtime import processes
from vitshrink.runtime.cache import Cache
from vitshrink.runtime.entries import from_process, laid_out, moved
from vitshrink.runtime.observer import Job
from vitshrink.runtime.offloading import device_of_passes
from vitshrink.runtime.paging import paged
from vitshrink.runtime.precision import Passes, resolve_precision
from vitshrink.runtime.state import Progress
from vitshrink.statistics.calibration import collect, first_of
from vitshrink.statistics.curvature import collect_curvature
from vitshrink.statistics.digests import data_digest, model_digest
from vitshrink.statistics.effects import Components, measured_loss
from vitshrink.statistics.importance import TokenWeights
from vitshrink.statistics.needs import Needs
from vitshrink.statistics.recomputing import is_large
from vitshrink.statistics.reference import DenseOutputs
from vitshrink.statistics.sharing import Shared, shared_effects, shared_losses
from vitshrink.statistics.stats import LinearStats

SHARES_MEASURED_AGAIN = (0.0, 0.5, 1.0)
"""Exponents of what components do in the compressed model; the rest is that of what was measured before."""

DENSE = "dense"
"""The step of a job that looks at the dense model only."""


def origin(dense: PreTrainedModel, layers: Sequence[str], calibration: CalibrationData | None) -> dict[str, Any]:
    """What all statistics of a dense model follow from, as the key of a cache says it."""
    return {
        "vitshrink": __version__,
        "torch": torch.__version__,
        "device": device_of_passes(dense).type,
        "model": model_digest(dense),
        "layers": list(layers),
        "data": None if calibration is None else data_digest(calibration.batches),
    }


@dataclass(frozen=True, eq=False)
class LayerEstimator:
    """The dense model, its calibration data, and what is asked of them.

    Attributes:
        measures: whether what components do to the output decides, rather than the method's own loss.
        full: the targets of which the whole of C is wanted, whatever their shape.
    """

    config: CompressConfig
    dense: PreTrainedModel
    targets: Sequence[Target]
    method: LayerMethod
    compensation: str
    measures: bool
    calibration: CalibrationData | None
    progress: Progress = field(default_factory=Progress)
    full: frozenset[str] = frozenset()
    _weighed: list[TokenWeights] = field(default_factory=list)
    """In the dense model, of the samples on which components are measured; one, once they are known."""

    def known(self, job: Job) -> dict[str, LinearStats]:
        """The statistics of the dense model."""
        return self._known(self._memory(job), job)

    def _known(self, memory: Memory, job: Job) -> dict[str, LinearStats]:
        stats = paged(memory.read(LinearStats, self.pages), self.pages)
        if not stats:
            stats = self._statistics(self.dense, {}, job, seed=self.config.seed, step=DENSE)
            memory.write(stats)
        return stats

    def learn(self, job: Job) -> Findings:
        """Calibrate on the dense model and factorize each target once; a rank is then a slice."""
        memory = self._memory(job)
        stats = self._known(memory, job)
        layers = paged(memory.read(Factorization, self.pages), self.pages)
        if layers:
            return Findings(layers, {}, stats)
        findings = self._factorize(stats, job)
        if kept := memory.read(Measured):
            return _with_measured(findings, kept)
        findings = self._measured(self.dense, findings, job)
        if not findings.failures:  # those are tried again, and reported again, by the next job
            memory.write(findings.layers)
            memory.write(_measured_of(findings))
        return findings

    def refine(
        self, before: Findings, plan: Plan, model: PreTrainedModel, rebuilt: Rebuild, job: Job, step: str = ""
    ) -> Findings:
        """Estimate the statistics again on ``model``, compressed by ``plan``, and factorize for those.

        What a layer must keep depends on what the others lost. The factors are those of the dense weights again. How
        much of its budget each layer gets follows from what its components do in the dense model, in the compressed
        one, or from the geometric mean of both: whichever gives the model that comes closest to the dense one.

        Nothing is gained by that where the model loses little: then they are those ``before``, and ``light``.
        """
        if (finished := self.resume(step, job)) is not None:
            return finished
        if self._is_light(model, job):
            return replace(before, light=True)
        memory = Step(self.progress, step)
        stats = memory.read(LinearStats)
        if not stats:
            dense = {
                name: linear_of(self.dense, name).weight.detach()
                for name, each in plan.items()
                if each.form is not None
            }
            again = self._statistics(model, dense, job, seed=self.config.seed + 1, step=step)
            averaged = ((name, before.stats[name].refined_by(again[name])) for name in again)
            stats = paged(averaged, self.pages)
            memory.write(stats)
        measured = self._measured(model, before, job)
        del model  # of which others will be made
        refined = self._factorize(stats, job)
        chosen = self._best_measured(refined, before, measured, rebuilt, job)
        chosen = replace(chosen, layers=laid_out(chosen.layers))
        if not refined.failures:
            memory.write(_measured_of(chosen))
        return chosen

    def _is_light(self, model: PreTrainedModel, job: Job) -> bool:
        """Whether a compressed model is so close to the dense one that it does not pay to learn again from it."""
        if not self.effort.light or self.calibration is None:
            return False
        with job.stage("weigh", "Measuring the compressed model"):
            return self.missing(model, self.effort.weighed) <= self.effort.light

    def resume(self, step: str, job: Job) -> Findings | None:
        """What an interrupted run of the job has kept of a step, if it had completed it."""
        memory = Step(self.progress, step)
        measured = memory.read(Measured) if self.measures else {}
        stats = memory.read(LinearStats) if measured or not self.measures else {}
        if not stats:
            return None
        return _with_measured(self._factorize(stats, job), measured)

    def kept(self, step: str) -> bool:
        """Whether an interrupted run of the job has completed a step."""
        return Step(self.progress, step).has(Measured if self.measures else LinearStats)

    def forget(self, step: str) -> None:
        """Keep nothing of a step that another one has overtaken."""
        Step(self.progress, step).forget()

    @property
    def passes(self) -> Passes:
        """The arithmetic of passes that gradients are taken through."""
        return passes_of(self.dense, self.config.precision)

    @property
    def effort(self) -> Effort:
        return effort_of(self.config)

    def repairs(self, findings: Findings) -> Repairs:
        """How much work goes into them."""
        return self.effort.light_repairs if findings.light else self.effort.repairs

    def to_repair(self, findings: Findings) -> Sequence[Batch]:
        """The batches that repairs are fitted to."""
        batches = () if self.calibration is None else self.calibration.batches
        return first_of(batches, self.repairs(findings).samples)

    def to_rescale(self, findings: Findings) -> Sequence[Batch]:
        """Those of them that gains and biases are fitted to."""
        return first_of(self.to_repair(findings), self.repairs(findings).rescaled)

    @cached_property
    def pages(self) -> Path | None:
        """Where statistics and factors lie, if they are large beside the model; in memory if it is None."""
        sizes = ((min(target.shape), sum(target.shape)) for target in self.targets)
        needed = 8 * sum(k * (2 * k + both) for k, both in sizes)
        return self.progress.prepared() if is_large(needed, self.dense) else None

    @cached_property
    def dense_outputs(self) -> DenseOutputs:
        """What every candidate and every repair is compared with."""
        return DenseOutputs(self.dense, self.passes)

    def mean(self, name: str, stats: Mapping[str, LinearStats]) -> Tensor:
        """What the bias of a layer absorbs of its inputs, (n,)."""
        layer = linear_of(self.dense, name)
        if self.compensation in SHIFTING and layer.bias is not None:
            return stats[name].mean
        return torch.zeros(layer.in_features, dtype=torch.float64, device=layer.weight.device)

    def factorize(self, name: str, weight: Tensor, stats: LinearStats | None) -> Factorization:
        """Nested factors of a weight (m, n) for the layer of this name."""
        centered = self.compensation != "none" and linear_of(self.dense, name).bias is not None
        return self.method.factorize(weight, stats, centered=centered, **self.config.options)

    def _memory(self, job: Job) -> Memory:
        """Where what follows from the dense model alone is kept."""
        if self.config.cache is None:
            return Step(self.progress, DENSE)
        with job.stage("cache", "Reading the cache"):
            device = next(self.dense.parameters()).device
            cache, key = Cache.at(self.config.cache, device, job.warn), self._key()
        choices = {
            "method": self.method.name,
            "options": dict(self.config.options),
            "compensation": self.compensation,
            "measured": [self.config.seed, self.effort.measured] if self.measures else None,
        }
        return Cached(cache, {LinearStats: key, Factorization: key | choices})

    def _key(self) -> dict[str, Any]:
        """All that the statistics of the dense model follow from."""
        curvature = self.method.needs is Needs.CURVATURE
        wanted = precision_for(self.dense, self.config.precision)
        return {
            **origin(self.dense, [target.name for target in self.targets], self.calibration),
            "needs": self.method.needs.value,
            "seed": self.config.seed if curvature else None,
            "probes": self.config.probes if curvature else None,
            "precision": resolve_precision(device_of_passes(self.dense), wanted) if curvature else None,
            **({"full": sorted(self.full)} if self.full else {}),
        }

    def _statistics(
        self, model: PreTrainedModel, dense: Mapping[str, Tensor], job: Job, *, seed: int, step: str
    ) -> dict[str, LinearStats]:
        """What the method needs to know of the targets of ``model``, of which those in ``dense`` are compressed."""
        needed = self.method.needs is not Needs.WEIGHTS or self.compensation in SHIFTING
        if self.calibration is None or not needed:
            return {}
        batches, samples = self.calibration.batches, len(self.calibration.samples)
        course = Shared(self.progress, step, next(self.dense.parameters()).device)
        with job.stage("calibrate", "Calibrating", samples) as advance:
            if self.method.needs is not Needs.CURVATURE:
                found = collect(model, self.targets, batches, self.method.needs, course=course, on_batch=advance)
            else:
                return collect_curvature(
                    model,
                    self.targets,
                    batches,
                    weights=dense,
                    seed=seed,
                    probes=self.config.probes,
                    passes=self.passes,
                    full=self.full,
                    course=course,
                    on_batch=advance,
                    keep=partial(paged, directory=self.pages),
                )
        return paged(found, self.pages)

    @torch.no_grad()
    def _measured(self, model: PreTrainedModel, findings: Findings, job: Job) -> Findings:
        """The findings with the loss of their layers measured in ``model``, where the allocation goes by that."""
        if not self.measures or self.calibration is None:
            return findings
        batches = first_of(self.calibration.batches, self.effort.measured)
        components = {
            name: Components(each.up, each.down, self.mean(name, findings.stats))
            for name, each in findings.layers.items()
        }
        seed, weights = self.config.seed + 3, TokenWeights(self._writers)
        with job.stage("measure", "Measuring components", sum(len(batch.keys) for batch in batches)) as advance:
            effects = shared_effects(
                model, components, batches, seed=seed, passes=self.passes, weights=weights, on_batch=advance
            )
        if model is self.dense:
            self._weighed[:] = [weights]
        return _with_measured(findings, {name: Measured(measured_loss(effects.layers[name])) for name in components})

    @property
    def _writers(self) -> list[str]:
        """The layers that may repair the residual stream."""
        return [target.name for target in self.targets if target.role in WRITERS]

    def token_weights(self) -> Sequence[Mapping[str, Tensor]]:
        """Of the tokens (batch, tokens) that layers which write to the residual stream read in the dense model.

        Of each of the batches of this process on which components are measured, by layer; from the pass that measured
        them, if that was one of this job.
        """
        if not self._weighed:
            assert self.calibration is not None
            batches = first_of(self.calibration.batches, self.effort.measured)
            weights, seed = TokenWeights(self._writers), self.config.seed + 3
            shared_effects(self.dense, {}, batches, seed=seed, passes=self.passes, weights=weights)
            self._weighed.append(weights)
        return self._weighed[0].found

    def _best_measured(
        self, refined: Findings, before: Findings, again: Findings, rebuilt: Rebuild, job: Job
    ) -> Findings:
        """``refined``, with the measured losses that spend the budget best: those ``before``, ``again``, or between.

        What is removed from a compressed model tells little of what it did there, and after a light cut misleads; what
        a deep cut has left works otherwise than in the dense model.
        """
        if not self.measures or self.calibration is None:
            return refined
        candidates = []
        with job.stage("choose", "Choosing the loss for the allocation", len(SHARES_MEASURED_AGAIN)) as advance:
            for share in SHARES_MEASURED_AGAIN:
                layers = {
                    name: each.measured_between(before.layers[name], again.layers[name], share)
                    if name in before.layers
                    else each
                    for name, each in refined.layers.items()
                }
                candidate = replace(refined, layers=layers)
                candidates.append((self.missing(rebuilt(candidate)), candidate))  # one model at a time
                advance(1)
        return min(candidates, key=lambda each: each[0])[1]

    @torch.no_grad()
    def missing(self, model: PreTrainedModel, samples: int | None = None) -> float:
        """What a compressed model loses on some samples, as a share of what a constant answer would lose."""
        assert self.calibration is not None
        batches = first_of(self.calibration.batches, samples or self.effort.measured)
        seed = self.config.seed + 4
        lost, spread = shared_losses(model, self.dense_outputs, batches, seed=seed, passes=self.passes).sum(0).tolist()
        return lost / spread if spread else 0.0

    def _factorize(self, stats: Mapping[str, LinearStats], job: Job) -> Findings:
        """Nested factors of every target; one whose decomposition fails is left out, kept as it is and reported.

        Several processes share the layers out, and all of them get all factors.
        """
        owners = processes.owners([math.prod(target.shape) * min(target.shape) for target in self.targets])
        with job.stage("factorize", "Factorizing", len(self.targets)) as advance:
            with processes.together():
                own = [target for target, owner in zip(self.targets, owners, strict=True) if owner == processes.rank()]
                mine = self._factorize_share(own, stats, advance)
            findings = Findings({}, {}, stats)
            failures = {name: why for each in processes.gather(mine[1]) for name, why in each.items()}
            for target, owner in zip(self.targets, owners, strict=True):
                if target.name in failures:
                    findings.failures[target.name] = failures[target.name]
                    job.warn(f"{target.name} stays dense: {failures[target.name]}")
                    continue
                found, device = mine[0].get(target.name), linear_of(self.dense, target.name).weight.device
                if processes.started():
                    found = from_process(owner, found, device)
                assert found is not None
                findings.layers[target.name] = moved(found, device)
        if not findings.layers:
            raise NumericsError("no layer could be factorized; see the warnings for the reasons.")
        return findings

    @torch.no_grad()
    def _factorize_share(
        self, targets: Sequence[Target], stats: Mapping[str, LinearStats], advance: Callable[[int], None]
    ) -> tuple[dict[str, Factorization], dict[str, str]]:
        """The factors of some targets, and why there are none."""
        found, failures = dict[str, Factorization](), dict[str, str]()
        for target in targets:
            layer = linear_of(self.dense, target.name)
            try:
                factors = self.factorize(target.name, layer.weight.double(), stats.get(target.name))
                found |= paged({target.name: factors.check_finite()}, self.pages)
            except NumericsError as error:
                failures[target.name] = str(error)
            advance(processes.count())
        return found, failures


def _measured_of(findings: Findings) -> dict[str, Measured]:
    return {name: Measured(each.measured) for name, each in findings.layers.items() if each.measured is not None}


def _with_measured(findings: Findings, measured: Mapping[str, Measured]) -> Findings:
    layers = {
        name: replace(each, measured=measured[name].measured) if name in measured else each
        for name, each in findings.layers.items()
    }
    return replace(findings, layers=layers)
