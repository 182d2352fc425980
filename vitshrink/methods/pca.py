"""Principal components: a layer reads only the directions in which its inputs vary most."""

import torch
from torch import Tensor

from vitshrink.errors import NumericsError
from vitshrink.methods.registry import Factorization, method
from vitshrink.statistics.algebra import RELATIVE_CUTOFF, eigh, full_svd
from vitshrink.statistics.needs import Needs
from vitshrink.statistics.stats import LinearStats


@method("pca", needs=Needs.COVARIANCE, compensation="bias")
def pca(weight: Tensor, stats: LinearStats | None, *, centered: bool = True) -> Factorization:
    """Projection on the principal components of the layer's calibration inputs (Hotelling, 1933).

    C = V Λ Vᵀ, Ŵ = W V_r V_rᵀ; with ``centered`` the components are those around the mean, which the bias absorbs.
    ``loss`` is the output's error Σ_{i>r} λ_i ‖W v_i‖², exact because components do not correlate, so that what is left
    of it is the unexplained variance of the output. Components are ordered by the inputs alone: for one rank, factors
    that also look at W (``whitened``) never lose more. A layer with more inputs than outputs sees its inputs only as
    projected on its row space, and their components there are taken: any others would describe what W never reads.
    """
    if stats is None:
        raise NumericsError("pca needs calibration statistics.")
    m, n = weight.shape
    if m >= n and stats.gram is not None:
        values, V = eigh(stats.covariance(centered=centered))
        return Factorization.from_spectrum(weight @ V, V.T, values * (weight @ V).square().sum(0))
    U, S, Q = full_svd(weight)  # W = U S Q, with the row space in the rows of Q
    read = RELATIVE_CUTOFF**0.5 * S[0] < S
    inverse = torch.where(read, S, 1).reciprocal() * read
    within = inverse[:, None] * U.T
    values, V = eigh(within @ stats.output_covariance(weight, centered=centered) @ within.T)
    up = U * S @ V
    return Factorization.from_spectrum(up, V.T @ Q, values * up.square().sum(0))
