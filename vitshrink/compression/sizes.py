"""The sizes that a job asks for, as budgets of the whole model."""

import math
from dataclasses import dataclass

import torch

from vitshrink.compression.compressor import Compressor
from vitshrink.compression.fitting import file_bytes
from vitshrink.config.options import CompressConfig, parse_quantity, share_of
from vitshrink.errors import TargetError
from vitshrink.models.checkpoint import HEADER_BYTES

STREAM_ENTRY = 70
"""Bytes that a stream of integers adds to the header of the file, about, beside the name of its layer."""

LEFT = {
    "bits": "the parts that are not rounded, with a tenth of a bit for every other weight,",
    "narrow": "the parts that cannot be narrower, with the fewest neurons and the smallest heads everywhere else,",
    "rank": "the parts that are not factorized, with rank {} everywhere else,",
    "rank+narrow": "the unchanged parts, with rank {} or the fewest neurons and the smallest heads everywhere else,",
}
"""Of the smallest model, by what layers become; with the rank that it has."""


@dataclass(frozen=True)
class Size:
    """One requested size."""

    label: str
    """Name of the output below the given one, where there are several."""
    budget: int
    """Parameters of the whole model that may be stored, or bytes (``config.counts_bytes``)."""


def as_integers(config: CompressConfig) -> str:
    """`` as int8``, where a job rounds all weights."""
    return "" if config.rounded_to is None else f" as {config.rounded_to}"


def requested_sizes(compressor: Compressor, dtype: torch.dtype) -> list[Size]:
    """The requested sizes as budgets of the whole model. Raises TargetError for what no rank can reach."""
    config, total, least = compressor.config, compressor.whole, compressor.least_budget()
    if config.bits is not None:
        sizes = [Size("", _bytes_of(compressor, config.bits))]
    elif config.keep:
        sizes = [Size(f"keep-{keep}", share_of(keep, total)) for keep in config.keep]
    elif config.target_params:
        sizes = [Size("", parse_quantity(config.target_params, "--target-params"))]
    elif config.target_size:
        room = parse_quantity(config.target_size, "--target-size")
        sizes = [Size("", budget_of(compressor, room, dtype))]
    else:
        sizes = [Size("", total - 1)]  # asked for by rank or by quality: any size but that of the dense model
    what = f"bytes{as_integers(config)}" if config.counts_bytes else "parameters"
    for size in sizes:
        if least >= total:
            raise TargetError(
                f"no layer becomes smaller at a rank that is a multiple of {config.rank_multiple}: use a smaller "
                "--rank-multiple."
            )
        if size.budget >= total:
            raise TargetError(
                f"{config.model} has only {total:,} {what}: use a smaller size"
                + (", or run `vitshrink quantize`." if config.counts_bytes else ".")
            )
        if size.budget < least:
            reachable = (
                f"--target-size {_up(least / 1e6)}MB"
                if config.counts_bytes
                else f"--keep {_up(least / total)}, --target-params {least} or "
                f"--target-size {_up(file_of(compressor, least, dtype) / 1e6)}MB"
            )
            left = LEFT[config.stores].format(config.rank_multiple)
            raise TargetError(
                f"cannot reach {max(size.budget, 0):,} {what}: {left} need {least:,} of {total:,}. The smallest "
                f"possible size is {reachable}."
                + (" To go lower, choose more --layers." if config.layers != "all" or config.exclude else "")
            )
    return sizes


def _bytes_of(compressor: Compressor, bits: float) -> int:
    """Of the file in which a weight that is rounded takes so many bits on average."""
    offers = compressor.offers()
    numbers = sum(offer.kept.cost.parameters for offer in offers)
    others = file_bytes(compressor.dense, compressor) - numbers * compressor.material.itemsize
    return others + sum(STREAM_ENTRY + len(offer.name) for offer in offers) + int(bits * numbers / 8)


def budget_of(compressor: Compressor, room: int, dtype: torch.dtype) -> int:
    """What a model may take whose file of weights may take ``room`` bytes."""
    return room if compressor.config.counts_bytes else (room - _header(compressor)) // dtype.itemsize


def file_of(compressor: Compressor, budget: int, dtype: torch.dtype) -> int:
    """Bytes of the file of weights of a model that takes ``budget``."""
    return budget if compressor.config.counts_bytes else budget * dtype.itemsize + _header(compressor)


def _header(compressor: Compressor) -> int:
    return HEADER_BYTES * (len(compressor.dense.state_dict()) + 2 * len(compressor.sites))


def _up(number: float) -> str:
    """Rounded up to three decimals, so that what a message calls reachable is."""
    return f"{math.ceil(number * 1000) / 1000:g}"
