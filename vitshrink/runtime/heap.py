"""Memory that was freed, handed back to the system."""

import ctypes
import sys

import psutil

GROWTH = 2**26
"""Bytes by which a process may grow before what it has freed is looked for."""

_before: int | None = None
"""Bytes that the process took at the first look since it last handed memory back."""


def give_back() -> None:
    """Hand back what glibc keeps because something above it is still in use: hundreds of megabytes after a pass."""
    global _before  # noqa: PLW0603 - of the process, as its memory is
    _before = None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def give_back_growth() -> None:
    """The same after steps that are alike, where the process has grown since the first one of them.

    What a step has freed, the next one takes again at no cost; handed back, it has to be fetched and cleared first.
    """
    global _before  # noqa: PLW0603 - of the process, as its memory is
    now = psutil.Process().memory_info().rss
    if _before is None:
        _before = now
    elif now > _before + GROWTH:
        give_back()
