"""Plain truncated SVD: the best rank-r matrix, whatever goes through it."""

from torch import Tensor

from vitshrink.methods.registry import Factorization, method
from vitshrink.statistics.algebra import full_svd
from vitshrink.statistics.needs import Needs
from vitshrink.statistics.stats import LinearStats


@method("svd", needs=Needs.WEIGHTS)
def svd(weight: Tensor, stats: LinearStats | None, *, centered: bool = False) -> Factorization:
    """Truncated SVD of the weights (Eckart and Young, 1936); needs no data.

    Minimizes ‖W − Ŵ‖_F; ``loss`` is that error squared.
    """
    U, S, Vh = full_svd(weight)
    return Factorization.from_spectrum(U * S, Vh, S.square())
