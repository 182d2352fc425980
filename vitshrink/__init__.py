"""vitshrink: post-training compression of transformer encoders such as ViT, DeiT and BERT.

``import vitshrink`` registers the format, so that transformers can load compressed checkpoints. It imports neither
torch nor transformers. ``vitshrink.compress`` and ``vitshrink.load`` are imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vitshrink._version import __version__
from vitshrink.models.autoload import teach_transformers

if TYPE_CHECKING:
    from vitshrink.jobs.in_memory import Compressed, compress
    from vitshrink.models import hf_quantizer
    from vitshrink.models.checkpoint import load

__all__ = ["Compressed", "__version__", "compress", "hf_quantizer", "load"]

_PLACES = {
    "Compressed": "vitshrink.jobs.in_memory",
    "compress": "vitshrink.jobs.in_memory",
    "load": "vitshrink.models.checkpoint",
}

teach_transformers()


def __getattr__(name: str) -> Any:
    if name == "hf_quantizer":
        return importlib.import_module("vitshrink.models.hf_quantizer")
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'vitshrink' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
