"""Memory that was freed, handed back to the system."""

import ctypes
import sys


def give_back() -> None:
    """Hand back what glibc keeps because something above it is still in use: hundreds of megabytes after a pass."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
