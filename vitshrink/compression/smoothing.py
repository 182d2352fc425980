"""Spread between channels, moved from where it would be rounded to where it does no harm.

Inputs are divided by channel and weights multiplied (SmoothQuant, arXiv 2211.10438) wherever another layer can absorb
that; else the layer itself multiplies its inputs, of which it divides a few.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitshrink.compression.grids import best_grid
from vitshrink.compression.products import Product, divide, peaks_of, values_of
from vitshrink.compression.static_layers import steps_of

MOVED = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Exponents of an input channel's peak in what it is divided by, its weights being multiplied by the same."""

FLOOR = 1e-3
"""Least peak of a channel that is told from others, of the largest."""

FEW = (1, 2, 4, 8)
"""Channels that stand out, at most: they are divided so that they reach as far as the others."""

SAVED = 1e-5
"""Loss that a layer has to save to multiply its inputs itself, in nats: runtimes need time for that."""


def smooth(giver: nn.Module | Product, readers: Sequence[Product], dtype: torch.dtype) -> None:
    """Divide what a norm or a layer gives by what is best for all readers."""
    logs = _logs(peaks_of(readers))
    scales = [logs.mul(exponent).exp() for exponent in MOVED]
    scale = min(scales, key=lambda each: _loss(readers, each, dtype))
    if isinstance(giver, Product):
        giver.give_divided(scale)
    else:
        divide(giver, scale)
    for reader in readers:
        reader.read_divided(scale)


def smooth_itself(readers: Sequence[Product], dtype: torch.dtype) -> None:
    """Let layers that read the same divide the inputs of a few channels, if that pays.

    Of a few: many channels are large in few samples, and what divides all by what was seen clips what was not.
    """
    peaks = peaks_of(readers)
    found = []
    for others in peaks.sort(descending=True).values[[0, *(few for few in FEW if few < len(peaks))]].tolist():
        scale = (peaks / max(others, 1e-30)).clamp_min(1.0)
        found.append((_loss(readers, scale, dtype), scale))
    loss, scale = min(found, key=lambda each: each[0])
    if found[0][0] - loss > SAVED:
        for reader in readers:
            reader.read_divided(scale)
            reader.factors = 1 / scale


def _logs(peaks: Tensor) -> Tensor:
    """Relative to their mean."""
    logs = peaks.clamp_min(FLOOR * peaks.amax().clamp_min(1e-30)).log()
    return logs - logs.mean()


def _loss(readers: Sequence[Product], scale: Tensor, dtype: torch.dtype) -> float:
    """Of inputs that are rounded once for all readers, and of weights that are rounded to the nearest."""
    loss = best_grid(values_of(readers, scale), dtype)[1]
    for reader in readers:
        weight = reader.weight * scale
        steps = steps_of(weight, dtype)
        errors = weight - (weight / steps).round() * steps
        power = reader.covariance.diagonal().float() / scale.square()
        loss += 0.5 * float(reader.outputs.float() @ errors.square() @ power)
    return loss
