"""Gains for the components of a compressed model that bring its outputs back to those of the dense one."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.calibration import CalibrationBatch
from vitshrink.effects import Components, Effects, component_effects
from vitshrink.lowrank import LowRankLinear
from vitshrink.precision import Passes

RIDGES = tuple(10 ** (exponent / 2) for exponent in range(-6, 9))
"""Ridges to choose from, in units of a component's own mean squared effect."""


@dataclass(frozen=True)
class Rescaling:
    """How well the gains explain what the compressed model lacks on samples they were not fitted to.

    Attributes:
        ridge: None where no gain helped, and nothing was changed.
        explained: share of the squared difference of the outputs, by leave-one-out; 0 without gains.
    """

    ridge: float | None
    explained: float


@torch.no_grad()
def rescale_components(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    names: Sequence[str],
    means: Mapping[str, Tensor],
    batches: Sequence[CalibrationBatch],
    *,
    seed: int = 0,
    passes: Passes = nullcontext,
    on_batch: Callable[[int], None] = lambda _samples: None,
) -> Rescaling:
    """Multiply every component of the low-rank layers ``names`` by its own gain 1 + c, in place; no size changes.

    What truncation takes away has a systematic part: fewer components of queries and keys, for one, leave every
    attention flatter. One Gauss-Newton step on the gains of all layers at once takes that part back: c minimises
    Σ (t_s − φ_s·c)² + ρ Σ_i E[φ_i²] c_i², with t what the compressed model lacks along a random direction of its output
    that is as long as the Fisher information of the softmax is there, and φ the effects of its components. The ridge ρ
    is the one with the least leave-one-out error, and where none is better than no gains at all, nothing is done.

    Args:
        means: of the inputs (n,) of each layer; a gain leaves the mean output as it is. Zeros for layers without bias.
    """
    layers = {name: model.get_submodule(name) for name in names}
    components = {}
    for name, layer in layers.items():
        assert isinstance(layer, LowRankLinear)
        up, down = layer.factors()
        components[name] = Components(up.double(), down.double(), means[name])
    effects = component_effects(
        model, components, batches, reference=dense, seed=seed, passes=passes, on_batch=on_batch
    )
    gains, fit = best_gains(effects)
    for name, gain in gains.items():
        layer, parts = layers[name], components[name]
        assert isinstance(layer, LowRankLinear)
        if layer.bias is not None:
            layer.bias.sub_(((parts.up * gain) @ (parts.down @ parts.mean)).to(layer.bias))
        layer.set_factors(parts.up * (1 + gain), parts.down)
    return fit


def best_gains(effects: Effects) -> tuple[dict[str, Tensor], Rescaling]:
    """The gains c (k,) of each layer, none where they would not help, by kernel ridge regression over the samples."""
    missing = effects.missing
    assert missing is not None
    power = {name: each.square().mean(0) for name, each in effects.layers.items()}
    weighted = {
        name: each * torch.where(power[name] > 0, power[name], 1).reciprocal() for name, each in effects.layers.items()
    }
    kernel = sum((weighted[name] @ each.T for name, each in effects.layers.items()), missing.new_zeros(()))
    nothing = float(missing.square().mean())
    if len(missing) < 2 or nothing == 0 or not effects.layers:
        return {}, Rescaling(None, 0.0)
    values, vectors = torch.linalg.eigh(kernel)
    best: tuple[float, float, Tensor] | None = None
    for ridge in RIDGES:
        inverse = (values.clamp_min(0) + len(missing) * ridge).reciprocal()
        dual = vectors @ (inverse * (vectors.T @ missing))
        left_out = dual / (vectors.square() @ inverse)
        error = float(left_out.square().mean())
        if best is None or error < best[0]:
            best = (error, ridge, dual)
    assert best is not None
    if best[0] >= nothing:
        return {}, Rescaling(None, 0.0)
    return {name: each.T @ best[2] for name, each in weighted.items()}, Rescaling(best[1], 1 - best[0] / nothing)
