"""From statistics to a compressed model in memory: what the sizes of a job do alike."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink._version import __version__
from vitshrink.compression.allocation import (
    Allocation,
    Curve,
    Offer,
    Plan,
    allocate,
    explained_variance,
    fixed_rank,
    least_cost,
    measured,
    plan_cost,
)
from vitshrink.compression.compensation import SHIFTING, shifted_bias
from vitshrink.compression.memory import Cached, Memory, Step
from vitshrink.compression.quantization import Quantization
from vitshrink.compression.rescaling import STEPS, rescale_components
from vitshrink.compression.sequential import compensate_residuals
from vitshrink.config.options import CompressConfig
from vitshrink.data import Batch
from vitshrink.data.opening import CalibrationData
from vitshrink.errors import NumericsError, TargetError
from vitshrink.methods import Factorisation, Method
from vitshrink.methods.ranks import Storage
from vitshrink.models import cost
from vitshrink.models.checkpoint import replace_layers
from vitshrink.models.pivoting import fix_gauge
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.targets import Target, blocks_of
from vitshrink.runtime import processes
from vitshrink.runtime.cache import Cache
from vitshrink.runtime.entries import laid_out, moved
from vitshrink.runtime.observer import Job
from vitshrink.runtime.precision import Passes, passes_in, resolve_precision
from vitshrink.runtime.state import Progress
from vitshrink.statistics.calibration import collect
from vitshrink.statistics.curvature import collect_curvature
from vitshrink.statistics.digests import data_digest, model_digest
from vitshrink.statistics.effects import MEASURED_SAMPLES, Components, measured_loss
from vitshrink.statistics.needs import Needs
from vitshrink.statistics.reference import DenseOutputs
from vitshrink.statistics.sharing import Shared, shared_effects, shared_shortfall
from vitshrink.statistics.stats import LinearStats

SHARES_MEASURED_AGAIN = (0.0, 0.5, 1.0)
"""Exponents of what components do in the compressed model; the rest is that of what was measured before."""

DENSE = "dense"
"""The step of a job that looks at the dense model only."""


@dataclass(frozen=True, eq=False)
class Factors:
    """The factorisations of a model's layers, why those that are missing are, and the statistics behind them."""

    layers: dict[str, Any]
    """``Factorisation`` of a layer, or ``Part`` of an attention; both tell their ``loss`` by rank."""
    failures: dict[str, str]
    stats: Mapping[str, LinearStats]


class Compressor(Protocol):
    """A dense model and every choice that is not the size: of layers here, of attentions in ``attentions``."""

    @property
    def config(self) -> CompressConfig: ...
    @property
    def dense(self) -> PreTrainedModel: ...
    def units(self) -> Sequence[Offer]:
        """What there is to choose the rank of; only the costs are told."""

    def factorise_dense(self, job: Job) -> Factors:
        """Calibrate on the dense model and factorise once; a rank is then a slice."""

    def refine(self, factors: Factors, plan: Plan, job: Job, step: str = "") -> Factors:
        """Factorise again for what the model compressed by ``plan`` shows; what is done is kept as ``step``."""

    def resume(self, step: str) -> Factors | None:
        """What an interrupted run of the job has kept of a step, if it had completed it."""

    def forget(self, step: str) -> None:
        """Keep nothing of a step that another one has overtaken."""

    def plan(self, factors: Factors, budget: int) -> Plan:
        """Ranks for a budget of the whole model. Raises TargetError."""

    @property
    def whole(self) -> int:
        """Size of the dense model, in what budgets are counted in: numbers, or bytes (``config.counts_bytes``)."""

    def least_budget(self, factors: Factors | None = None) -> int:
        """The smallest budget that ``plan`` can meet; without ``factors``, where every layer can be factorised."""

    def size(self, factors: Factors, plan: Plan) -> int:
        """Size of the whole model that ``build`` gives for ``plan``."""

    def build(self, factors: Factors, plan: Plan, job: Job) -> PreTrainedModel:
        """The compressed model, compensated, in the form in which it is stored."""

    def truncate(self, factors: Factors, plan: Plan, job: Job) -> PreTrainedModel:
        """The compressed model before the repairs and the form that come with storing it."""


@dataclass(frozen=True, eq=False)
class Compression:
    """The dense model and every choice that is not the size."""

    config: CompressConfig
    dense: PreTrainedModel
    targets: Sequence[Target]
    method: Method
    allocation: Allocation
    compensation: str
    storage: Storage
    calibration: CalibrationData | None
    progress: Progress = field(default_factory=Progress)
    quantization: Quantization | None = None
    """How the weights will be rounded, where a size is counted in the bytes that this leaves."""

    def units(self) -> list[Curve]:
        """What there is to choose the rank of; only the costs are told."""
        nothing = torch.zeros(1, dtype=torch.float64)
        return [Curve(t.name, t.shape, nothing, self.storage, self.config.rank_multiple) for t in self.targets]

    def factorise_dense(self, job: Job) -> Factors:
        """Calibrate on the dense model and factorise each target once; a rank is then a slice."""
        memory = self._memory(job)
        stats = memory.read(LinearStats)
        if not stats:
            stats = self._statistics(self.dense, {}, job, seed=self.config.seed, step=DENSE)
            memory.write(stats)
        layers = memory.read(Factorisation)
        if layers:
            return Factors(layers, {}, stats)
        factors = self._measured(self.dense, self._factorise(stats, job, DENSE), job)
        if not factors.failures:  # those are tried again, and reported again, by the next job
            memory.write(factors.layers)
        return factors

    def _memory(self, job: Job) -> Memory:
        """Where what follows from the dense model alone is kept."""
        if self.config.cache is None:
            return Step(self.progress, DENSE)
        with job.stage("cache", "Looking into the cache"):
            device = next(self.dense.parameters()).device
            cache, key = Cache(Path(self.config.cache), device, job.warn), self._key(device)
        choices = {
            "method": self.method.name,
            "options": dict(self.config.options),
            "compensation": self.compensation,
            "measured": [self.config.seed, MEASURED_SAMPLES] if self._measures else None,
        }
        return Cached(cache, {LinearStats: key, Factorisation: key | choices})

    def _key(self, device: torch.device) -> dict[str, Any]:
        """All that the statistics of the dense model follow from."""
        curvature = self.method.needs is Needs.CURVATURE
        return {
            "vitshrink": __version__,
            "torch": torch.__version__,
            "device": device.type,
            "model": model_digest(self.dense),
            "layers": [target.name for target in self.targets],
            "data": None if self.calibration is None else data_digest(self.calibration.batches),
            "needs": self.method.needs.value,
            "seed": self.config.seed if curvature else None,
            "probes": self.config.probes if curvature else None,
            "precision": resolve_precision(device, self.config.precision) if curvature else None,
        }

    def refine(self, factors: Factors, plan: Plan, job: Job, step: str = "") -> Factors:
        """Estimate the statistics again on the model compressed by ``plan``, and factorise for those.

        What a layer must keep depends on what the others lost. The factors are those of the dense weights again. How
        much of its budget each layer gets follows from what its components do in the dense model, in the compressed
        one, or from the geometric mean of both: whichever gives the model that comes closest to the dense one.
        """
        if (finished := self.resume(step)) is not None:
            return finished
        memory, model = Step(self.progress, step), self._replaced(factors, plan)
        stats = memory.read(LinearStats)
        if not stats:
            dense = {name: self._layer(name).weight.detach() for name, rank in plan.items() if rank is not None}
            again = self._statistics(model, dense, job, seed=self.config.seed + 1, step=step)
            stats = laid_out({name: factors.stats[name].refined_by(again[name]) for name in again})
            memory.write(stats)
        again_measured = self._measured(model, factors, job)
        refined = self._factorise(stats, job, step)
        chosen = self._best_measured(refined, factors, again_measured, self.size(factors, plan), job)
        chosen = replace(chosen, layers=laid_out(chosen.layers))
        if not refined.failures:
            memory.write(chosen.layers)
        return chosen

    def _best_measured(self, refined: Factors, before: Factors, again: Factors, budget: int, job: Job) -> Factors:
        """``refined``, with the measured losses that spend the budget best: those ``before``, ``again``, or between.

        What is removed from a compressed model tells little of what it did there, and after a light cut misleads; what
        a deep cut has left works otherwise than in the dense model.
        """
        if not self._measures or self.calibration is None:
            return refined
        batches = list(_first(self.calibration.batches, MEASURED_SAMPLES))
        seed = self.config.seed + 4
        candidates = []
        with job.stage("choose", "Choosing what ranks go by", len(SHARES_MEASURED_AGAIN)) as advance:
            for share in SHARES_MEASURED_AGAIN:
                layers = {
                    name: each.measured_between(before.layers[name], again.layers[name], share)
                    if name in before.layers
                    else each
                    for name, each in refined.layers.items()
                }
                candidate = replace(refined, layers=layers)
                model = self._replaced(candidate, self.plan(candidate, budget))
                missing = shared_shortfall(model, self._dense_outputs, batches, seed=seed, passes=self._passes)
                candidates.append((float(missing.square().mean()), candidate))
                advance(1)
        return min(candidates, key=lambda each: each[0])[1]

    def resume(self, step: str) -> Factors | None:
        """What an interrupted run of the job has kept of a step, if it had completed it."""
        memory = Step(self.progress, step)
        layers = memory.read(Factorisation)
        return Factors(layers, {}, memory.read(LinearStats)) if layers else None

    def forget(self, step: str) -> None:
        """Keep nothing of a step that another one has overtaken."""
        Step(self.progress, step).forget()

    def plan(self, factors: Factors, budget: int) -> Plan:
        """Ranks for a budget of the whole model. Raises TargetError."""
        offers = self._offers(factors)
        plan = choose_ranks(self.config, offers, budget - self.fixed(offers), self.allocation)
        return plan | dict.fromkeys(factors.failures)

    @cached_property
    def whole(self) -> int:
        """Size of the dense model: its parameters, or the bytes that rounding leaves of it."""
        return cost.parameters(self.dense) if self.quantization is None else self.quantization.file_bytes(self.dense)

    def fixed(self, offers: Sequence[Offer]) -> int:
        """What no plan changes: embeddings, norms, biases, heads, and layers that are not on offer."""
        return self.whole - sum(offer.cost(None) for offer in offers)

    def least_budget(self, factors: Factors | None = None) -> int:
        """The smallest budget that ``plan`` can meet."""
        offers = self._priced(self.units()) if factors is None else self._offers(factors)
        return self.fixed(offers) + least_cost(offers)

    def size(self, factors: Factors, plan: Plan) -> int:
        """Size of the whole model that ``build`` gives for ``plan``."""
        offers = self._offers(factors)
        return self.fixed(offers) + plan_cost(offers, plan)

    def _offers(self, factors: Factors) -> Sequence[Offer]:
        """What the ranks of the layers that could be factorised cost and lose."""
        curves = []
        for unit in self.units():
            if unit.name in factors.layers:
                layer = factors.layers[unit.name]
                loss = layer.measured if self._measures and layer.measured is not None else layer.loss
                curves.append(replace(unit, loss=loss))
        return self._priced(curves)

    def _priced(self, curves: Sequence[Curve]) -> Sequence[Offer]:
        return curves if self.quantization is None else [self.quantization.in_bytes(curve) for curve in curves]

    def build(self, factors: Factors, plan: Plan, job: Job) -> PreTrainedModel:
        """The compressed model, compensated, in the form in which it is stored."""
        model = self.truncate(factors, plan, job)
        if self.compensation == "rescale" and self.calibration is not None:
            low_rank = [name for name, rank in plan.items() if rank is not None]
            walks = 2 * STEPS * len(self.calibration.samples)
            with job.stage("compensate", "Fitting gains and biases", walks) as advance:
                rescale_components(
                    model,
                    self._dense_outputs,
                    low_rank,
                    {name: self._mean(name, factors.stats) for name in low_rank},
                    self.calibration.batches,
                    seed=self.config.seed + 2,
                    passes=self._passes,
                    measure=shared_effects,
                    lacking=shared_shortfall,
                    on_batch=advance,
                )
        if self.storage == "gauge":
            with job.stage("gauge", "Choosing pivots"):
                fix_gauge(model, self.targets)
        return model

    def truncate(self, factors: Factors, plan: Plan, job: Job) -> PreTrainedModel:
        """The compressed model, compensated, with both factors of its layers whole."""
        model = self._replaced(factors, plan)
        if self.compensation == "residual" and self.calibration is not None:
            low_rank = [target.name for target in self.targets if plan[target.name] is not None]
            layers = {name: self._layer(name) for name in low_rank}
            with job.stage("compensate", "Fitting residuals", len(low_rank)) as advance:
                compensate_residuals(
                    model,
                    blocks_of(model),
                    self.targets,
                    layers,
                    self.calibration.batches,
                    on_layer=lambda _name: advance(1),
                )
        return model

    def _layer(self, name: str) -> nn.Linear:
        layer = self.dense.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        return layer

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
                found = collect_curvature(
                    model,
                    self.targets,
                    batches,
                    weights=dense,
                    seed=seed,
                    probes=self.config.probes,
                    passes=self._passes,
                    course=course,
                    on_batch=advance,
                )
        return laid_out(found)

    @property
    def _passes(self) -> Passes:
        """The arithmetic of passes that gradients are taken through."""
        return passes_in(next(self.dense.parameters()).device, self.config.precision)

    @cached_property
    def _dense_outputs(self) -> DenseOutputs:
        """What every candidate and every repair is compared with."""
        return DenseOutputs(self.dense, self._passes)

    @property
    def _measures(self) -> bool:
        """Whether ranks are chosen by what components do to the output."""
        fixed = self.config.rank is not None or self.config.explained_variance is not None
        return self.allocation is measured and not fixed

    @torch.no_grad()
    def _measured(self, model: PreTrainedModel, factors: Factors, job: Job) -> Factors:
        """The factors with the loss of their layers measured in ``model``, where the allocation goes by that."""
        if not self._measures or self.calibration is None:
            return factors
        batches = list(_first(self.calibration.batches, MEASURED_SAMPLES))
        components = {
            name: Components(each.up, each.down, self._mean(name, factors.stats))
            for name, each in factors.layers.items()
        }
        with job.stage("measure", "Measuring components", sum(len(batch.keys) for batch in batches)) as advance:
            effects = shared_effects(
                model, components, batches, seed=self.config.seed + 3, passes=self._passes, on_batch=advance
            )
        layers = {
            name: replace(each, measured=measured_loss(effects.layers[name])) for name, each in factors.layers.items()
        }
        return replace(factors, layers=layers)

    def _mean(self, name: str, stats: Mapping[str, LinearStats]) -> Tensor:
        """What the bias of a layer absorbs of its inputs, (n,)."""
        layer = self._layer(name)
        if self.compensation in SHIFTING and layer.bias is not None:
            return stats[name].mean
        return torch.zeros(layer.in_features, dtype=torch.float64, device=layer.weight.device)

    def _factorise(self, stats: Mapping[str, LinearStats], job: Job, step: str) -> Factors:
        """Nested factors of every target; one whose decomposition fails is left out, stays dense and is reported.

        Several processes share the layers out, and all of them get all factors.
        """
        with job.stage("factorise", "Factorising", len(self.targets)) as advance:
            done = self.progress.entries(f"{step}-factors", Factorisation)
            with processes.together():
                mine = self._factorise_share(done, stats, step, advance)
            factors = Factors({}, {}, stats)
            for number, target in enumerate(self.targets):
                found = mine.get(target.name)
                if processes.started():
                    found = moved(found, "cpu") if isinstance(found, Factorisation) else found
                    found = processes.from_process(number % processes.count(), found)
                if isinstance(found, Factorisation):
                    factors.layers[target.name] = moved(found, self._layer(target.name).weight.device)
                else:
                    factors.failures[target.name] = str(found)
                    job.warn(f"{target.name} stays dense: {found}")
        if not factors.layers:
            raise NumericsError("no layer could be factorised; the warnings say why.")
        return factors

    @torch.no_grad()
    def _factorise_share(
        self,
        done: dict[str, Factorisation],
        stats: Mapping[str, LinearStats],
        step: str,
        advance: Callable[[int], None],
    ) -> dict[str, Factorisation | str]:
        """The factors of this process's share of the targets, or why there are none; some may be ``done``."""
        failed: dict[str, str] = {}
        for target in processes.share(self.targets):
            layer = self._layer(target.name)
            centred = self.compensation != "none" and layer.bias is not None
            if target.name not in done:
                try:
                    factors = self.method.factorise(
                        layer.weight.double(), stats.get(target.name), centred=centred, **self.config.options
                    )
                    done |= laid_out({target.name: factors.check_finite()})
                    self.progress.keep_part(f"{step}-factors", done)
                except NumericsError as error:
                    failed[target.name] = str(error)
            advance(processes.count())
        return done | failed

    @torch.no_grad()
    def _replaced(self, factors: Factors, plan: Plan) -> PreTrainedModel:
        """A copy of the dense model with the planned layers replaced by their truncated factors."""
        layers = {}
        for name, rank in plan.items():
            if rank is None:
                continue
            dense = self._layer(name)
            up, down = factors.layers[name].up[:, :rank], factors.layers[name].down[:rank]
            bias = None if dense.bias is None else dense.bias.double()
            if bias is not None and self.compensation in SHIFTING:
                bias = shifted_bias(bias, dense.weight.double(), up @ down, factors.stats[name].mean)
            layers[name] = LowRankLinear.from_factors(up, down, bias, dtype=dense.weight.dtype)
        compressed = copy.deepcopy(self.dense)
        replace_layers(compressed, layers)
        return compressed


def _first(batches: Sequence[Batch], samples: int) -> Iterator[Batch]:
    """As many of the batches as it takes for ``samples``."""
    for batch in batches:
        if samples <= 0:
            return
        yield batch
        samples -= len(batch.keys)


def choose_ranks(config: CompressConfig, offers: Sequence[Offer], budget: int, allocation: Allocation) -> Plan:
    """The ranks that a job asks for: one for all, those that keep a share of the energy, or those of a budget.

    Raises TargetError where that makes nothing smaller, or cannot be reached.
    """
    if config.rank is not None:
        plan = fixed_rank(offers, config.rank)
        if all(rank is None for rank in plan.values()):
            largest = max(rank for offer in offers for rank in offer.ranks)
            raise TargetError(f"--rank {config.rank} makes no layer smaller: the largest that does is {largest}.")
        return plan
    if config.explained_variance is not None:
        plan = explained_variance(offers, config.explained_variance)
        if all(rank is None for rank in plan.values()):
            raise TargetError(
                f"--explained-variance {config.explained_variance} leaves every layer dense: no rank that "
                "keeps so much makes one smaller. Ask for less."
            )
        return plan
    return allocate(offers, budget, allocation)
