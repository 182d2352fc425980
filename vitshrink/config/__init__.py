"""What a job is asked to do: groups of options, the jobs made of them, recipes, and names that are safe to write.

These are for users; within the package each is imported from where it lies.
"""

from vitshrink.config.options import CompressConfig, DataConfig, FinetuneConfig, FinetuneJob

__all__ = ["CompressConfig", "DataConfig", "FinetuneConfig", "FinetuneJob"]
