"""The arithmetic in which a model runs its forward and backward passes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
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


def mixed_type(device: torch.device) -> torch.dtype | None:
    """In which products are at the moment, where they are in mixed precision."""
    known = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if known else None


def is_narrow(passes: Passes, device: torch.device) -> bool:
    """Whether products of the passes are in bfloat16."""
    with passes():
        return mixed_type(device) == torch.bfloat16


@contextmanager
def narrow_products(narrow: bool = True) -> Iterator[None]:
    """Inside, if ``narrow``, products of float32 matrices on a CPU round what they multiply to bfloat16.

    They sum in float32, and their results stay what they are; numbers that come from bfloat16 lose nothing.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    try:
        if narrow:
            matmul.fp32_precision = "bf16"
        yield
    finally:
        matmul.fp32_precision = before
