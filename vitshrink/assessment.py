"""The old place of ``vitshrink.jobs.evaluate``."""

import warnings

from vitshrink.jobs.evaluate import Assessment, evaluate_checkpoint

__all__ = ["Assessment", "evaluate_checkpoint"]

warnings.warn("vitshrink.assessment is now vitshrink.jobs.evaluate: import from there.", FutureWarning, stacklevel=2)
