"""Fixing the gauge changes the numbers that are stored, and nothing that the model computes."""

import copy

import pytest
import tiny
import torch

from vitshrink.methods.ranks import rank_cost
from vitshrink.models.checkpoint import compressed_layers
from vitshrink.models.pivoting import fix_gauge
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.targets import find_targets


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("dense", ["", "fc1", "intermediate"], ids=["all", "fc1 dense", "intermediate dense"])
def test_the_outputs_stay_and_the_parameters_fall_to_the_degrees_of_freedom(architecture: str, dense: str) -> None:
    model = tiny.build(architecture).double().eval()
    targets = find_targets(model)
    for target in targets:
        if dense and dense in target.name:
            continue
        layer = model.get_submodule(target.name)
        U, S, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        rank = 9
        low = LowRankLinear.from_factors(U[:, :rank] * S[:rank], Vh[:rank], layer.bias, dtype=torch.float64)
        model.set_submodule(target.name, low)
    before = copy.deepcopy(model)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in tiny.inputs(architecture).items()}
    fix_gauge(model, targets)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], before(**inputs)[0], rtol=1e-9, atol=1e-9)
    for layer in compressed_layers(model).values():
        assert layer.spec.pivot is not None
        assert layer.weight.numel() + layer.down.numel() == rank_cost(
            layer.out_features, layer.in_features, layer.rank, "gauge"
        )
