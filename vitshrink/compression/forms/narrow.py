"""An MLP with fewer neurons, or an attention with smaller heads or fewer: dense layers, only narrower."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.compression.attentions import weights_of
from vitshrink.compression.candidates import Candidate, Cost, Form, Offer
from vitshrink.compression.findings import Findings
from vitshrink.compression.forms.registry import Material
from vitshrink.compression.narrow_sites import NarrowSite, narrow_sites
from vitshrink.methods.attention import ATTENTION, Dimensions
from vitshrink.methods.narrow_attention import Matches, Values
from vitshrink.methods.narrowing import Elimination
from vitshrink.models.checkpoint import replace_layers
from vitshrink.models.structures import Structure, fill
from vitshrink.models.structures.headwise import Headwise
from vitshrink.models.structures.narrow import Narrow
from vitshrink.models.views import own

Shapes = Mapping[str, tuple[int, int]]
"""(out, in) of plain linear layers by role."""


class Plain:
    """What forms of this file have in common: no factors and no integers."""

    __slots__ = ()

    @property
    def rank(self) -> None:
        return None

    @property
    def bits(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Neurons(Plain):
    """An MLP of two dense layers with so many neurons between them."""

    kept: int

    @property
    def label(self) -> str:
        return f"{self.kept} neuron{'s' * (self.kept > 1)}"

    def shapes(self, dense: Shapes) -> Shapes:
        """Of its layers, from those of the dense ones."""
        return {"fc1": (self.kept, dense["fc1"][1]), "fc2": (dense["fc2"][0], self.kept)}


@dataclass(frozen=True, slots=True)
class Heads(Plain):
    """A dense attention of so many heads, of ``qk`` dimensions for queries and keys and ``value`` for values."""

    heads: int
    qk: int
    value: int

    @property
    def label(self) -> str:
        return f"{self.heads} head{'s' * (self.heads > 1)} of {self.qk} and {self.value}"

    def shapes(self, dense: Shapes) -> Shapes:
        """Of its layers, from those of the dense ones."""
        width, outputs = dense["query"][1], dense["output"][0]
        query, value = self.heads * self.qk, self.heads * self.value
        return {
            "query": (query, width), "key": (query, width), "value": (value, width), "output": (outputs, value)
        }  # fmt: skip


NarrowForm = Neurons | Heads


@dataclass(frozen=True, eq=False)
class NarrowMlp:
    """What was found of an MLP: in which order its neurons go, and what is lost where so many stay, (n + 1,)."""

    elimination: Elimination
    losses: Tensor

    @property
    def whole(self) -> float:
        """What is lost where no neuron is left."""
        return float(self.losses[0])

    def loss(self, form: Form) -> float:
        assert isinstance(form, Neurons)
        return float(self.losses[form.kept])


@dataclass(frozen=True, eq=False)
class NarrowAttention:
    """What was found of an attention, and what each form of it loses."""

    values: Values
    matches: Matches
    losses: Mapping[Heads, float]

    @property
    def whole(self) -> float:
        """What its smallest form loses."""
        return max(self.losses.values(), default=0.0)

    def loss(self, form: Form) -> float:
        assert isinstance(form, Heads)
        return self.losses[form]


def step_of(size: int, parts: int, multiple: int) -> int:
    """The power of two that is about ``size / parts``, or a multiple of ``multiple``: sizes that kernels like."""
    power = 1 << max(size // parts, 1).bit_length() - 1
    return power + -power % multiple


def neurons_on_offer(neurons: int, multiple: int) -> Iterator[Neurons]:
    """About 32 to 64 sizes."""
    step = step_of(neurons, 32, multiple)
    return (Neurons(kept) for kept in range(step, neurons, step))


def heads_on_offer(dimensions: Dimensions, multiple: int) -> Iterator[Heads]:
    """Every number of heads, in eight to sixteen sizes of queries and of values."""
    head = dimensions.head
    step = step_of(head, 8, multiple)
    sizes = [*range(step, head, step), head]
    whole = Heads(dimensions.heads, head, head)
    every = (Heads(heads, qk, value) for heads in range(1, whole.heads + 1) for qk in sizes for value in sizes)
    return (each for each in every if each != whole)


@dataclass(frozen=True, eq=False)
class NarrowMaker:
    """Offers fewer neurons, smaller heads and fewer heads; what stays makes up for what goes."""

    material: Material

    @cached_property
    def sites(self) -> dict[str, NarrowSite]:
        return {each.name: each for each in narrow_sites(self.material.dense, self.material.targets)}

    def offers(self, findings: Findings | None = None) -> Sequence[Offer]:
        return [
            self._offer(each, None if findings is None else findings.layers[name])
            for name, each in self.sites.items()
            if findings is None or name in findings.layers
        ]

    def makes(self, form: Form) -> bool:
        return isinstance(form, Plain)

    @torch.no_grad()
    def build(self, model: PreTrainedModel, chosen: Mapping[str, Form], findings: Findings) -> None:
        for name, form in chosen.items():
            site, found = self.sites[name], findings.layers[name]
            if isinstance(form, Neurons):
                self._build_mlp(model, site, form, found, findings)
            else:
                assert isinstance(form, Heads)
                self._build_attention(model, site, form, found, findings)

    def on_offer(self, site: NarrowSite) -> Iterator[NarrowForm]:
        """All forms of a site."""
        if site.attention is None:
            return neurons_on_offer(site.targets["fc2"].shape[1], self.material.multiple)
        return heads_on_offer(site.attention.dimensions, self.material.multiple)

    def _offer(self, site: NarrowSite, found: NarrowMlp | NarrowAttention | None) -> Offer:
        dense = {role: target.shape for role, target in site.targets.items()}
        candidates = [
            Candidate(form, self._cost(site, form), 0.0 if found is None else found.loss(form))
            for form in self.on_offer(site)
        ]
        costs, whole = (
            [self.material.dense_cost(shape) for shape in dense.values()],
            0.0 if found is None else found.whole,
        )
        parameters, size = sum(each.parameters for each in costs), sum(each.bytes for each in costs)
        kept = Cost(parameters, size, self._time(site, dense))
        return Offer.of(site.site, self.material.currency, Candidate(None, kept), candidates, nothing=whole)

    def _cost(self, site: NarrowSite, form: NarrowForm) -> Cost:
        """Of the weights, less the biases that go with them."""
        dense = {role: target.shape for role, target in site.targets.items()}
        shapes, biases = form.shapes(dense), 0
        for role, target in site.targets.items():
            if self.material.layer(target.name).bias is not None and shapes[role] != dense[role]:
                stays = 0 if role in ("key", "value") else shapes[role][0]
                biases += dense[role][0] - stays
        costs = [self.material.dense_cost(shape) for shape in shapes.values()]
        return Cost(
            sum(each.parameters for each in costs) - biases,
            sum(each.bytes for each in costs) - biases * self.material.itemsize,
            self._time(site, shapes),
        )

    def _time(self, site: NarrowSite, shapes: Shapes) -> int | None:
        """Of the layers, in nanoseconds, where time is what counts; what is between them is left out."""
        prices = self.material.prices
        if prices is None:
            return None
        each = ((target, shapes[role]) for role, target in site.targets.items())
        return sum(prices.of(t, None) if t.shape == shape else prices.resized(t, shape) for t, shape in each)

    def _build_mlp(
        self, model: PreTrainedModel, site: NarrowSite, form: Neurons, found: NarrowMlp, findings: Findings
    ) -> None:
        names = {role: target.name for role, target in site.targets.items()}
        first, second = (self.material.layer(names[role]) for role in ("fc1", "fc2"))
        kept, factors = form.kept, found.elimination.factors
        stays = found.elimination.order[:kept].sort().values
        weight = (factors.up[:, :kept] @ factors.down[:kept])[:, stays]
        mean = findings.stats[names["fc2"]].mean
        structures = {"fc1": Narrow(outputs=kept), "fc2": Narrow(inputs=kept)}
        replace_layers(
            model, {names[role]: each.build(model.get_submodule(names[role])) for role, each in structures.items()}
        )
        tensors = {"fc1": {"weight": first.weight[stays]}, "fc2": {"weight": weight}}
        if first.bias is not None:
            tensors["fc1"]["bias"] = first.bias[stays]
        tensors["fc2"]["bias"] = second.bias.double() + second.weight.double() @ mean - weight @ mean[stays]
        for role, filled in tensors.items():
            _filled(model, names[role], filled)

    def _build_attention(
        self, model: PreTrainedModel, site: NarrowSite, form: Heads, found: NarrowAttention, findings: Findings
    ) -> None:
        assert site.attention is not None
        places, dimensions = site.attention.places, site.attention.dimensions
        heads = None if form.heads == dimensions.heads else form.heads
        qk, value = (None if size == dimensions.head else size for size in (form.qk, form.value))
        structures: dict[str, Structure] = {ATTENTION: Headwise(qk, value, heads)}
        weights = weights_of(self.material.dense, site.attention, findings.stats)
        kept = found.values.kept(form.heads, dimensions)
        tensors: dict[str, dict[str, Tensor]] = {}
        if form.qk < dimensions.head or heads:
            tensors |= found.matches.tensors(weights, kept, form.qk)
        if form.value < dimensions.head or heads:
            structures["output"] = Narrow(inputs=form.heads * form.value)
            tensors |= found.values.tensors(weights, kept, form.value)
        for place, structure in structures.items():
            name = places[place]
            replace_layers(model, {name: structure.build(model.get_submodule(name))})
        for place, filled in tensors.items():
            _filled(model, places[place], filled)


def _filled(model: PreTrainedModel, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Values for a layer, of which one without bias has no place for that."""
    module = own(model.get_submodule(name))
    there = dict(module.named_parameters())
    fill(module, {key: value for key, value in tensors.items() if key in there})
