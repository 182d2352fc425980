"""Options of jobs as objects. ``CompressConfig`` has the flags of ``vitshrink compress``, and so on.

These imports are public. Code of the package imports from the modules.
"""

from vitshrink.config.options import CompressConfig, DataConfig, FinetuneConfig, FinetuneJob

__all__ = ["CompressConfig", "DataConfig", "FinetuneConfig", "FinetuneJob"]
