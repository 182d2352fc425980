"""From statistics to a model with other attentions: what ``compression`` is for the methods of single layers."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink import cost
from vitshrink.allocation import Allocation, Menu, Plan, least_cost, plan_cost
from vitshrink.calibration import collect
from vitshrink.checkpoint import replace_layers
from vitshrink.compression import DENSE, Factors, choose_ranks
from vitshrink.config import CompressConfig
from vitshrink.entries import laid_out
from vitshrink.errors import NumericsError, UsageError
from vitshrink.measurement import CalibrationData
from vitshrink.memory import Step
from vitshrink.methods.attention import ATTENTION, AttentionMethod, AttentionWeights, Dimensions
from vitshrink.models import Target, find_targets
from vitshrink.observer import Job
from vitshrink.progress import Progress
from vitshrink.sharing import Shared
from vitshrink.stats import LinearStats
from vitshrink.structures import fill

COMPENSATIONS = ("none",)
"""Repairs of a model whose attentions were replaced: what a bias can absorb is part of the methods themselves."""


@dataclass(frozen=True)
class Attention:
    """Where one attention is in the model."""

    block: int
    dimensions: Dimensions
    places: Mapping[str, str]
    """Module names by role, and of the attention itself."""
    targets: Mapping[str, Target]
    """By role; only those that may be replaced."""

    def unit(self, part: str) -> str:
        """The name of one of its parts, in plans and reports."""
        return f"{self.places[ATTENTION]}:{part}"


@dataclass(frozen=True)
class AttentionCompression:
    """The dense model and every choice that is not the size.

    Raises:
        UsageError: no attention is left to replace, or a rank that no head has.
    """

    config: CompressConfig
    dense: PreTrainedModel
    targets: Sequence[Target]
    method: AttentionMethod
    allocation: Allocation
    compensation: str
    calibration: CalibrationData | None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        if not self.units():
            parts = " or ".join(", ".join(roles) for roles in self.method.parts.values())
            raise UsageError(
                f"--method {self.method.name} replaces parts of attentions whole ({parts}), and no block has all "
                "layers of one among those that --include and --exclude leave: use --layers attention without the two."
            )
        largest = max((attention.dimensions for attention in self._attentions()), key=lambda each: each.head)
        most = max(max(self._ranks(attention)) for attention in self._attentions())
        if self.config.rank is not None and self.config.rank > most:
            raise UsageError(
                f"--rank {self.config.rank}: ranks of --method {self.method.name} go up to {most} on this model, whose "
                f"heads have {largest.head} dimensions of {largest.width}."
            )

    def units(self, losses: Mapping[str, Tensor] | None = None) -> list[Menu]:
        """What there is to choose the rank of. Without ``losses`` only the costs are told."""
        nothing = torch.zeros(1, dtype=torch.float64)
        found, known = [], {}
        for attention in self._attentions():
            for part, roles in self.method.parts.items():
                name = attention.unit(part)
                if not set(roles) <= set(attention.targets) or (losses is not None and name not in losses):
                    continue
                shapes = tuple(attention.targets[role].shape for role in roles)
                dense, width = sum(m * n for m, n in shapes), attention.dimensions.width
                if (part, shapes) not in known:
                    known[part, shapes] = self._costs(attention, part, dense)
                loss = nothing if losses is None else losses[name]
                shape = (dense // width, width)
                found.append(Menu(name, shape, dense, known[part, shapes], loss, self.config.rank_multiple))
        return found

    def factorise_dense(self, job: Job) -> Factors:
        """Calibrate on the dense model and decompose each attention once; a rank is then a slice."""
        assert self.calibration is not None
        if self.config.cache is not None:
            job.warn(f"--cache keeps nothing for --method {self.method.name}.")
        used = [target for attention in self._attentions() for target in attention.targets.values()]
        memory, batches = Step(self.progress, DENSE), self.calibration.batches
        stats = memory.read(LinearStats)
        if not stats:
            course = Shared(self.progress, DENSE, next(self.dense.parameters()).device)
            with job.stage("calibrate", "Calibrating", len(self.calibration.samples)) as advance:
                needs = self.method.needs
                stats = laid_out(collect(self.dense, used, batches, needs, course=course, on_batch=advance))
            memory.write(stats)
        factors = Factors({}, {}, stats)
        attentions = self._attentions()
        with job.stage("factorise", "Factorising", len(attentions)) as advance:
            for attention in attentions:
                self._decompose(attention, factors, job)
                advance(1)
        if not factors.layers:
            raise NumericsError("no attention could be factorised; the warnings say why.")
        return factors

    def refine(self, factors: Factors, _plan: Plan, _job: Job, _step: str = "") -> Factors:
        """These methods look at the dense model only."""
        return factors

    def resume(self, _step: str) -> Factors | None:
        """There are no steps but that of the dense model."""
        return None

    def forget(self, _step: str) -> None:
        """There is nothing to forget."""

    def plan(self, factors: Factors, budget: int) -> Plan:
        """Ranks for a budget of the whole model. Raises TargetError."""
        units = self._offers(factors)
        plan = choose_ranks(self.config, units, budget - self._fixed(units), self.allocation)
        return plan | dict.fromkeys(factors.failures)

    @property
    def whole(self) -> int:
        """Parameters of the dense model."""
        return cost.parameters(self.dense)

    def least_budget(self, factors: Factors | None = None) -> int:
        """The smallest budget that ``plan`` can meet."""
        units = self.units() if factors is None else self._offers(factors)
        return self._fixed(units) + least_cost(units)

    def size(self, factors: Factors, plan: Plan) -> int:
        """Parameters of the whole model that ``build`` gives for ``plan``."""
        units = self._offers(factors)
        return self._fixed(units) + plan_cost(units, plan)

    def build(self, factors: Factors, plan: Plan, job: Job) -> PreTrainedModel:
        """The compressed model, which is stored as it is truncated."""
        return self.truncate(factors, plan, job)

    @torch.no_grad()
    def truncate(self, factors: Factors, plan: Plan, _job: Job) -> PreTrainedModel:
        """The compressed model as the plan makes it."""
        model = copy.deepcopy(self.dense)
        for attention in self._attentions():
            names = {part: attention.unit(part) for part in self.method.parts}
            ranks = {part: rank for part, name in names.items() if (rank := plan.get(name)) is not None}
            if not ranks:
                continue
            structures = self.method.structures(attention.dimensions, ranks, **self._options())
            for place in sorted(structures, key=attention.places.__getitem__):  # a module before what lies in it
                name = attention.places[place]
                replace_layers(model, {name: structures[place].build(model.get_submodule(name))})
            for part, rank in ranks.items():
                for place, tensors in factors.layers[names[part]].tensors(rank).items():
                    module = model.get_submodule(attention.places[place])
                    there = dict(module.named_parameters())  # a layer without bias has no place for a zero one
                    fill(module, {key: value for key, value in tensors.items() if key in there})
        return model

    def _attentions(self) -> list[Attention]:
        return attentions_of(self.dense, self.targets)

    def _ranks(self, attention: Attention) -> Sequence[int]:
        return self.method.ranks(attention.dimensions, **self._options())

    def _options(self) -> dict[str, Any]:
        return dict(self.config.options)

    def _costs(self, attention: Attention, part: str, dense: int) -> dict[int, int]:
        """Stored numbers of a part at every rank: those of its weights, less what the whole attention shrinks by."""
        costs = {}
        modules = {_key(name): copy.deepcopy(self.dense.get_submodule(name)) for name in self._outer(attention)}
        skeleton = nn.ModuleDict(modules).to("meta")
        before = cost.parameters(skeleton)
        for rank in self._ranks(attention):
            changed = copy.deepcopy(skeleton)
            structures = self.method.structures(attention.dimensions, {part: rank}, **self._options())
            for place in sorted(structures, key=attention.places.__getitem__):
                name = attention.places[place]
                outer = next(each for each in self._outer(attention) if name == each or name.startswith(f"{each}."))
                path = _key(outer) + name.removeprefix(outer)
                changed.set_submodule(path, structures[place].build(changed.get_submodule(path)))
            costs[rank] = dense - before + cost.parameters(changed)
        return costs

    def _outer(self, attention: Attention) -> list[str]:
        """The attention, and its output projection where that lies elsewhere."""
        inside = attention.places[ATTENTION]
        output = attention.places["output"]
        return [inside] if output.startswith(f"{inside}.") else [inside, output]

    def _offers(self, factors: Factors) -> list[Menu]:
        return self.units({name: part.loss for name, part in factors.layers.items()})

    def _fixed(self, units: Sequence[Menu]) -> int:
        return self.whole - sum(unit.dense for unit in units)

    @torch.no_grad()
    def _decompose(self, attention: Attention, factors: Factors, job: Job) -> None:
        """Put the parts of one attention into ``factors``; where that fails it stays dense and is reported."""
        layers = {role: self._layer(target.name) for role, target in attention.targets.items()}
        weights = AttentionWeights(
            attention.dimensions,
            {role: layer.weight.double() for role, layer in layers.items()},
            {role: _bias(layer) for role, layer in layers.items()},
            {role: factors.stats[target.name] for role, target in attention.targets.items()},
        )
        wanted = [part for part, roles in self.method.parts.items() if set(roles) <= set(attention.targets)]
        if not wanted:
            return
        try:
            parts = self.method.factorise(weights, self._ranks(attention), wanted, **self._options())
            for part in wanted:
                factors.layers[attention.unit(part)] = parts[part].check_finite()
        except NumericsError as error:
            for part in wanted:
                factors.layers.pop(attention.unit(part), None)
                factors.failures[attention.unit(part)] = str(error)
            job.warn(f"{attention.places[ATTENTION]} stays dense: {error}")

    def _layer(self, name: str) -> nn.Linear:
        layer = self.dense.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        return layer


def attentions_of(model: PreTrainedModel, targets: Sequence[Target]) -> list[Attention]:
    """The dense attentions of a model, with those of their projections that are among ``targets``."""
    chosen = {target.name for target in targets}
    blocks: dict[int, dict[str, Target]] = {}
    for target in find_targets(model):
        if target.role in ("query", "key", "value", "output"):
            blocks.setdefault(target.block, {})[target.role] = target
    found = []
    for block, roles in blocks.items():
        if len(roles) < 4:
            continue
        path = roles["query"].name.rpartition(".")[0]
        heads = model.get_submodule(path).num_attention_heads
        assert isinstance(heads, int)
        outputs, width = roles["query"].shape
        places = {role: target.name for role, target in roles.items()} | {ATTENTION: path}
        mine = {role: target for role, target in roles.items() if target.name in chosen}
        if mine:
            found.append(Attention(block, Dimensions(heads, outputs // heads, width), places, mine))
    return found


def _bias(layer: nn.Linear) -> Tensor:
    return layer.weight.new_zeros(layer.out_features).double() if layer.bias is None else layer.bias.double()


def _key(name: str) -> str:
    return name.replace(".", "/")
