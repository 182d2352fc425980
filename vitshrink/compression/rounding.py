"""Rounding of a matrix in the metric of what the model's output says of its errors, to integers of any fineness.

Errors E cost ½ Σ_i h_i (E C Eᵀ)_ii, with C = MᵀM, M lower triangular: column by column the errors so far are fed back
into the next (GPTQ, arXiv 2210.17323), after which that of entry (i, j) costs h_i M_jj² times its square. So the step
of an entry is δ / (√h_i M_jj): the last bit of every weight of a model then buys the same, and its integers are as many
bits as their entropy. This is reverse water-filling, over columns (WaterSIC, Lifar et al. 2026, arXiv 2603.04956) as
over rows and layers.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from vitshrink.errors import NumericsError
from vitshrink.models.codes import STEPS, Codes
from vitshrink.statistics.halves import half_of, upper
from vitshrink.statistics.sensitivity import Sensitivity

DAMPING = 0.01
"""Added to C, of its mean diagonal."""

SHRINKAGE = 0.5
"""How far sensitivities of outputs are pulled towards their mean: a few hundred samples overrate what they saw."""

COLUMN_EXPONENT = 0.7
"""Of M_jj in the steps of columns; with 1 those that hardly vary get steps too coarse for what was not seen."""

UNSEEN = 0.05
"""Share of the use of a table that is spread over all of its rows: others are used later."""

BLOCK = 64
"""Columns whose errors are fed back at once to those behind them."""

LARGEST = 32767
"""Integers are stored in 16 bits at most."""


@dataclass(frozen=True, eq=False)
class Metric:
    """What errors of a matrix (m, n) cost, and its steps at δ = 1.

    Attributes:
        weights: h, (m,).
        diagonal: M_jj, (n,).
        half: of Mᵀ, float32, with C = MᵀM; None where C has no entries beside the diagonal.
        seen: whether the outputs that a model is judged by depend on the matrix.
    """

    weights: Tensor
    diagonal: Tensor
    half: Tensor | None = None
    seen: bool = True

    @classmethod
    def of(cls, found: Sensitivity) -> Self:
        """Raises NumericsError where the covariance is not finite."""
        outputs = _shrunk(found.outputs)
        if found.uses is not None:
            uses = found.uses
            return cls((1 - UNSEEN) * uses + UNSEEN / len(uses), outputs.sqrt())
        covariance = found.covariance
        assert covariance is not None
        return cls.of_lower(outputs, _lower(covariance, found.tokens))

    @classmethod
    def of_lower(cls, weights: Tensor, lower: Tensor) -> Self:
        """From h (m,) and M (n, n)."""
        return cls(weights, lower.diagonal().clone(), half_of(lower.T))

    @classmethod
    def unseen(cls, weight: Tensor) -> Self:
        """Of a matrix (m, n) that no output tells anything of: all errors cost alike, in units of its deviation."""
        m, n = weight.shape
        power = weight.double().square().mean().clamp_min(torch.finfo(torch.float32).tiny)
        return cls((1 / power).expand(m), weight.new_ones(n, dtype=torch.float64), seen=False)

    @property
    def lower(self) -> Tensor:
        """M (n, n), made anew, or its diagonal, (n,), where it has no other entries."""
        return self.diagonal if self.half is None else upper(self.half).T

    @cached_property
    def rows(self) -> Tensor:
        """Steps of rows at δ = 1, (m,)."""
        return self.weights.rsqrt()

    @cached_property
    def columns(self) -> Tensor:
        """Steps of columns at δ = 1, (n,)."""
        logs = self.diagonal.log()
        return (-logs.mean() - COLUMN_EXPONENT * (logs - logs.mean())).exp()

    def loss(self, errors: Tensor) -> float:
        """Of errors (m, n), in the unit of the output's divergence."""
        if not self.seen:
            return 0.0
        lower = self.lower.to(errors.dtype)
        seen = errors * lower if lower.dim() == 1 else errors @ lower.T
        return 0.5 * float((self.weights * seen.square().sum(1)).sum())


def _shrunk(outputs: Tensor) -> Tensor:
    mean = outputs.mean()
    if not torch.isfinite(mean):
        raise NumericsError("a sensitivity holds NaN or Inf.")
    # nothing at this layer reaches the output: any errors do
    return (1 - SHRINKAGE) * outputs + SHRINKAGE * mean + torch.finfo(torch.float32).tiny


def shrinkage(covariance: Tensor, tokens: float) -> float:
    """How far a covariance (n, n) of so many samples is best pulled towards its mean diagonal.

    The oracle approximating estimator (Chen et al. 2010, arXiv 0907.4698).
    """
    n = len(covariance)
    square, power = float(covariance.square().sum()), float(covariance.trace()) ** 2
    spread = (tokens + 1 - 2 / n) * (square - power / n)
    return min(1.0, ((1 - 2 / n) * square + power) / spread) if spread > 0 else 1.0


def _lower(covariance: Tensor, tokens: float) -> Tensor:
    mean = covariance.diagonal().mean()
    if not torch.isfinite(mean):
        raise NumericsError("the input covariance holds NaN or Inf.")
    share = max(DAMPING, shrinkage(covariance, tokens))
    damped = (1 - share) * covariance
    damped.diagonal().add_(share * mean + torch.finfo(torch.float32).tiny)
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if failed:
        raise NumericsError("the input covariance is not positive definite.")
    found: Tensor = lower.flip(0, 1).T.float()
    return found


@dataclass(frozen=True, eq=False)
class Rounded:
    """A matrix as integers and steps, and the errors E = W − Ŵ (m, n) that it has, float32."""

    codes: Codes
    rows: Tensor
    errors: Tensor


def steps(metric: Metric, fineness: float, kind: torch.dtype = STEPS) -> tuple[Tensor, Tensor]:
    """Steps of rows and columns at δ = ``fineness``, as they are stored, both about as large; float32.

    Those of rows may be stored as another ``kind`` of numbers.
    """
    rows, columns = fineness * metric.rows, metric.columns
    balance = float(((columns.log().mean() - rows.log().mean()) / 2).exp())
    largest = torch.finfo(STEPS).max
    stored = [
        (each).clamp(torch.finfo(STEPS).tiny, largest).to(STEPS).float() for each in (rows * balance, columns / balance)
    ]
    return stored[0].to(kind).float(), stored[1]


def entropy(integers: Tensor) -> float:
    """Bits an entry, of integers as floating point."""
    low = integers.min()
    counts = torch.bincount((integers - low).long().flatten()).double()
    shares = counts[counts > 0] / integers.numel()
    return float(-(shares * shares.log2()).sum())


def at_each(weight: Tensor, metric: Metric, finenesses: Iterable[float]) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Integers and errors, both (m, n), float32, and what these cost, at every one of ``finenesses``.

    All are found in one go, as rows beside rows.
    """
    every = list(finenesses)
    m, W = weight.shape[0], weight.float()
    rows = torch.cat([fineness * metric.rows for fineness in every]).float()
    integers, errors, seen = _rounded(W.repeat(len(every), 1), metric, rows, metric.columns.float())
    costs = 0.5 * (seen.view(-1, m).double() @ metric.weights) if metric.seen else seen.new_zeros(len(every))
    shape = (len(every), m, -1)
    yield from zip(integers.reshape(shape), errors.reshape(shape), costs.tolist(), strict=True)


def rounded(weight: Tensor, metric: Metric, fineness: float, kind: torch.dtype = STEPS) -> Rounded:
    """``weight`` (m, n) at δ = ``fineness``, with steps of rows that are stored as ``kind``."""
    rows, columns = steps(metric, fineness, kind)
    integers, errors, _ = _rounded(weight.float(), metric, rows, columns)
    kind = torch.int8 if integers.abs().max() < 128 else torch.int16
    return Rounded(Codes(integers.to(kind), columns), rows, errors)


def at_steps(
    weight: Tensor, covariance: Tensor, tokens: float, rows: Tensor, columns: Tensor, largest: int = LARGEST
) -> tuple[Tensor, Tensor]:
    """Integers, of ``largest`` at most, and errors of ``weight`` (m, n) at steps that are given, both (m, n), float32.

    ``covariance`` (n, n) of its inputs, float64, says as much as so many ``tokens`` do; steps of rows (m,) and columns
    (n,). Raises NumericsError where the covariance is not finite.
    """
    lower = _lower(covariance, tokens)
    integers, errors, _ = _with_feedback(weight.float(), lower, rows.float(), columns.float(), largest)
    return integers, errors


def _rounded(W: Tensor, metric: Metric, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integers and errors E, both (m, n), and (E C Eᵀ)_ii, (m,)."""
    if metric.half is not None:
        return _with_feedback(W, metric.lower, rows, columns)
    step = rows[:, None] * columns
    integers = (W / step).round_().clamp_(-LARGEST, LARGEST)
    errors = W - integers * step
    return integers, errors, (errors * metric.diagonal.float()).square().sum(1)


def _with_feedback(
    W: Tensor, lower: Tensor, rows: Tensor, columns: Tensor, largest: int = LARGEST
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``_rounded``; column-major inside, so that a column lies in one piece.

    Entry j of a row of E Mᵀ is M_jj times what is left of the target that the errors before it have moved.
    """
    diagonal = lower.diagonal()
    unit = lower / diagonal[:, None]
    targets = W.T.contiguous()
    errors, integers = torch.zeros_like(targets), torch.empty_like(targets)
    seen = W.new_zeros(W.shape[0])
    for start in range(0, len(targets), BLOCK):
        stop = min(start + BLOCK, len(targets))
        wanted = targets[start:stop] + unit[start:stop, :start] @ errors[:start]
        within = unit[start:stop, start:stop]
        for j in range(stop - start):
            step = rows * columns[start + j]
            integer = (wanted[j] / step).round_().clamp_(-largest, largest)
            nearest = integer * step
            error = targets[start + j] - nearest
            integers[start + j], errors[start + j] = integer, error
            wanted[j] -= nearest
            if start + j + 1 < stop:
                wanted[j + 1 :].addr_(within[j + 1 :, j], error)
        seen += (wanted * diagonal[start:stop, None]).square_().sum(0)
    return integers.T, errors.T, seen
