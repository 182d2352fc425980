"""Mixed-rank compression with residual error compensation."""

from torch import Tensor

from vitshrink.methods.registry import Factorization, method
from vitshrink.methods.whitened import whitened
from vitshrink.statistics.needs import Needs
from vitshrink.statistics.stats import LinearStats


@method("mixed-rank", needs=Needs.COVARIANCE, allocation="energy", compensation="residual")
def mixed_rank(weight: Tensor, stats: LinearStats | None, *, centered: bool = True) -> Factorization:
    """Activation-aware SVD, ranks by layer energy, then a learned residual (Azizi et al. 2024, arXiv 2402.06004).

    The factors are those of ``whitened``: their spectrum is the activation-weighted one whose kept share is the layer's
    energy. What makes the method is its greedy energy allocation and the residual W ≈ W_r + R that the compensation
    stage fits layer by layer. Step sizes and the rank of
    the residual are this project's own.
    """
    return whitened(weight, stats, centered=centered)
