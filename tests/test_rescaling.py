"""Gains and biases bring a compressed model back towards the dense one, and change nothing else."""

import copy
from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F
from test_curvature import CLASSIFIER, Batch, batch_of
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.compression.repairs import rescaling
from vitshrink.compression.repairs.rescaling import Repair, rescale_components
from vitshrink.models.checkpoint import replace_layers
from vitshrink.models.targets import find_targets
from vitshrink.statistics.calibration import collect
from vitshrink.statistics.effects import Effects
from vitshrink.statistics.needs import Needs
from vitshrink.statistics.reference import DenseOutputs


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
    assert rescale_components(model, DenseOutputs(dense), [t.name for t in targets], means, batches) > 0
    assert distance() < 0.9 * before


def truncated(rank: int = 6) -> tuple[PreTrainedModel, PreTrainedModel, str, list[Batch], dict[str, Tensor]]:
    """A dense model and the same with one layer truncated; the name of that, samples, and the means of its inputs."""
    dense, batches = tiny.build(CLASSIFIER), [batch_of(CLASSIFIER, 8, seed=seed) for seed in range(4)]
    target = find_targets(dense)[0]
    means = {name: stats.mean for name, stats in collect(dense, [target], batches, Needs.SCALES).items()}
    model = copy.deepcopy(dense)
    replace_layers(model, {target.name: tiny.low_rank(model.get_submodule(target.name), rank)})
    return dense, model, target.name, batches, means


def test_a_gain_leaves_the_mean_output_of_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, model, name, batches, means = truncated()
    fitted = rescaling.best_repair

    def without_shifts(effects: Effects) -> Repair | None:
        repair = fitted(effects)
        return repair and replace(repair, shifts={name: torch.zeros_like(each) for name, each in repair.shifts.items()})

    monkeypatch.setattr(rescaling, "best_repair", without_shifts)
    layer = model.get_submodule(name)
    with torch.no_grad():
        before = layer(means[name].float())
        weight = layer.weight.clone()
        assert rescale_components(model, DenseOutputs(dense), [name], means, batches)
        assert not torch.equal(layer.weight, weight)
        torch.testing.assert_close(layer(means[name].float()), before, rtol=1e-4, atol=1e-5)


def test_a_step_that_takes_the_outputs_further_away_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, model, name, batches, means = truncated()
    before = copy.deepcopy(model.state_dict())
    fitted = rescaling.best_repair

    def the_wrong_way(effects: Effects) -> Repair | None:
        repair = fitted(effects)
        return repair and replace(
            repair,
            shifts={name: -50 * each for name, each in repair.shifts.items()},
            gains={name: -50 * each for name, each in repair.gains.items()},
        )

    monkeypatch.setattr(rescaling, "best_repair", the_wrong_way)
    assert rescale_components(model, DenseOutputs(dense), [name], means, batches) == 0
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_model_that_lacks_nothing_is_left_as_it_is() -> None:
    dense, batches = tiny.build(CLASSIFIER), [batch_of(CLASSIFIER, 8)]
    model = copy.deepcopy(dense)
    assert rescale_components(model, DenseOutputs(dense), [], {}, batches) == 0
