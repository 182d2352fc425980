"""vitshrink: post-training compression of ViT, DeiT and BERT checkpoints.

Importing it teaches transformers to load compressed checkpoints.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

from vitshrink import hf_quantizer
from vitshrink.checkpoint import load

if TYPE_CHECKING:
    from vitshrink.api import Compressed, compress

__all__ = ["Compressed", "__version__", "compress", "hf_quantizer", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Compressed", "compress"):  # on first use: who only loads a model need not wait for what compresses
        from vitshrink import api

        return getattr(api, name)
    raise AttributeError(f"module 'vitshrink' has no attribute {name!r}")
