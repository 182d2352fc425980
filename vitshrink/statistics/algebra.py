"""Linear algebra that fails loudly: decompositions of finite matrices only."""

import torch
from torch import Tensor

from vitshrink.errors import NumericsError

RELATIVE_CUTOFF = 1e-12
"""Eigenvalues below this fraction of the largest are treated as zero when a square root is inverted."""


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (k,) in descending order, clamped at zero, and eigenvectors (k, k) of a positive semidefinite matrix.

    Raises:
        NumericsError: the matrix is not finite, or LAPACK does not converge. (``torch.linalg.eigh`` of a matrix with
            NaN returns NaN without an error.)
    """
    if not torch.isfinite(matrix).all():
        raise NumericsError("a statistic holds NaN or Inf.")
    try:
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    except RuntimeError as error:
        raise NumericsError(f"the eigendecomposition did not converge ({error}).") from error
    return values.flip(0).clamp_min(0), vectors.flip(1)


def square_roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a positive semidefinite matrix and its pseudo-inverse, both (k, k)."""
    values, vectors = eigh(matrix)
    root = values.sqrt()
    kept = values > RELATIVE_CUTOFF * values[0]
    inverse = torch.where(kept, root, 1).reciprocal() * kept
    return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T


def roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """R (k, k) with RᵀR the positive semidefinite ``matrix``, and its inverse.

    Cholesky's, at a tenth of the cost, where the matrix is far from singular; elsewhere the symmetric one.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix)
    diagonal = lower.diagonal().square()
    if failed or not diagonal.min() > 1e-8 * diagonal.max():
        return square_roots(matrix)
    upper = lower.T
    return upper, torch.linalg.solve_triangular(upper, torch.eye(len(upper)).to(upper), upper=True)


def full_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD, U (m, k), S (k,), Vh (k, n).

    Raises:
        NumericsError: a non-finite matrix (LAPACK may answer Inf with NaN and no error) or no convergence.
    """
    if not torch.isfinite(matrix).all():
        raise NumericsError("the matrix to decompose holds NaN or Inf.")
    try:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    except RuntimeError as error:
        raise NumericsError(f"the singular value decomposition did not converge ({error}).") from error
    return U, S, Vh
