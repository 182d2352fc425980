"""vitshrink: post-training compression of ViT, DeiT and BERT checkpoints."""

__version__ = "0.1.0.dev0"
