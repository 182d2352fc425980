"""Gains bring a compressed model back towards the dense one, and change nothing else."""

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
from test_curvature import CLASSIFIER, batch_of

from vitshrink.calibration import collect
from vitshrink.checkpoint import replace_layers
from vitshrink.methods import Needs
from vitshrink.models import find_targets
from vitshrink.rescaling import rescale_components


@pytest.mark.parametrize("name", [CLASSIFIER, "BertForSequenceClassification", "BertForMaskedLM", "BertModel"])
def test_components_that_are_too_small_grow_back(name: str) -> None:
    dense, batches = tiny.build(name), [batch_of(name, 16, seed=seed) for seed in range(8)]
    targets = [target for target in find_targets(dense) if target.role in ("fc2", "output")]
    means = {each: stats.mean for each, stats in collect(dense, targets, batches, Needs.SCALES).items()}
    model = copy.deepcopy(dense)
    replace_layers(model, {t.name: tiny.low_rank(model.get_submodule(t.name), 30) for t in targets})
    with torch.no_grad():
        for target in targets:
            layer = model.get_submodule(target.name)
            up, down = layer.factors()
            layer.bias.add_(0.3 * up @ down @ means[target.name].float())
            layer.set_factors(0.7 * up, down)

    def distance() -> float:
        test = batch_of(name, 64, seed=99)
        with torch.no_grad():
            return float(F.mse_loss(model(**test.inputs)[0], dense(**test.inputs)[0]))

    before = distance()
    fit = rescale_components(model, dense, [t.name for t in targets], means, batches)
    assert fit.ridge is not None
    assert fit.explained > 0.2
    assert distance() < 0.9 * before


def test_the_mean_output_of_each_layer_stays() -> None:
    dense, batches = tiny.build(CLASSIFIER), [batch_of(CLASSIFIER, 8, seed=seed) for seed in range(4)]
    target = find_targets(dense)[0]
    means = {name: stats.mean for name, stats in collect(dense, [target], batches, Needs.SCALES).items()}
    model = copy.deepcopy(dense)
    replace_layers(model, {target.name: tiny.low_rank(model.get_submodule(target.name), 6)})
    layer = model.get_submodule(target.name)
    with torch.no_grad():
        before = layer(means[target.name].float())
        weight = layer.weight.clone()
        rescale_components(model, dense, [target.name], means, batches)
        assert not torch.equal(layer.weight, weight)
        torch.testing.assert_close(layer(means[target.name].float()), before, rtol=1e-4, atol=1e-5)


def test_a_model_that_lacks_nothing_is_left_as_it_is() -> None:
    dense, batches = tiny.build(CLASSIFIER), [batch_of(CLASSIFIER, 8)]
    model = copy.deepcopy(dense)
    fit = rescale_components(model, dense, [], {}, batches)
    assert (fit.ridge, fit.explained) == (None, 0.0)
