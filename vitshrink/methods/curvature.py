"""Curvature-aware factorization: what a layer loses is measured at the model's output."""

import torch
from torch import Tensor

from vitshrink.errors import NumericsError
from vitshrink.methods.registry import Factorization, method
from vitshrink.methods.whitened import whitened
from vitshrink.statistics.algebra import eigh, roots
from vitshrink.statistics.needs import Needs
from vitshrink.statistics.stats import LinearStats


@method("curvature", needs=Needs.CURVATURE, allocation="measured", compensation="stream", storage="gauge")
def curvature(
    weight: Tensor, stats: LinearStats | None, *, centered: bool = True, shrinkage: float = 0.1
) -> Factorization:
    """Least loss at the model's output, to second order, in one unit for all layers (K-FAC, arXiv 1503.05671).

    A change ΔW costs tr(H ΔW C ΔWᵀ) with the input covariance C and the label-free output curvature H. So
    R W C^½ = U Σ Vᵀ with RᵀR = H is truncated: Ŵ = R⁻¹ U_r U_rᵀ R W, and ``loss`` is Σ_{i>r} σ_i², computed from the
    smaller of R (W C Wᵀ) Rᵀ and T C Tᵀ with TᵀT = Wᵀ H W. ``shrinkage`` pulls H towards its mean eigenvalue: an
    estimate from a few hundred samples overrates the directions it has seen.
    """
    if stats is None or (stats.gradient_gram is None and stats.input_gradient_gram is None):
        raise NumericsError("curvature needs calibration statistics with gradients.")
    m = weight.shape[0]
    floor = shrinkage * stats.gradient_power / m
    if stats.gradient_power <= 0:  # nothing at this layer reaches the output: any factors do, at no loss
        free = whitened(weight, stats, centered=centered)
        return Factorization(free.up, free.down, torch.zeros_like(free.loss))
    if stats.gradient_gram is not None:
        H = (1 - shrinkage) * stats.gradient_gram + floor * torch.eye(m, dtype=weight.dtype, device=weight.device)
        root, inverse = roots(H)
        values, U = eigh(root @ stats.output_covariance(weight, centered=centered) @ root.T)
        return Factorization.from_spectrum(inverse @ U, U.T @ root @ weight, values)
    assert stats.input_gradient_gram is not None
    T, T_inverse = roots((1 - shrinkage) * stats.input_gradient_gram + floor * weight.T @ weight)
    values, U = eigh(T @ stats.covariance(centered=centered) @ T.T)
    return Factorization.from_spectrum(weight @ T_inverse @ U, U.T @ T, values)
