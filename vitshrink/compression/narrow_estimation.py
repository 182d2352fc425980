"""What a method learns of MLPs and attentions that may become narrower: what goes first, and what that loses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.compression.attentions import weights_of
from vitshrink.compression.candidates import Plan
from vitshrink.compression.estimation import LayerEstimator
from vitshrink.compression.findings import Findings, Rebuild
from vitshrink.compression.forms.narrow import Heads, NarrowAttention, NarrowMaker, NarrowMlp, step_of
from vitshrink.compression.narrow_sites import NarrowSite
from vitshrink.errors import NumericsError
from vitshrink.methods.attention import Dimensions
from vitshrink.methods.narrow_attention import Matches, Values, matched, values
from vitshrink.methods.narrowing import Elimination, neurons
from vitshrink.models.targets import linear_of
from vitshrink.runtime.observer import Job
from vitshrink.statistics.calibration import first_of
from vitshrink.statistics.effects import MEASURED_SAMPLES, TOGETHER, Components, measured_loss
from vitshrink.statistics.sharing import shared_effects
from vitshrink.statistics.stats import LinearStats

READ = ("query", "output", "fc2")
"""The layers of which whole statistics are read."""

Found = Elimination | tuple[Values, Matches]


@dataclass(frozen=True, eq=False)
class NarrowEstimator:
    """What ``layers`` learns of the layers, and what follows from that for the sites of ``maker``.

    Attributes:
        ranks: whether layers may become two factors, too.
    """

    layers: LayerEstimator
    maker: NarrowMaker
    ranks: bool = False

    def learn(self, job: Job) -> Findings:
        """Calibrate on the dense model; every size of every site then is a slice."""
        findings = self.layers.learn(job) if self.ranks else Findings({}, {}, self.layers.known(job))
        found = self._found(findings, job)
        effects = self._effects(found, findings.stats, job)
        for name, each in found.items():
            findings.layers[name] = self._priced(self.maker.sites[name], each, effects)
        if not findings.layers:
            raise NumericsError("no layer could be made narrower; see the warnings for the reasons.")
        return findings

    def refine(
        self, before: Findings, plan: Plan, model: PreTrainedModel, rebuilt: Rebuild, job: Job, step: str = ""
    ) -> Findings:
        """For the layers that are not within something narrower, as the method does; the others stay as they were."""
        within = {part for name in plan if name in self.maker.sites for part in self._parts(name)}

        def whole(again: Findings) -> Findings:
            layers, stats = before.layers | again.layers, {**before.stats, **again.stats}
            return replace(
                before, layers=layers, stats=stats, failures=before.failures | again.failures, light=again.light
            )

        layers = replace(self.layers, targets=[each for each in self.layers.targets if each.name not in within])
        if not layers.targets:
            return before
        ranks = {name: before.layers[name] for name in before.layers if name not in {*self.maker.sites, *within}}
        again = layers.refine(
            replace(before, layers=ranks),
            {name: each for name, each in plan.items() if name in ranks},
            model,
            lambda found: rebuilt(whole(found)),
            job,
            step,
        )
        return whole(again)

    def resume(self, _step: str, _job: Job) -> Findings | None:
        """Nothing: what is kept of a step tells of layers only."""
        return None

    def kept(self, _step: str) -> bool:
        """As ``resume`` says."""
        return False

    def forget(self, step: str) -> None:
        """Keep nothing of a step that another one has overtaken."""
        self.layers.forget(step)

    def _parts(self, name: str) -> Sequence[str]:
        return [target.name for target in self.maker.sites[name].targets.values()]

    def _found(self, findings: Findings, job: Job) -> dict[str, Found]:
        """By site; one that fails is kept as it is, and reported."""
        found: dict[str, Found] = {}
        sites = self.maker.sites
        with job.stage("narrow", "Ordering neurons and heads", len(sites)) as advance:
            for name, site in sites.items():
                try:
                    found[name] = self._ordered(site, findings.stats)
                except NumericsError as error:
                    findings.failures[name] = str(error)
                    job.warn(f"{name} keeps its width: {error}")
                advance(1)
        return found

    def _ordered(self, site: NarrowSite, stats: Mapping[str, LinearStats]) -> Found:
        dense = self.layers.dense
        if site.attention is not None:
            weights = weights_of(dense, site.attention, stats)
            return values(weights), matched(weights)
        target = site.targets["fc2"]
        step = step_of(target.shape[1], 32, self.maker.material.multiple)
        return neurons(linear_of(dense, target.name).weight.detach().double(), stats[target.name], step)

    @torch.no_grad()
    def _effects(self, found: Mapping[str, Found], stats: Mapping[str, LinearStats], job: Job) -> dict[str, Tensor]:
        """By layer, (samples, k) of the components of what is found there; nothing, where losses are not measured."""
        layers = self.layers
        if not layers.measures or layers.calibration is None:
            return {}
        components: dict[str, Components] = {}
        for name, each in found.items():
            components |= self._components(self.maker.sites[name], each, stats)
        batches = first_of(layers.calibration.batches, MEASURED_SAMPLES)
        with job.stage("measure", "Measuring neurons and heads", sum(len(batch.keys) for batch in batches)) as advance:
            return shared_effects(
                layers.dense,
                components,
                batches,
                seed=layers.config.seed + 3,
                passes=layers.passes,
                on_batch=advance,
            ).layers

    def _components(self, site: NarrowSite, found: Found, stats: Mapping[str, LinearStats]) -> dict[str, Components]:
        """By layer: its neurons; dimensions of values and then whole heads; queries, head by head."""
        if isinstance(found, Elimination):
            second = site.targets["fc2"].name
            return {second: Components(found.factors.up, found.factors.down, stats[second].mean)}
        output, query = (site.targets[role].name for role in ("output", "query"))
        carried, matching = found
        dimensions, heads = carried.dimensions.factors, carried.heads.factors
        up, down = torch.cat([dimensions.up, heads.up], 1), torch.cat([dimensions.down @ carried.basis, heads.down])
        layer = linear_of(self.layers.dense, query)
        weight = layer.weight.detach().double()
        by_head = weight.reshape(len(matching.query), -1, weight.shape[1])
        # what a query loses is a map of all of it, its bias included: of x less that x of which the query is nothing
        nothing = stats[query].mean.new_zeros(weight.shape[1])
        if layer.bias is not None:
            nothing = -torch.linalg.pinv(weight) @ layer.bias.detach().double()
        keys: Tensor = torch.block_diag(*matching.key.mT)  # type: ignore[no-untyped-call]
        return {
            output: Components(up, down, stats[output].mean),
            query: Components(keys, (matching.query @ by_head).flatten(0, 1), nothing),
        }

    def _priced(self, site: NarrowSite, found: Found, effects: Mapping[str, Tensor]) -> NarrowMlp | NarrowAttention:
        if isinstance(found, Elimination):
            mine = effects.get(site.targets["fc2"].name)
            return NarrowMlp(found, found.factors.loss if mine is None else measured_loss(mine))
        assert site.attention is not None
        carried, matching = found
        forms = [form for form in self.maker.on_offer(site) if isinstance(form, Heads)]
        output, query = (effects.get(site.targets[role].name) for role in ("output", "query"))
        losses = losses_of_heads(forms, site.attention.dimensions, carried, matching, output, query)
        return NarrowAttention(carried, matching, losses)


def losses_of_heads(
    forms: Sequence[Heads],
    dimensions: Dimensions,
    carried: Values,
    matching: Matches,
    output: Tensor | None,
    query: Tensor | None,
) -> dict[Heads, float]:
    """What each form loses: the heads that go, and of those that stay dimensions of values, queries and keys.

    From the effects of the components of the output projection and of the queries, (samples, k), taken out together; or
    by the curvature, where they were not measured.
    """
    head = dimensions.head
    measured = output is not None and query is not None
    if not measured:  # what the curvature says adds up, as the squares of effects on one sample do
        energies = [-each.factors.loss.diff() for each in (carried.dimensions, carried.heads)]
        output, query = torch.cat(energies).sqrt()[None], matching.loss.flatten().sqrt()[None]
    assert output is not None
    assert query is not None
    output, query = output.double(), query.double()
    narrow, whole = output.tensor_split(2, 1)
    scores = query.view(-1, *matching.loss.shape)
    owners = carried.dimensions.order // head

    @cache
    def gone(heads: int) -> _Lost:
        return _Lost.of(whole[:, heads * head :])

    @cache
    def narrower(heads: int, value: int) -> _Lost:
        cheap = torch.arange(len(owners), device=owners.device) >= dimensions.heads * value
        return _Lost.of(narrow[:, cheap & torch.isin(owners, carried.kept(heads, dimensions))])

    @cache
    def flatter(heads: int, qk: int) -> _Lost:
        return _Lost.of(scores[:, carried.kept(heads, dimensions), qk:].flatten(1))

    lost = (gone(form.heads) + narrower(form.heads, form.value) + flatter(form.heads, form.qk) for form in forms)
    return {form: each.loss if measured else each.alone for form, each in zip(forms, lost, strict=True)}


@dataclass(frozen=True, eq=False)
class _Lost:
    """Components that are taken out: the sum of their squared effects, and their summed effect, (samples,)."""

    alone: float
    together: Tensor

    @classmethod
    def of(cls, effects: Tensor) -> Self:
        return cls(float(effects.square().mean(0).sum()), effects.sum(1))

    def __add__(self, other: Self) -> "_Lost":
        return _Lost(self.alone + other.alone, self.together + other.together)

    @property
    def loss(self) -> float:
        """As ``measured_loss`` has it."""
        together = float(self.together.square().mean())
        return float(self.alone ** (1 - TOGETHER) * together**TOGETHER)
