"""Amounts as people write them: sizes, times, shares, and the bits of an integer weight."""

import re
from fractions import Fraction
from typing import Literal

from vitshrink.config.fields import did_you_mean
from vitshrink.errors import UsageError

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmg]i?)?b?\s*", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_quantity(text: str, flag: str) -> int:
    """``22M`` parameters or ``90MB`` bytes as a whole number. Raises UsageError."""
    match = _SIZE.fullmatch(str(text))
    number = int(Fraction(match[1]) * _UNITS[(match[2] or "").lower()]) if match else 0
    if not number:
        raise UsageError(f"{flag}: cannot read {text!r}; write a number with k, M or G, such as 22M or 90MB.")
    return number


def share_of(share: float, total: int) -> int:
    """A part of ``total``, rounded down, with the share taken as it is written: 0.29 of 100 is 29."""
    return int(Fraction(str(share)) * total)


def parse_duration(text: str, flag: str) -> float:
    """``90``, ``90s``, ``30m`` or ``1.5h`` as seconds. Raises UsageError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([smh]?)\s*", text)
    if not match or float(match[1]) == 0:
        raise UsageError(f"{flag}: cannot read {text!r}; write a time such as 90s, 30m or 1.5h.")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


_LATENCY = {"us": 1e3, "ms": 1e6, "s": 1e9}


def parse_latency(text: str, flag: str) -> tuple[float, bool]:
    """``5ms`` in nanoseconds, or ``0.6``, a share of a time, and whether it is one. Raises UsageError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(us|ms|s)?\s*", str(text))
    number, unit = (float(match[1]), match[2]) if match else (0.0, None)
    if not number or (unit is None and number >= 1):
        raise UsageError(
            f"{flag}: cannot read {text!r}; write a share of the dense model's time below 1, such as 0.6, or a time "
            "such as 5ms."
        )
    return (number, True) if unit is None else (number * _LATENCY[unit], False)


def quantized_bits(weights: str, activations: str | None) -> tuple[int, Literal["none", "dynamic"]]:
    """Bits of a weight and how activations are treated, by default the faster way. Raises UsageError."""
    if weights not in ("int8", "int4"):
        raise UsageError(f"weights cannot be stored as {weights!r}. {did_you_mean(weights, ('int8', 'int4'))}")
    if activations == "static":
        raise UsageError(
            "--activations static belongs to `vitshrink quantize … --calibration …`, which also takes compressed "
            "models."
        )
    if activations not in (None, "none", "dynamic"):
        raise UsageError(f"--activations {activations}: {did_you_mean(activations, ('none', 'dynamic'))}")
    if weights == "int4":
        if activations == "dynamic":
            raise UsageError("int4 weights are multiplied in floating point: use --activations none.")
        return 4, "none"
    return 8, "none" if activations == "none" else "dynamic"
