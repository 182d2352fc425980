"""A linear layer, an embedding or the patch projection as entropy-coded integers of any fineness."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.compression.candidates import Candidate, Cost, Form, Kind, Offer, Site
from vitshrink.compression.findings import Findings
from vitshrink.compression.forms.registry import Material
from vitshrink.compression.rounding import LARGEST, Metric, at_each, entropy, rounded
from vitshrink.models.checkpoint import HEADER_BYTES, replace_layers
from vitshrink.models.codes import STEPS
from vitshrink.models.structures.coded import Coded, dense_tensor, has_positions
from vitshrink.runtime.paging import rest

LEVELS_A_BIT = 4
"""Levels of fineness between one bit a weight and the next."""

FEWEST, MOST = 0.1, 10.0
"""Bits a weight that are on offer."""

CODING = 0.96
"""What a stream takes besides its steps, of the entropy of all integers of a matrix, at 2 to 6 bits a weight: rows and
columns differ."""

SMOOTH = 4
"""Bits a weight from which on another bit quarters the loss, so that few levels tell of all."""

ROWS = 48
"""Rows of a matrix, about, from which bits and losses of its candidates are estimated."""

UNSEEN_LEVEL = 16
"""Of a matrix that the outputs do not depend on: six bits a weight, errors of two percent."""

GAUSSIAN = 2.05
"""Bits that the entropy of a normal variable in units of its deviation has above their logarithm."""


@dataclass(frozen=True, slots=True)
class Integers:
    """At δ = 2^(-level / 4), which comes to about ``bits`` a weight."""

    level: int
    bits: float

    @property
    def label(self) -> str:
        return f"{self.bits:.1f} bits"

    @property
    def rank(self) -> None:
        return None

    @property
    def fineness(self) -> float:
        return fineness_of(self.level)


def fineness_of(level: float) -> float:
    """δ of a level."""
    return float(2 ** (-level / LEVELS_A_BIT))


@dataclass(frozen=True, eq=False)
class CodedMaker:
    """Offers every matrix of ``sites`` in steps of a quarter of a bit."""

    material: Material
    sites: Sequence[str]
    _made: dict[tuple[str, int], tuple[Metric, nn.Module]] = field(default_factory=dict)

    def offers(self, findings: Findings | None = None) -> Sequence[Offer]:
        return [
            self._offer(name, None if findings is None else findings.layers[name])
            for name in self.sites
            if findings is None or name in findings.layers
        ]

    def makes(self, form: Form) -> bool:
        return isinstance(form, Integers)

    @torch.no_grad()
    def build(self, model: PreTrainedModel, chosen: Mapping[str, Form], findings: Findings) -> None:
        made = {name: self._coded(name, chosen[name], findings) for name in sorted(chosen)}  # a module before its own
        replace_layers(model, made)

    def _coded(self, name: str, form: Form, findings: Findings) -> nn.Module:
        assert isinstance(form, Integers)
        metric = findings.layers[name]
        known = self._made.get((name, form.level))
        if known is None or known[0] is not metric:
            known = self._made[name, form.level] = metric, self._rounded(name, form, findings)
        return copy.deepcopy(known[1])  # a model gets modules of its own

    def _rounded(self, name: str, form: Integers, findings: Findings) -> nn.Module:
        module = self.material.dense.get_submodule(name)
        found = rounded(matrix_of(module), findings.layers[name], form.fineness, self.material.dtype)
        made = Coded.from_codes(module, found.rows, found.codes)
        rest()
        known = findings.stats.get(name)
        mean = None if known is None else known.mean
        bias = module.bias if isinstance(module, nn.Linear | nn.Conv2d) else None
        if bias is not None and mean is not None:
            made.bias = nn.Parameter(
                (bias.double() + found.errors.double() @ mean).to(bias.dtype), requires_grad=bias.requires_grad
            )
        return made

    @torch.no_grad()
    def _offer(self, name: str, metric: Metric | None) -> Offer:
        module = self.material.dense.get_submodule(name)
        weight = matrix_of(module)
        numbers, shape = weight.numel(), (weight.shape[0], weight.shape[1])
        kept = Candidate(None, Cost(numbers, numbers * self.material.itemsize))
        kind: Kind = "embedding" if isinstance(module, nn.Embedding) or has_positions(module) else "matrix"
        overhead = STEPS.itemsize * sum(shape) + HEADER_BYTES
        known = [(0, FEWEST, 0.0)] if metric is None else estimates(weight, metric)
        candidates = [
            Candidate(Integers(level, round(bits, 2)), Cost(numbers, int(CODING * bits * numbers / 8) + overhead), loss)
            for level, bits, loss in known
        ]
        nothing = 0.0 if metric is None else metric.loss(weight.float())
        rest()
        return Offer.of(Site(name, kind, shape), self.material.currency, kept, candidates, nothing=nothing)


def matrix_of(module: nn.Module) -> Tensor:
    """The matrix of a linear layer, a table or a convolution, or the positions of an image model, (m, n)."""
    return dense_tensor(module).detach().flatten(1)


def estimates(weight: Tensor, metric: Metric) -> Iterator[tuple[int, float, float]]:
    """(level, bits a weight, loss), from coarse to fine, from evenly spaced rows: each is rounded by itself."""
    every = max(1, weight.shape[0] // ROWS)
    some, part = weight[::every], replace(metric, weights=metric.weights[::every])
    share = some.shape[0] / weight.shape[0]
    size = (some.float() / (part.rows[:, None] * part.columns)).square().mean().clamp_min(1e-30).sqrt()
    levels = list(_levels(float(size))) if metric.seen else [UNSEEN_LEVEL]
    known = []
    for level, (integers, _, loss) in zip(levels, at_each(some, part, map(fineness_of, levels)), strict=True):
        bits = entropy(integers)
        if FEWEST <= bits <= MOST and integers.abs().max() < LARGEST:
            known.append((level, bits, loss / share))
    return between(known)


def _levels(size: float) -> Iterator[int]:
    """At which weights of this root mean square, in steps at δ = 1, have 0 to 11 bits, about.

    Every one up to ``SMOOTH`` bits, and above a bit apart.
    """
    first = int(LEVELS_A_BIT * (1 - GAUSSIAN - math.log2(size)))
    yield from range(first - 2 * LEVELS_A_BIT, first + (SMOOTH - 1) * LEVELS_A_BIT)
    yield from range(first + (SMOOTH - 1) * LEVELS_A_BIT, first + int(MOST) * LEVELS_A_BIT, LEVELS_A_BIT)


def between(known: Sequence[tuple[int, float, float]]) -> Iterator[tuple[int, float, float]]:
    """(level, bits a weight, loss) of every level from the first to the last of those that are known.

    Bits and the logarithm of the loss follow straight lines in between.
    """
    for (low, bits, loss), (high, more_bits, less) in pairwise(known):
        for level in range(low, high):
            share = (level - low) / (high - low)
            yield level, bits + share * (more_bits - bits), loss ** (1 - share) * less**share
    yield from known[-1:]
