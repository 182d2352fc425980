"""Effects of components: what autograd says of each, and what leaving them out really costs."""

from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F
from test_curvature import CLASSIFIER, Batch, batch_of, generator, weights_of
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.compression.repairs.rescaling import best_repair
from vitshrink.errors import NumericsError
from vitshrink.methods import get_method
from vitshrink.models.checkpoint import replace_layers
from vitshrink.models.targets import find_targets
from vitshrink.statistics.curvature import collect_curvature
from vitshrink.statistics.effects import Components, Effects, component_effects, measured_loss, shortfall
from vitshrink.statistics.functionals import batch_generator, random_functional
from vitshrink.statistics.reference import DenseOutputs


def parts_of(model: PreTrainedModel, batches: list[Batch], method: str = "svd") -> dict[str, Components]:
    targets = find_targets(model)
    stats = collect_curvature(model, targets, batches)
    found = {}
    for target in targets:
        weight = weights_of(model, [target])[target.name].double()
        factors = get_method(method).factorize(weight, stats[target.name], centered=False)
        found[target.name] = Components(factors.up, factors.down, stats[target.name].mean)
    return found


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_an_effect_is_the_derivative_by_the_gain_of_a_component(name: str) -> None:
    model, batch = tiny.build(name), batch_of(name)
    components = parts_of(model, [batch])
    effects = component_effects(model, components, [batch], seed=5).layers
    layer_name = list(components)[-2]
    parts = components[layer_name]
    gain = torch.zeros(parts.up.shape[1], requires_grad=True)

    def amplified(_module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        h = (inputs[0] - parts.mean.float()) @ parts.down.float().T
        return output + (h * gain) @ parts.up.float().T

    handle = model.get_submodule(layer_name).register_forward_hook(amplified)
    outputs = model(**batch.inputs)
    values = random_functional(model, outputs, batch, batch_generator(5, 0))(outputs)
    for sample, value in enumerate(values):
        (want,) = torch.autograd.grad(value, gain, retain_graph=True)
        torch.testing.assert_close(effects[layer_name][sample].float(), want, rtol=1e-3, atol=1e-5)
    handle.remove()


@pytest.mark.parametrize("name", ["BertModel", CLASSIFIER])
def test_components_of_a_low_rank_layer_are_seen_between_its_factors(name: str) -> None:
    model, batch = tiny.build(name), batch_of(name)
    target = find_targets(model)[-1]
    layer = tiny.low_rank(model.get_submodule(target.name), 5)
    replace_layers(model, {target.name: layer})
    up, down = (factor.detach().double() for factor in layer.factors())
    parts = Components(up, down, torch.linspace(-1, 1, layer.in_features).double())
    want, found = (
        component_effects(model, {target.name: replace(parts, own=own)}, [batch], seed=5) for own in (False, True)
    )
    torch.testing.assert_close(found.layers, want.layers, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.shifts, want.shifts)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("name", tiny.TEXT_MODELS)
def test_padding_has_no_effect(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitshrink.models.fidelity.signs", lambda like, _generator: torch.ones_like(like))
    model = tiny.build(name)
    components = parts_of(model, [batch_of(name)])
    short = component_effects(model, components, [batch_of(name)]).layers
    long = component_effects(model, components, [batch_of(name, padding=7)]).layers
    for layer in components:
        torch.testing.assert_close(short[layer], long[layer], rtol=1e-3, atol=1e-5)


def test_what_is_missing_is_the_difference_to_the_reference() -> None:
    model, other, batch = tiny.build(CLASSIFIER), tiny.build(CLASSIFIER, seed=1), batch_of(CLASSIFIER)
    components = parts_of(model, [batch])
    missing = component_effects(model, components, [batch], reference=DenseOutputs(other), seed=2).missing
    with torch.no_grad():
        wanted, found = other(**batch.inputs), model(**batch.inputs)
        functional = random_functional(other, wanted, batch, batch_generator(2, 0))
    torch.testing.assert_close(missing, (functional(wanted) - functional(found)).double())
    assert component_effects(model, components, [batch]).missing is None


def test_the_measured_loss_never_rises_and_ends_at_nothing() -> None:
    loss = measured_loss(torch.randn(20, 9, dtype=torch.float64, generator=generator()))
    assert loss.shape == (10,)
    assert (loss.diff() <= 0).all()
    assert loss[-1] == 0


def test_components_that_act_alike_cost_more_than_the_sum_of_each() -> None:
    alike = torch.randn(200, 1, dtype=torch.float64, generator=generator()).expand(200, 8)
    apart = torch.randn(200, 8, dtype=torch.float64, generator=generator())
    assert measured_loss(alike)[0] > 1.4 * measured_loss(apart)[0]


def test_the_measured_loss_follows_the_divergence() -> None:
    model, batch = tiny.build(CLASSIFIER), batch_of(CLASSIFIER, 64)
    components = parts_of(model, [batch])
    effects = component_effects(model, components, [batch] * 8)
    with torch.no_grad():
        dense = model(**batch.inputs).logits.log_softmax(-1)
    predicted, real = [], []
    for name, parts in components.items():
        layer = model.get_submodule(name)
        weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
        loss = measured_loss(effects.layers[name])
        for rank in (8, 16, 24):
            with torch.no_grad():
                kept = (parts.up[:, :rank] @ parts.down[:rank]).float()
                layer.weight.copy_(kept)
                layer.bias.copy_(bias + (weight - kept) @ parts.mean.float())
                now = model(**batch.inputs).logits.log_softmax(-1)
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
            predicted.append(float(loss[rank]))
            real.append(float(F.kl_div(now, dense, log_target=True, reduction="batchmean")))
    assert torch.corrcoef(torch.tensor([predicted, real]).log())[0, 1] > 0.8


def test_an_activation_that_is_not_finite_names_the_layer_and_the_batch() -> None:
    model, bad = tiny.build(CLASSIFIER), batch_of(CLASSIFIER)
    components = parts_of(model, [batch_of(CLASSIFIER)])
    bad.inputs["pixel_values"][1, 0, 5, 5] = float("nan")
    with pytest.raises(NumericsError, match=r"layer '.*layers\.\d\..*' met NaN or Inf .* batch 1"):
        component_effects(model, components, [batch_of(CLASSIFIER), bad])


def test_what_is_missing_needs_no_gradients() -> None:
    model, other, batches = tiny.build(CLASSIFIER), tiny.build(CLASSIFIER, seed=1), [batch_of(CLASSIFIER)] * 2
    missing = component_effects(model, parts_of(model, batches), batches, reference=DenseOutputs(other), seed=2).missing
    torch.testing.assert_close(shortfall(model, DenseOutputs(other), batches, seed=2), missing)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_effect_of_a_shift_is_the_derivative_by_the_bias(name: str) -> None:
    model, batch = tiny.build(name), batch_of(name)
    components = parts_of(model, [batch])
    shifts = component_effects(model, components, [batch], seed=5).shifts
    layer_name = list(components)[-2]
    bias = model.get_submodule(layer_name).bias
    assert isinstance(bias, Tensor)
    bias.requires_grad_()
    outputs = model(**batch.inputs)
    for sample, value in enumerate(random_functional(model, outputs, batch, batch_generator(5, 0))(outputs)):
        (want,) = torch.autograd.grad(value, bias, retain_graph=True)
        torch.testing.assert_close(shifts[layer_name][sample].float(), want, rtol=1e-3, atol=1e-5)


def test_gains_and_shifts_are_fitted_where_they_explain_and_left_alone_where_they_do_not() -> None:
    phi = torch.randn(300, 12, dtype=torch.float64, generator=generator())
    truth = torch.linspace(-0.2, 0.2, 12, dtype=torch.float64)
    noise = torch.randn(300, dtype=torch.float64, generator=generator(1))
    repair = best_repair(Effects({"a": phi[:, :5], "b": phi[:, 5:8]}, {"a": phi[:, 8:]}, phi @ truth + 0.05 * noise))
    assert repair is not None
    assert repair.explained > 0.8
    fitted = torch.cat([repair.gains["a"], repair.gains["b"], repair.shifts["a"]])
    torch.testing.assert_close(fitted, truth, rtol=0, atol=0.05)
    nothing = best_repair(Effects({"a": phi[:, :5]}, {"a": phi[:, 5:]}, noise * noise.abs()))
    assert nothing is None or nothing.explained < 0.02
    zeros = torch.zeros(300, dtype=torch.float64)
    assert best_repair(Effects({"a": phi[:, :5]}, {"a": phi[:, 5:]}, zeros)) is None


def test_what_has_hardly_an_effect_is_hardly_changed() -> None:
    phi = torch.randn(300, 4, dtype=torch.float64, generator=generator())
    idle = 1e-6 * torch.randn(300, 4, dtype=torch.float64, generator=generator(1))
    repair = best_repair(Effects({"a": phi}, {"a": phi, "key": idle}, phi.sum(1)))
    assert repair is not None
    assert repair.shifts["key"].abs().max() < 1e-5 < repair.shifts["a"].abs().min()
