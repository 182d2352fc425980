"""The arithmetic in which a model runs its forward and backward passes."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Passes = Callable[[], AbstractContextManager[Any]]
"""Opened around every forward pass."""

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(device: torch.device, wanted: str) -> str:
    """``auto`` is ``bf16`` where the processor is known to multiply it faster than float32, and else ``no``."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    # torch 2.10 does not tell what a CPU can
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "no"


def passes_in(device: torch.device, wanted: str) -> Passes:
    """Mixed precision: products in the narrow type, sums that lose by it in float32."""
    precision = resolve_precision(device, wanted)
    if precision == "no":
        return nullcontext
    return lambda: torch.autocast(device.type, _TYPES[precision])


def in_full(device: torch.device) -> AbstractContextManager[Any]:
    """No mixed precision inside; some devices have none."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()
