"""A linear layer as two factors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.compression.candidates import Candidate, Cost, Form, Offer, Site
from vitshrink.compression.findings import Findings
from vitshrink.compression.forms.registry import Material
from vitshrink.compression.repairs.bias import SHIFTING, shifted_bias
from vitshrink.methods import Factorization
from vitshrink.methods.ranks import break_even_rank, rank_cost
from vitshrink.models.checkpoint import HEADER_BYTES, replace_layers
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.targets import Target
from vitshrink.runtime.paging import rest


@dataclass(frozen=True, slots=True)
class LowRank:
    """Two factors with ``rank`` components."""

    rank: int

    @property
    def label(self) -> str:
        return f"rank {self.rank}"

    @property
    def bits(self) -> None:
        return None


@dataclass(frozen=True, eq=False)
class LowRankMaker:
    """Offers every rank that makes a layer smaller, from factors of which a rank is a slice."""

    material: Material
    _known: dict[str, Sequence[tuple[LowRank, Cost]]] = field(default_factory=dict)

    def offers(self, findings: Findings | None = None) -> Sequence[Offer]:
        return [
            self._offer(target, None if findings is None else findings.layers[target.name])
            for target in self.material.targets
            if findings is None or target.name in findings.layers
        ]

    def makes(self, form: Form) -> bool:
        return isinstance(form, LowRank)

    @torch.no_grad()
    def build(self, model: PreTrainedModel, chosen: Mapping[str, Form], findings: Findings) -> None:
        replace_layers(model, {name: self._truncated(name, form, findings) for name, form in chosen.items()})

    def _offer(self, target: Target, found: Factorization | None) -> Offer:
        multiple, shape = self.material.multiple, target.shape
        losses, forms = self._losses(found), self._forms(target)
        candidates = [Candidate(form, cost, losses[form.rank] if losses else 0.0, form.rank) for form, cost in forms]
        return Offer.of(
            Site(target.name, "matrix", shape),
            self.material.currency,
            Candidate(None, self._timed(target, None, self.material.dense_cost(shape))),
            candidates,
            nothing=losses[0] if losses else 0.0,
            most=forms[-1][0].rank + multiple - 1 if forms else 0,
        )

    def _forms(self, target: Target) -> Sequence[tuple[LowRank, Cost]]:
        """Every rank with its cost, which does not depend on what was found: known once they were asked for."""
        if target.name not in self._known:
            multiple = self.material.multiple
            ranks = range(multiple, break_even_rank(*target.shape, self.material.storage) + 1, multiple)
            self._known[target.name] = [(LowRank(rank), self._cost(target, rank)) for rank in ranks]
        return self._known[target.name]

    def _losses(self, found: Factorization | None) -> list[float]:
        if found is None:
            return []
        loss = found.measured if self.material.measures and found.measured is not None else found.loss
        losses: list[float] = loss.tolist()
        return losses

    def _cost(self, target: Target, rank: int) -> Cost:
        material, shape = self.material, target.shape
        numbers = rank_cost(*shape, rank, material.storage)
        if material.quantization is not None:
            return Cost(numbers, material.quantization.low_rank_bytes(shape, rank, material.storage))
        found = Cost(numbers, numbers * material.itemsize + HEADER_BYTES)  # of the second factor
        return self._timed(target, rank, found)

    def _timed(self, target: Target, rank: int | None, found: Cost) -> Cost:
        prices = self.material.prices
        return found if prices is None else replace(found, nanoseconds=prices.of(target, rank))

    def _truncated(self, name: str, form: Form, findings: Findings) -> LowRankLinear:
        layer, rank = self.material.layer(name), form.rank
        up, down = findings.layers[name].up[:, :rank], findings.layers[name].down[:rank]
        bias: Tensor | None = None if layer.bias is None else layer.bias.double()
        if bias is not None and self.material.compensation in SHIFTING:
            bias = shifted_bias(bias, layer.weight.double(), up @ down, findings.stats[name].mean)
        made = LowRankLinear.from_factors(up, down, bias, dtype=layer.weight.dtype)
        rest()
        return made
