"""A residual fitted to what the rank of a layer left over."""

import torch
from torch import Tensor

from vitshrink.errors import NumericsError

RESIDUAL_SHARE = 0.25
"""Part of a layer's rank that is left to the learned residual."""

STEP = 0.5
"""Step of scaled gradient descent: any value below 1 converges, whatever the conditioning (arXiv 2005.08898)."""

STEPS = 30


def split_rank(rank: int) -> tuple[int, int]:
    """Rank of the fixed part and of the residual; they add up to ``rank``."""
    residual = min(max(round(rank * RESIDUAL_SHARE), 1), rank)
    return rank - residual, residual


def fit_residual(weight: Tensor, up: Tensor, down: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Residual error compensation: Ŵ = W_r + A B with A B fitted to the layer's output error by gradient descent.

    The first components of ``up`` (m, k) and ``down`` (k, n) stay as they are; the last ones are where A and B start
    from. Minimizes tr(E C Eᵀ), E = W − W_r − A B, that is the mean squared output error on the activations with
    covariance C (n, n) (Azizi et al. 2024, arXiv 2402.06004), by gradient steps scaled with the factors' own Grams
    (Tong, Ma and Chi 2021, arXiv 2005.08898), which need no step size to be tuned. The best iterate is returned: never
    worse than the start.

    Returns:
        up (m, k) and down (k, n) with the residual merged in: it costs no extra kernel.
    """
    fixed, _ = split_rank(up.shape[1])
    target = weight - up[:, :fixed] @ down[:fixed]
    weighted_target = target @ covariance
    scale = (weighted_target * target).sum()
    if not torch.isfinite(scale):
        raise NumericsError("the compensation statistics hold NaN or Inf.")
    A, B = up[:, fixed:].clone(), down[fixed:].clone()
    best = (float("inf"), A, B)
    mean_variance = covariance.diagonal().mean()
    for _ in range(STEPS + 1):
        B_weighted = B @ covariance
        inner = B_weighted @ B.T
        outer = A.T @ A
        error = float(scale - 2 * (weighted_target @ B.T * A).sum() + (outer * inner).sum())
        if not 0 <= error < best[0]:
            # converged to rounding, or diverging, as down a direction along which rounding has left less than nothing
            break
        best = (error, A, B)
        gradient_A = weighted_target @ B.T - A @ inner
        gradient_B = A.T @ target - outer @ B  # already divided by C on its right
        # what B reads may be nothing of what varies: then its Gram alone says no scale to damp by
        scale_B = mean_variance * B.square().sum(1).mean()
        A, B = (
            A + STEP * _divide(gradient_A.T, inner, scale_B).T,
            B + STEP * _divide(gradient_B, outer, outer.diagonal().mean()),
        )
    A, B = _balanced(*best[1:])
    return torch.cat([up[:, :fixed], A], 1), torch.cat([down[:fixed], B], 0)


def _divide(right: Tensor, gram: Tensor, scale: Tensor) -> Tensor:
    """gram⁻¹ right for a positive semidefinite Gram, damped relative to ``scale`` so that it always exists."""
    damping = 1e-9 * scale.clamp_min(1e-300)
    factor, _ = torch.linalg.cholesky_ex(
        gram + damping * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    )
    return torch.cholesky_solve(right, factor)


def _balanced(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same product from columns of A and rows of B of equal norms, so that neither overflows in half precision."""
    a, b = A.norm(dim=0), B.norm(dim=1)
    ratio = torch.where((a > 0) & (b > 0), (b / a).sqrt(), torch.ones_like(a))
    return A * ratio, B / ratio[:, None]
