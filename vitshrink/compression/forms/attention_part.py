"""A part of an attention, or of several in a row, in the structure of an attention method."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel

from vitshrink.compression.attentions import Attention, AttentionSite, attentions_of, sites_of
from vitshrink.compression.candidates import Candidate, Cost, Form, Offer, Site
from vitshrink.compression.findings import Findings
from vitshrink.compression.forms.low_rank import LowRank
from vitshrink.compression.forms.registry import Material
from vitshrink.errors import UsageError
from vitshrink.methods.attention import ATTENTION, AttentionMethod
from vitshrink.models import cost
from vitshrink.models.checkpoint import replace_layers
from vitshrink.models.hf_quantizer import base_prefix
from vitshrink.models.structures import Structure, fill
from vitshrink.models.views import own


@dataclass(frozen=True, slots=True)
class AttentionPart(LowRank):
    """The part of its site at this rank."""


@dataclass(frozen=True, eq=False)
class AttentionMaker:
    """Offers the ranks that a method has for its parts.

    Raises:
        UsageError: no attention is left to replace, or a rank that no head has.
    """

    material: Material
    method: AttentionMethod
    rank: int | None = None
    """The one that the job asks for, if it does."""

    def __post_init__(self) -> None:
        attentions, name = self._attentions, self.method.name
        most = max((rank for attention in attentions for rank in self._ranks(attention)), default=0)
        if attentions and not most:
            sizes = attentions[0].dimensions
            raise UsageError(
                f"--method {name} has no rank that makes heads of {sizes.head} dimensions in {sizes.width} "
                "smaller: choose another method."
            )
        if not self._sites:
            parts = " or ".join(", ".join(roles) for roles in self.method.parts.values())
            raise UsageError(
                f"--method {name} replaces parts of attentions as a whole ({parts}), and --include and --exclude "
                "leave none of them complete in any block: use --layers attention without --include and "
                "--exclude."
            )
        if self.rank is not None and self.rank > most:
            largest = max((attention.dimensions for attention in attentions), key=lambda each: each.head)
            raise UsageError(
                f"--rank {self.rank}: the largest rank of --method {name} is {most} for this model, whose heads "
                f"have {largest.head} dimensions in {largest.width}."
            )

    def offers(self, findings: Findings | None = None) -> Sequence[Offer]:
        return [
            self._offer(site, None if findings is None else findings.layers[site.name].loss.tolist())
            for site in self._sites
            if findings is None or site.name in findings.layers
        ]

    def makes(self, form: Form) -> bool:
        return isinstance(form, AttentionPart)

    @torch.no_grad()
    def build(self, model: PreTrainedModel, chosen: Mapping[str, Form], findings: Findings) -> None:
        ranks = {site: rank for site in self._sites if site.name in chosen and (rank := chosen[site.name].rank)}
        for name, structure in self._structures(ranks).items():
            replace_layers(model, {name: structure.build(model.get_submodule(name))})
        for site, rank in ranks.items():
            for place, tensors in findings.layers[site.name].tensors(rank).items():
                module = own(model.get_submodule(site.attentions[0].places[place]))
                there = dict(module.named_parameters())  # a layer without bias has no place for a zero one
                fill(module, {key: value for key, value in tensors.items() if key in there})

    @cached_property
    def _attentions(self) -> list[Attention]:
        return attentions_of(self.material.dense, self.material.targets)

    @cached_property
    def _sites(self) -> list[AttentionSite]:
        return sites_of(self._attentions, self.method, self.material.options)

    @cached_property
    def _known_costs(self) -> dict[tuple[str, tuple[tuple[int, int], ...]], dict[int, int]]:
        """By part and shapes, which are the same in most blocks."""
        return {}

    def _ranks(self, attention: Attention) -> Sequence[int]:
        return self.method.ranks(attention.dimensions, **self.material.options)

    def _offer(self, site: AttentionSite, losses: Sequence[float] | None) -> Offer:
        roles = self.method.parts[site.part]
        shapes = tuple(attention.targets[role].shape for attention in site.attentions for role in roles)
        dense, width = sum(m * n for m, n in shapes), site.attentions[0].dimensions.width
        if (site.part, shapes) not in self._known_costs:
            self._known_costs[site.part, shapes] = self._costs(site, dense)
        candidates = [
            Candidate(AttentionPart(rank), self._cost(numbers), losses[rank] if losses else 0.0, rank)
            for rank, numbers in self._known_costs[site.part, shapes].items()
            if rank % self.material.multiple == 0 and numbers < dense  # of others the method need not tell the loss
        ]
        return Offer.of(
            Site(site.name, "attention", (dense // width, width)),
            self.material.currency,
            Candidate(None, self._cost(dense)),
            candidates,
            nothing=losses[0] if losses else 0.0,
        )

    def _cost(self, numbers: int) -> Cost:
        return Cost(numbers, numbers * self.material.itemsize)

    def _structures(self, ranks: Mapping[AttentionSite, int]) -> dict[str, Structure]:
        """What stands where at these ranks, by module name: a module before what lies in it, or reads it."""
        found: dict[str, Structure] = {}
        blocks = {each.block: each for site in ranks for each in site.attentions}
        for attention in sorted(blocks.values(), key=lambda each: each.block):
            own_sites = {site.part: site for site in ranks if site.attentions[0] == attention}
            options = dict(self.material.options)
            if self.method.stacked:
                options["blocks"] = max((len(site.attentions) for site in own_sites.values()), default=1)
            mine = {part: ranks[site] for part, site in own_sites.items()}
            structures = self.method.structures(attention.dimensions, mine, **options) if mine else {}
            for site in ranks:
                if attention in site.attentions[1:]:
                    source = site.attentions[0].places[ATTENTION].removeprefix(base_prefix(self.material.dense))
                    follow = self.method.stacked[site.part]
                    structures[ATTENTION] = follow(source, site.attentions.index(attention))
            for place in sorted(structures, key=attention.places.__getitem__):
                found[attention.places[place]] = structures[place]
        return found

    def _costs(self, site: AttentionSite, dense: int) -> dict[int, int]:
        """Stored numbers of a part at every rank: those of its weights, less what the whole attention shrinks by."""
        costs = {}
        outer = [name for attention in site.attentions for name in _outer(attention)]
        skeleton = nn.ModuleDict(
            {_key(name): copy.deepcopy(self.material.dense.get_submodule(name)) for name in outer}
        ).to("meta")
        before = cost.parameters(skeleton)
        for rank in self._ranks(site.attentions[0]):
            changed = copy.deepcopy(skeleton)
            for name, structure in self._structures({site: rank}).items():
                inside = next(each for each in outer if name == each or name.startswith(f"{each}."))
                path = _key(inside) + name.removeprefix(inside)
                changed.set_submodule(path, structure.build(changed.get_submodule(path)))
            costs[rank] = dense - before + cost.parameters(changed)
        return costs


def _outer(attention: Attention) -> list[str]:
    """The attention, and its output projection where that lies elsewhere."""
    inside = attention.places[ATTENTION]
    output = attention.places["output"]
    return [inside] if output.startswith(f"{inside}.") else [inside, output]


def _key(name: str) -> str:
    return name.replace(".", "/")
