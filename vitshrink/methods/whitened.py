"""Whitened SVD: the least output error on the calibration inputs that any rank-r matrix can have."""

from torch import Tensor

from vitshrink.errors import NumericsError
from vitshrink.methods.registry import Factorization, method
from vitshrink.statistics.algebra import eigh, square_roots
from vitshrink.statistics.needs import Needs
from vitshrink.statistics.stats import LinearStats


@method("whitened", needs=Needs.COVARIANCE, compensation="bias")
def whitened(weight: Tensor, stats: LinearStats | None, *, centered: bool = True) -> Factorization:
    """Least output error on the calibration data (SVD-LLM, arXiv 2403.07378; affine form AFM, AAAI 2023).

    min E‖W x − Ŵ x‖² over rank r is Ŵ = U_r U_rᵀ W with W C Wᵀ = U Λ Uᵀ, and its error is Σ_{i>r} λ_i exactly (that is
    ``loss``). Nothing is inverted, so a rank-deficient C is no special case. ``centered`` takes the mean of x out and
    leaves it to the bias, which is never worse; SVD-LLM itself does not.
    """
    if stats is None:
        raise NumericsError("whitened needs calibration statistics.")
    m, n = weight.shape
    if m <= n:
        values, U = eigh(stats.output_covariance(weight, centered=centered))
        return Factorization.from_spectrum(U, U.T @ weight, values)
    # Tall W = Q T with T = (WᵀW)^½: the problem is that of T C Tᵀ, (n, n) instead of (m, m).
    T, T_inverse = square_roots(weight.T @ weight)
    values, U = eigh(T @ stats.covariance(centered=centered) @ T)
    return Factorization.from_spectrum(weight @ T_inverse @ U, U.T @ T, values)
