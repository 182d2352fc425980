"""vitshrink: post-training compression of ViT, DeiT and BERT checkpoints.

Importing it teaches transformers to load compressed checkpoints.
"""

__version__ = "0.1.0.dev0"

from vitshrink import hf_quantizer
from vitshrink.checkpoint import load

__all__ = ["__version__", "hf_quantizer", "load"]
