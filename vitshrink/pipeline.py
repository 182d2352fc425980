"""The old place of ``vitshrink.jobs.compress``."""

import warnings

from vitshrink.jobs.compress import CompressionResult, compress

__all__ = ["CompressionResult", "compress"]

warnings.warn("vitshrink.pipeline is now vitshrink.jobs.compress: import from there.", FutureWarning, stacklevel=2)
