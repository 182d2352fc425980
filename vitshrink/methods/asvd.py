"""ASVD: channels that carry large activations are kept more exactly."""

from torch import Tensor

from vitshrink.errors import NumericsError, UsageError
from vitshrink.methods.registry import Factorization, method
from vitshrink.statistics.algebra import full_svd
from vitshrink.statistics.needs import Needs
from vitshrink.statistics.stats import LinearStats


def _scales(stats: LinearStats | None, alpha: float, scaling: str) -> tuple[Tensor, Tensor]:
    """S as a share of its largest entry, (n,), and that entry."""
    if stats is None or stats.abs_mean is None or stats.abs_max is None:
        raise NumericsError("asvd needs calibration statistics.")
    scales = {"abs-mean": stats.abs_mean, "abs-max": stats.abs_max}.get(scaling)
    if scales is None:
        raise UsageError(f"unknown scaling {scaling!r}. Available: abs-mean, abs-max.")
    largest = scales.max().clamp_min(1e-300)
    return (scales / largest).clamp_min(1e-6) ** alpha, largest**alpha


@method("asvd", needs=Needs.SCALES)
def asvd(
    weight: Tensor, stats: LinearStats | None, *, centered: bool = False, alpha: float = 0.5, scaling: str = "abs-mean"
) -> Factorization:
    """SVD of W S with S = diag(E|x_j|^α) (ASVD, Yuan et al. 2023, arXiv 2312.05821).

    Ŵ = P_r(W S) S⁻¹; ``loss`` is ‖(W − Ŵ) S‖_F². After a LayerNorm the channel scales are nearly equal, and the result
    is then close to plain SVD. ``scaling`` is ``abs-mean`` or ``abs-max``. Dead channels get the smallest scale that
    still inverts, since nothing is known of them.
    """
    S, unit = _scales(stats, alpha, scaling)
    U, values, Vh = full_svd(weight * S)
    return Factorization.from_spectrum(U * values, Vh / S, (values * unit).square())
