"""Products and square roots that statistics and methods are made of."""

import collections.abc
import importlib
import pkgutil
import sys
import typing
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.utils import ModelOutput

import vitshrink
from vitshrink.statistics import algebra
from vitshrink.statistics.algebra import roots, square_roots
from vitshrink.statistics.stats import LinearStats, Moments, gram_of


@pytest.mark.parametrize("columns", [1, 127, 128, 300])
def test_a_gram_in_blocks_is_the_gram(columns: int) -> None:
    x = torch.randn(50, columns, dtype=torch.float64)
    torch.testing.assert_close(gram_of(x), x.T @ x)


@pytest.mark.parametrize("rank", [6, 4, 0])
def test_the_roots_of_a_matrix_give_it_back_also_where_it_is_singular(rank: int) -> None:
    x = torch.randn(rank, 6, dtype=torch.float64)
    matrix = x.T @ x
    root, inverse = roots(matrix)
    torch.testing.assert_close(root.T @ root, matrix)
    projection = inverse @ root
    torch.testing.assert_close(projection @ projection, projection)
    assert round(float(projection.trace())) == rank
    torch.testing.assert_close(projection @ matrix, matrix)


def test_a_matrix_far_from_singular_needs_no_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = gram_of(torch.randn(90, 6, dtype=torch.float64))
    symmetric = square_roots(matrix)[0]
    monkeypatch.setattr(algebra, "eigh", None)
    root, inverse = roots(matrix)
    torch.testing.assert_close(root.T @ root, symmetric @ symmetric)
    torch.testing.assert_close(inverse @ root, torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("entry", ["gradient_gram", "input_gradient_gram"])
def test_refined_statistics_have_the_new_inputs_and_the_mean_of_both_gradients(entry: str) -> None:
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(30, 4, dtype=torch.float64)
    first, again = (
        replace(LinearStats.from_inputs(each), gradient_power=power, **{entry: power * torch.eye(4)})  # type: ignore[arg-type]
        for each, power in ((x, 1.0), (y, 3.0))
    )
    refined = first.refined_by(again)
    assert (refined.tokens, refined.gradient_power) == (30, 2.0)
    assert torch.equal(refined.mean, again.mean)
    assert refined.gram is again.gram
    assert torch.equal(getattr(refined, entry), 2 * torch.eye(4))
    other = {"gradient_gram", "input_gradient_gram"} - {entry}
    assert getattr(refined, other.pop()) is None


@pytest.mark.filterwarnings("ignore:vitshrink.* is now:FutureWarning")  # old places are imported too
def test_what_holds_tensors_is_compared_by_identity() -> None:
    """``==`` on tensors gives tensors, of which none is true or false."""
    for module in pkgutil.walk_packages(vitshrink.__path__, "vitshrink."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found = {
        kind
        for name, module in list(sys.modules.items())
        if name.startswith("vitshrink")
        for kind in vars(module).values()
        if isinstance(kind, type) and is_dataclass(kind) and kind.__module__.startswith("vitshrink")
        if not issubclass(kind, ModelOutput)  # transformers decides how those are compared
    }
    assert LinearStats in found
    assert not [kind for kind in found if kind.__eq__ is not object.__eq__ and _holds_tensors(kind)]
    one, other = (LinearStats(1, torch.ones(2)) for _ in range(2))
    assert one == one
    assert one != other
    assert len({one, other}) == 2


def _holds_tensors(kind: Any) -> bool:
    if not isinstance(kind, type):
        return typing.get_origin(kind) is not collections.abc.Callable and any(
            map(_holds_tensors, typing.get_args(kind))
        )
    if is_dataclass(kind) and kind.__eq__ is not object.__eq__:
        hints = typing.get_type_hints(kind)
        return any(_holds_tensors(hints[each.name]) for each in fields(kind) if each.compare)
    return issubclass(kind, torch.Tensor | torch.nn.Module | np.ndarray)


@pytest.mark.parametrize("weighted", [False, True])
def test_inputs_that_vary_about_as_much_as_they_are_large_have_plain_sums(weighted: bool) -> None:
    x, weights = torch.randn(50, 9) + torch.linspace(-9, 9, 9), torch.rand(50) if weighted else None
    x[:, 4] = 0.03  # a channel that is dead, as real models have them
    moments = Moments(x, weights)
    w = torch.ones(50) if weights is None else weights
    assert moments.shift is None
    torch.testing.assert_close(moments.total(), (x * w[:, None]).double().sum(0), rtol=1e-5, atol=1e-4)
    assert torch.equal(moments.gram(), gram_of(x * w.sqrt()[:, None]).double())
