"""Gains and biases of a compressed model that bring its outputs back to those of the dense one."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.compression.repairs.products import Product, factors_of, product_of, set_factors
from vitshrink.runtime.paging import in_file
from vitshrink.runtime.precision import Passes
from vitshrink.statistics.calibration import CalibrationBatch
from vitshrink.statistics.effects import Components, Effects, Lacking, Measure, component_effects, shortfall
from vitshrink.statistics.reference import Reference

RIDGES = tuple(10 ** (exponent / 2) for exponent in range(-6, 9))
"""Ridges to choose from, in units of a parameter's own mean squared effect."""

FLOOR = 0.1
"""Of the mean squared effect of all gains, or shifts, that is added to that of each: what does nothing (the bias of a
key, for one) must not be changed without bound."""

SHIFTS = 0.3
"""What the change of a bias may explain beside that of a gain: there are more of them, and they overfit more easily."""

STEPS = 2
"""Gauss-Newton steps, if nothing else is said: the first is long, and the effects are others after it."""

LEARNING = 5
"""Forward passes in the time of one that learns the effects of all gains and biases."""

LENGTHS = (1.0, 0.5, 0.25)
"""Of a step; the first that takes the outputs closer to those of the dense model is taken."""


@dataclass(frozen=True, eq=False)
class Repair:
    """Changes that explain what the compressed model lacks, and how well, on samples they were not fitted to."""

    gains: Mapping[str, Tensor]
    """c (k,) of the components of each layer: they are multiplied by 1 + c."""
    shifts: Mapping[str, Tensor]
    """(m,) to be added to the bias of each layer."""
    ridge: float
    explained: float
    """Share of the squared difference of the outputs, by leave-one-out."""


def forward_passes(samples: int, steps: int = STEPS) -> int:
    """Forward passes of a sample that the steps take, if every first length is good."""
    return steps * (LEARNING + 1) * samples


@torch.no_grad()
def rescale_components(
    model: PreTrainedModel,
    reference: Reference,
    names: Sequence[str],
    means: Mapping[str, Tensor] | None,
    batches: Sequence[CalibrationBatch],
    *,
    steps: int = STEPS,
    seed: int = 0,
    passes: Passes = nullcontext,
    measure: Measure = component_effects,
    lacking: Lacking = shortfall,
    pages: Path | None = None,
    on_passes: Callable[[int], None] = lambda _passes: None,
) -> int:
    """Fit a gain for every component of the smaller layers ``names``, and their biases, in place; no size changes.

    What truncation takes away has a systematic part: fewer components of queries and keys, for one, leave every
    attention flatter. Gauss-Newton steps on the gains and biases of all layers at once take that part back: c minimizes
    Σ (t_s − φ_s·c)² + ρ Σ_i E[φ_i²] c_i² / w_i, with t what the compressed model lacks along a random direction of its
    output that is as long as the Fisher information of the softmax is there, φ the effects of what c changes, and w
    ``SHIFTS`` for biases and 1 for gains. The ridge ρ is the one with the least leave-one-out error. A step that does
    not help, on the samples themselves or on those left out, is not taken.

    Args:
        reference: the outputs of the dense model.
        means: of the inputs (n,) of each layer; a gain leaves the mean output as it is. Zeros for layers without bias.
            None: there are no gains, only biases, and the layers may be dense.
        measure, lacking: how effects, and what is missing after a step, are found over all batches.
        pages: where the factors before a step lie, if they take much room; in memory if it is None.
        on_passes: called with the number of forward passes of a sample after each batch, see ``forward_passes``.

    Returns:
        the number of steps taken, 0 to ``steps``.
    """
    if not names:
        return 0
    for step in range(steps):
        found: dict[str, tuple[Product, Components]] = {}
        for name in names:
            layer = product_of(model, name)
            found[name] = layer, _nothing(layer) if means is None else _components(layer, means[name], pages)
        components = {name: parts for name, (_, parts) in found.items()}
        effects = measure(
            model,
            components,
            batches,
            reference=reference,
            seed=seed + step,
            passes=passes,
            on_batch=lambda samples: on_passes(LEARNING * samples),
        )
        repair = best_repair(effects)
        if repair is None:
            return step
        assert effects.missing is not None
        biases = {name: layer.bias.double() for name, (layer, _) in found.items() if layer.bias is not None}
        for length in (*LENGTHS, 0.0):
            for name, (layer, parts) in found.items():
                gain = length * repair.gains[name]
                up, down = parts.up.double(), parts.down.double()
                if means is not None:
                    set_factors(layer, up * (1 + gain), down)
                if layer.bias is not None:
                    moved = (up * gain) @ (down @ parts.mean)
                    layer.bias.copy_(biases[name] - moved + length * repair.shifts[name])
            if length == 0:
                return step
            now = lacking(model, reference, batches, seed=seed + step, passes=passes, on_batch=on_passes)
            if now.square().mean() < effects.missing.square().mean():
                break
    return steps


def _components(layer: Product, mean: Tensor, pages: Path | None) -> Components:
    """Those of a smaller layer, as they are before a step."""
    up, down = (in_file(factor.clone(), pages) for factor in factors_of(layer))
    return Components(up, down, mean, own=True)


def _nothing(layer: Product) -> Components:
    """None of a layer of which only the bias is fitted."""
    weight = layer.weight
    return Components(
        weight.new_zeros(layer.out_features, 0),
        weight.new_zeros(0, layer.in_features),
        weight.new_zeros(layer.in_features).double(),
    )


def best_repair(effects: Effects) -> Repair | None:
    """Kernel ridge regression over the samples; None where no change explains anything."""
    missing = effects.missing
    assert missing is not None
    nothing = float(missing.square().mean())
    if len(missing) < 2 or nothing == 0:
        return None
    gains, shifts = Weighted.of(effects.layers), Weighted.of(effects.shifts, SHIFTS)
    kernel = missing.new_zeros(len(missing), len(missing))
    for weighted in (gains, shifts):
        for name, plain in weighted.effects.items():
            kernel += weighted[name] @ plain.double().T
    values, vectors = torch.linalg.eigh(kernel)
    errors, duals = [], []
    for ridge in RIDGES:
        inverse = (values.clamp_min(0) + len(missing) * ridge).reciprocal()
        duals.append(vectors @ (inverse * (vectors.T @ missing)))
        errors.append(float((duals[-1] / (vectors.square() @ inverse)).square().mean()))
    best = min(range(len(RIDGES)), key=errors.__getitem__)
    if not errors[best] < nothing:
        return None
    return Repair(
        {name: gains[name].T @ duals[best] for name in effects.layers},
        {name: shifts[name].T @ duals[best] for name in effects.shifts},
        RIDGES[best],
        1 - errors[best] / nothing,
    )


@dataclass(frozen=True, eq=False)
class Weighted:
    """Effects over their own mean squares, which the floor keeps from zero; times ``weight``. Made when asked for."""

    effects: Mapping[str, Tensor]
    power: Mapping[str, Tensor]
    floor: Tensor
    weight: float

    @classmethod
    def of(cls, effects: Mapping[str, Tensor], weight: float = 1.0) -> "Weighted":
        power = {name: each.double().square().mean(0) for name, each in effects.items()}
        return cls(effects, power, FLOOR * torch.cat(list(power.values())).mean(), weight)

    def __getitem__(self, name: str) -> Tensor:
        """(samples, k), float64."""
        each = self.effects[name].double()
        return self.weight * each / (self.power[name] + self.floor).clamp_min(1e-300)
