"""What ``inspect`` says of a layer: figures that can be worked out by hand."""

import pytest
import tiny
import torch
from test_calibration import batch_of
from torch import Tensor, nn

from vitshrink.calibration import collect
from vitshrink.inspection import inspect_layers, rank_at
from vitshrink.methods import Needs
from vitshrink.models import Target, find_targets
from vitshrink.ranks import break_even_rank
from vitshrink.stats import LinearStats

FRACTIONS = (0.25, 0.5, 1.0)


def layer(weight: Tensor) -> tuple[nn.Module, list[Target]]:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data = weight
    return nn.ModuleDict({"layer": linear}), [Target("layer", 0, "fc1", tuple(weight.shape), "layer")]  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(16, 16), (32, 16), (16, 48)])
def test_a_flat_spectrum_has_full_effective_rank(shape: tuple[int, int]) -> None:
    Q, _ = torch.linalg.qr(torch.randn(max(shape), min(shape), generator=torch.Generator().manual_seed(0)))
    weight = Q if shape[0] >= shape[1] else Q.T.contiguous()
    (found,) = inspect_layers(*layer(weight), {}, FRACTIONS)
    assert found.shape == shape
    assert found.parameters == shape[0] * shape[1]
    assert found.break_even == break_even_rank(*shape)
    assert found.effective_rank == pytest.approx(16, rel=1e-5)
    assert found.energy == pytest.approx({4: 0.25, 8: 0.5, 16: 1.0}, rel=1e-5)


def test_a_matrix_of_rank_one_has_effective_rank_one() -> None:
    (found,) = inspect_layers(*layer(torch.outer(torch.arange(1.0, 9), torch.arange(1.0, 13))), {}, FRACTIONS)
    assert found.effective_rank == pytest.approx(1)
    assert found.energy == pytest.approx({2: 1.0, 4: 1.0, 8: 1.0})


def test_a_layer_of_zeros_is_no_error() -> None:
    (found,) = inspect_layers(*layer(torch.zeros(8, 8)), {}, FRACTIONS)
    assert found.effective_rank == pytest.approx(1)
    assert all(0 <= energy <= 1 for energy in found.energy.values())


def test_activations_weight_the_spectrum() -> None:
    """All that goes in lies on one line, so one rank keeps everything of a weight that keeps all directions."""
    model, targets = layer(torch.eye(8))
    x = torch.outer(torch.linspace(-1, 1, 50), torch.arange(1.0, 9))
    plain, weighted = (
        inspect_layers(model, targets, stats, FRACTIONS)[0] for stats in ({}, {"layer": LinearStats.from_inputs(x)})
    )
    assert plain.effective_rank == pytest.approx(8)
    assert weighted.effective_rank == pytest.approx(1, abs=1e-3)
    assert weighted.energy[2] == pytest.approx(1)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertModel"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_every_layer_of_a_model_is_inspected(name: str, calibrated: bool) -> None:
    model = tiny.build(name)
    targets = find_targets(model)
    stats = collect(model, targets, [batch_of(tiny.inputs(name, batch=8))], Needs.COVARIANCE) if calibrated else {}
    found = inspect_layers(model, targets, stats, FRACTIONS)
    assert [each.name for each in found] == [target.name for target in targets]
    for each in found:
        energies = list(each.energy.values())
        assert energies == sorted(energies)
        assert energies[-1] == pytest.approx(1)
        assert 1 <= each.effective_rank <= min(each.shape)


@pytest.mark.parametrize(
    ("fraction", "shape", "rank"), [(0.5, (8, 100), 4), (0.01, (8, 8), 1), (1, (3, 9), 3), (0.125, (4, 4), 1)]
)
def test_a_fraction_of_the_full_rank_is_at_least_one(fraction: float, shape: tuple[int, int], rank: int) -> None:
    assert rank_at(fraction, shape) == rank
