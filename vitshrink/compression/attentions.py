"""From statistics to a model with other attentions: what ``compression`` is for the methods of single layers."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.compression.allocation import Allocation, Menu, Plan, least_cost, plan_cost
from vitshrink.compression.layers import DENSE, Factors, choose_ranks
from vitshrink.compression.memory import Step
from vitshrink.config.options import CompressConfig
from vitshrink.data.opening import CalibrationData
from vitshrink.errors import NumericsError, UsageError
from vitshrink.methods.attention import ATTENTION, AttentionMethod, AttentionWeights, Dimensions
from vitshrink.models import cost
from vitshrink.models.checkpoint import replace_layers
from vitshrink.models.hf_quantizer import base_prefix
from vitshrink.models.structures import Structure, fill
from vitshrink.models.targets import Target, find_targets
from vitshrink.runtime.entries import laid_out
from vitshrink.runtime.observer import Job
from vitshrink.runtime.state import Progress
from vitshrink.statistics.calibration import collect
from vitshrink.statistics.sharing import Shared
from vitshrink.statistics.stats import LinearStats

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


@dataclass(frozen=True, eq=False)
class _Unit:
    """Something to choose the rank of: a part of one attention, or of several in a row."""

    part: str
    attentions: Sequence[Attention]

    @property
    def name(self) -> str:
        """In plans and reports."""
        several = f" of {len(self.attentions)} blocks" if len(self.attentions) > 1 else ""
        return f"{self.attentions[0].places[ATTENTION]}:{self.part}{several}"


@dataclass(frozen=True, eq=False)
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
        attentions = self._attentions()
        most = max((rank for attention in attentions for rank in self._ranks(attention)), default=0)
        if attentions and not most:
            sizes = attentions[0].dimensions
            raise UsageError(
                f"--method {self.method.name} has no rank for heads of {sizes.head} dimensions of {sizes.width}, as "
                "those of this model are: choose another method."
            )
        if not self.units():
            parts = " or ".join(", ".join(roles) for roles in self.method.parts.values())
            raise UsageError(
                f"--method {self.method.name} replaces parts of attentions whole ({parts}), and no block has all "
                "layers of one among those that --include and --exclude leave: use --layers attention without the two."
            )
        if self.config.rank is not None and self.config.rank > most:
            largest = max((attention.dimensions for attention in attentions), key=lambda each: each.head)
            raise UsageError(
                f"--rank {self.config.rank}: ranks of --method {self.method.name} go up to {most} on this model, whose "
                f"heads have {largest.head} dimensions of {largest.width}."
            )

    def units(self, losses: Mapping[str, Tensor] | None = None) -> list[Menu]:
        """What there is to choose the rank of. Without ``losses`` only the costs are told."""
        nothing = torch.zeros(1, dtype=torch.float64)
        found, known = [], {}
        for unit in self._units():
            if losses is not None and unit.name not in losses:
                continue
            roles = self.method.parts[unit.part]
            shapes = tuple(attention.targets[role].shape for attention in unit.attentions for role in roles)
            dense, width = sum(m * n for m, n in shapes), unit.attentions[0].dimensions.width
            if (unit.part, shapes) not in known:
                known[unit.part, shapes] = self._costs(unit, dense)
            loss = nothing if losses is None else losses[unit.name]
            shape = (dense // width, width)
            found.append(Menu(unit.name, shape, dense, known[unit.part, shapes], loss, self.config.rank_multiple))
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
        chosen = {unit: rank for unit in self._units() if (rank := plan.get(unit.name)) is not None}
        for name, structure in self._structures(chosen).items():
            replace_layers(model, {name: structure.build(model.get_submodule(name))})
        for unit, rank in chosen.items():
            for place, tensors in factors.layers[unit.name].tensors(rank).items():
                module = model.get_submodule(unit.attentions[0].places[place])
                there = dict(module.named_parameters())  # a layer without bias has no place for a zero one
                fill(module, {key: value for key, value in tensors.items() if key in there})
        return model

    def _attentions(self) -> list[Attention]:
        return attentions_of(self.dense, self.targets)

    def _ranks(self, attention: Attention) -> Sequence[int]:
        return self.method.ranks(attention.dimensions, **self._options())

    def _options(self) -> dict[str, Any]:
        return dict(self.config.options)

    def _units(self) -> list[_Unit]:
        """Block by block, so that what serves several comes with the first of them."""
        attentions = self._attentions()
        stacks = {
            part: _stacks(attentions, roles, self._options().get("blocks", 1) if part in self.method.stacked else 1)
            for part, roles in self.method.parts.items()
        }
        return [
            _Unit(part, stack)
            for attention in attentions
            for part, found in stacks.items()
            for stack in found
            if stack[0] is attention
        ]

    def _structures(self, ranks: Mapping[_Unit, int]) -> dict[str, Structure]:
        """What stands where at these ranks, by module name: a module before what lies in it, or reads it."""
        found: dict[str, Structure] = {}
        for attention in sorted(
            {a.block: a for unit in ranks for a in unit.attentions}.values(), key=lambda a: a.block
        ):
            own = {unit.part: unit for unit in ranks if unit.attentions[0] == attention}
            options = self._options()
            if self.method.stacked:
                options["blocks"] = max((len(unit.attentions) for unit in own.values()), default=1)
            mine = {part: ranks[unit] for part, unit in own.items()}
            structures = self.method.structures(attention.dimensions, mine, **options) if mine else {}
            for unit in ranks:
                if attention in unit.attentions[1:]:
                    source = unit.attentions[0].places[ATTENTION].removeprefix(base_prefix(self.dense))
                    follow = self.method.stacked[unit.part]
                    structures[ATTENTION] = follow(source, unit.attentions.index(attention))
            for place in sorted(structures, key=attention.places.__getitem__):
                found[attention.places[place]] = structures[place]
        return found

    def _costs(self, unit: _Unit, dense: int) -> dict[int, int]:
        """Stored numbers of a part at every rank: those of its weights, less what the whole attention shrinks by."""
        costs = {}
        outer = [name for attention in unit.attentions for name in self._outer(attention)]
        skeleton = nn.ModuleDict({_key(name): copy.deepcopy(self.dense.get_submodule(name)) for name in outer}).to(
            "meta"
        )
        before = cost.parameters(skeleton)
        for rank in self._ranks(unit.attentions[0]):
            changed = copy.deepcopy(skeleton)
            for name, structure in self._structures({unit: rank}).items():
                inside = next(each for each in outer if name == each or name.startswith(f"{each}."))
                path = _key(inside) + name.removeprefix(inside)
                changed.set_submodule(path, structure.build(changed.get_submodule(path)))
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
        """Put what begins with one attention into ``factors``; where that fails it stays dense and is reported."""
        units = [unit for unit in self._units() if unit.attentions[0] == attention]
        if not units:
            return
        stack = max((unit.attentions for unit in units), key=len)
        first, *others = (self._weights(each, factors.stats) for each in stack)
        try:
            wanted = [unit.part for unit in units]
            weights = replace(first, following=others)
            parts = self.method.factorise(weights, self._ranks(attention), wanted, **self._options())
            for unit in units:
                factors.layers[unit.name] = parts[unit.part].check_finite()
        except NumericsError as error:
            for unit in units:
                factors.layers.pop(unit.name, None)
                factors.failures[unit.name] = str(error)
            job.warn(f"{', '.join(each.places[ATTENTION] for each in stack)} stays dense: {error}")

    def _weights(self, attention: Attention, stats: Mapping[str, LinearStats]) -> AttentionWeights:
        layers = {role: self._layer(target.name) for role, target in attention.targets.items()}
        return AttentionWeights(
            attention.dimensions,
            {role: layer.weight.double() for role, layer in layers.items()},
            {role: _bias(layer) for role, layer in layers.items()},
            {role: stats[target.name] for role, target in attention.targets.items()},
        )

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


def _stacks(attentions: Sequence[Attention], roles: Sequence[str], blocks: int) -> list[list[Attention]]:
    """Those that have all these roles, so many in a row; the last ones may be fewer."""
    whole = [attention for attention in attentions if set(roles) <= set(attention.targets)]
    return [whole[start : start + blocks] for start in range(0, len(whole), blocks)]


def _bias(layer: nn.Linear) -> Tensor:
    return layer.weight.new_zeros(layer.out_features).double() if layer.bias is None else layer.bias.double()


def _key(name: str) -> str:
    return name.replace(".", "/")
