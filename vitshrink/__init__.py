"""vitshrink: post-training compression of ViT, DeiT and BERT checkpoints.

Importing it teaches transformers to load compressed checkpoints.
"""

from typing import TYPE_CHECKING, Any

from vitshrink._version import __version__
from vitshrink.models import hf_quantizer
from vitshrink.models.checkpoint import load

if TYPE_CHECKING:
    from vitshrink.jobs.in_memory import Compressed, compress

__all__ = ["Compressed", "__version__", "compress", "hf_quantizer", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Compressed", "compress"):  # on first use: who only loads a model need not wait for what compresses
        from vitshrink.jobs import in_memory as api

        return getattr(api, name)
    raise AttributeError(f"module 'vitshrink' has no attribute {name!r}")
