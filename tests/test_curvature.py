"""Curvature statistics against what autograd says of the same model, token by token."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any
from weakref import ref

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from vitshrink.errors import DataError, NumericsError
from vitshrink.methods import get_method
from vitshrink.models import fidelity
from vitshrink.models.checkpoint import replace_layers
from vitshrink.models.fidelity import SOFTMAX
from vitshrink.models.targets import Target, find_targets
from vitshrink.runtime.modes import frozen
from vitshrink.runtime.precision import passes_in
from vitshrink.statistics.curvature import TOKEN_WEIGHT, CurvatureCollector, clipping, collect_curvature
from vitshrink.statistics.functionals import random_functional
from vitshrink.statistics.stats import LinearStats

CLASSIFIER = "ViTForImageClassification"
CLASSES = len(tiny.IMAGE_CLASSES)
FIRST = torch.tensor([0])
UNBOUNDED = (0.0, float("inf"))


@dataclass
class Batch:
    inputs: dict[str, Tensor]
    mask: Tensor | None = None


def batch_of(name: str, size: int = 3, seed: int = 0, padding: int = 0) -> Batch:
    inputs = tiny.inputs(name, size, seed)
    if "attention_mask" in inputs:
        inputs = {key: F.pad(tensor, (0, padding)) for key, tensor in inputs.items()}
    return Batch(inputs, inputs["attention_mask"].bool() if "attention_mask" in inputs else None)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens_of(model: PreTrainedModel, batch: Batch, targets: list[Target]) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs x (tokens, n) and output gradients g (tokens, m) of every target, as plain autograd gives them."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for target in targets:

        def hook(_module: Any, inputs: tuple[Tensor], output: Tensor, name: str = target.name) -> None:
            output.retain_grad()
            seen[name] = (inputs[0], output)

        handles.append(model.get_submodule(target.name).register_forward_hook(hook))
    outputs = model(**batch.inputs)
    random_functional(model, outputs, batch, generator())(outputs).sum().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    real = torch.ones(next(iter(seen.values()))[0].shape[:2], dtype=torch.bool) if batch.mask is None else batch.mask
    return {name: (x.detach()[real].double(), z.grad[real].double()) for name, (x, z) in seen.items()}


def clipped(g: Tensor) -> Tensor:
    """Gradients (tokens, m) within a tenth of their mean norm and ten times it, scaled to the power they had."""
    norms = g.norm(dim=1)
    allowed = norms.clamp(norms.mean() / 10, norms.mean() * 10)
    short = g / norms.clamp_min(1e-30)[:, None] * allowed[:, None]
    return short * (g.square().sum() / short.square().sum()).sqrt()


def expected(
    x: Tensor, gradients: list[Tensor], g: Tensor, weight: Tensor, token_weight: float
) -> dict[str, Tensor | float]:
    """The statistics by their definition; ``gradients`` are those of all layers that read x."""
    relative = torch.stack([each.square().sum(1) / each.square().sum(1).mean() for each in gradients]).mean(0)
    s = token_weight * relative + 1 - token_weight
    C, H = (x.T * s) @ x / s.sum(), g.T @ g / len(g)
    m, n = weight.shape
    return {
        "mean": (s @ x) / s.sum(),
        "power": float(H.trace()),
        "input": weight @ C @ weight.T if m < n else C,
        "output": weight.T @ H @ weight if m > n else H,
    }


def assert_statistics(
    found: dict[str, LinearStats],
    tokens: dict[str, tuple[Tensor, Tensor]],
    targets: list[Target],
    weights: dict[str, Tensor],
    token_weight: float = TOKEN_WEIGHT,
) -> None:
    for target in targets:
        x, g = tokens[target.name]
        g = clipped(g)
        readers = [clipped(tokens[other.name][1]) for other in targets if other.input_group == target.input_group]
        want = expected(x, readers, g, weights[target.name].double(), token_weight)
        stats = found[target.name]
        m, n = target.shape
        assert stats.tokens == len(x)
        assert (stats.gram is None, stats.output_gram is None) == (m < n, m >= n)
        assert (stats.gradient_gram is None, stats.input_gradient_gram is None) == (m > n, m <= n)
        close(stats.mean, want["mean"])
        close(torch.tensor(stats.gradient_power), torch.tensor(want["power"]))
        close(stats.output_gram if m < n else stats.gram, want["input"])
        close(stats.input_gradient_gram if m > n else stats.gradient_gram, want["output"])


def close(found: Tensor | None, want: Any) -> None:
    assert found is not None
    assert found.dtype == torch.float64 or found.ndim == 0
    torch.testing.assert_close(found.double(), want.double(), rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def equal(one: dict[str, LinearStats], other: dict[str, LinearStats]) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for name in one
        for a, b in zip(values(one[name]), values(other[name]), strict=True)
    )


def assert_close_statistics(found: LinearStats, want: LinearStats, tolerance: float) -> None:
    for a, b in zip(values(found), values(want), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            got, wanted = torch.as_tensor(a).double(), torch.as_tensor(b).double()
            torch.testing.assert_close(got, wanted, rtol=10 * tolerance, atol=tolerance * float(wanted.abs().max()))


def values(stats: LinearStats) -> list[Any]:
    return [getattr(stats, field.name) for field in fields(stats)]


def weights_of(model: PreTrainedModel, targets: list[Target]) -> dict[str, Tensor]:
    return {target.name: model.get_submodule(target.name).weight.detach() for target in targets}


# The probe


def fisher(logits: Tensor) -> Tensor:
    p = logits.double().softmax(-1)
    return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]


def test_the_second_moment_of_the_probe_is_the_fisher_information(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 0.0], [30.0, 0.0, 1.0, 2.0]])  # the second one is certain of its class
    total = torch.zeros(2, 4, 4, dtype=torch.float64)
    for signs in product([-1.0, 1.0], repeat=4):
        monkeypatch.setattr(fidelity, "signs", lambda like, _generator, s=signs: torch.tensor(s).expand_as(like))
        v = SOFTMAX.probe(logits, generator()).double()
        total += v[:, :, None] * v[:, None, :] / 2**4
    torch.testing.assert_close(total, fisher(logits), rtol=1e-5, atol=1e-7)


def test_the_signs_are_fair_and_independent() -> None:
    logits = torch.randn(1, 6, generator=generator()).expand(40_000, 6)
    v = SOFTMAX.probe(logits, generator(1)).double()
    torch.testing.assert_close(v.T @ v / len(v), fisher(logits[0]), rtol=0, atol=3e-3)
    assert v.mean(0).abs().max() < 1e-2
    assert v.sum(1).abs().max() < 1e-6  # adding a constant to all logits changes nothing


@pytest.mark.parametrize("role", ["query", "output", "fc1", "fc2"])
def test_all_probes_together_give_the_exact_curvature(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny.build(CLASSIFIER), batch_of(CLASSIFIER, 2)
    target = next(target for target in find_targets(model) if target.role == role and target.block == 0)
    layer = model.get_submodule(target.name)

    def logits_of(shift: Tensor, pixels: Tensor) -> Tensor:
        handle = layer.register_forward_hook(lambda _module, _inputs, output: output + shift)
        try:
            return model(pixel_values=pixels[None]).logits[0]
        finally:
            handle.remove()

    H = torch.zeros(target.shape[0], target.shape[0], dtype=torch.float64)
    tokens = (tiny.IMAGE_SIZE // 8) ** 2 + 1
    for pixels in batch.inputs["pixel_values"]:
        nothing = torch.zeros(tokens, target.shape[0])
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention knows no vmap
            J = torch.func.jacrev(logits_of)(nothing, pixels).detach().double()  # (classes, tokens, m)
        H += torch.einsum("ctm,cd,dtk->mk", J, fisher(logits_of(nothing, pixels).detach()), J)
    H /= 2 * tokens

    draws = iter(product([-1.0, 1.0], repeat=CLASSES))
    monkeypatch.setattr(fidelity, "signs", lambda like, _generator: torch.tensor(next(draws)).expand_as(like))
    collector = CurvatureCollector(model, [target], probes=2**CLASSES, clip=UNBOUNDED)
    collector.run(0, batch)
    stats = collector.statistics()[target.name]
    W = layer.weight.detach().double()
    m, n = target.shape
    close(stats.input_gradient_gram if m > n else stats.gradient_gram, W.T @ H @ W if m > n else H)
    assert stats.gradient_power == pytest.approx(float(H.trace()), rel=1e-4)


def test_more_random_probes_come_closer_to_the_exact_curvature() -> None:
    model, batch = tiny.build(CLASSIFIER), batch_of(CLASSIFIER, 4)
    targets = [target for target in find_targets(model) if target.role == "output"][:1]
    many = collect_curvature(model, targets, [batch], probes=256)[targets[0].name].gradient_gram

    def distance(probes: int) -> float:
        found = [
            collect_curvature(model, targets, [batch], probes=probes, seed=seed)[targets[0].name].gradient_gram
            for seed in range(1, 5)
        ]
        return sum(float((each - many).norm() / many.norm()) for each in found) / 4

    assert distance(32) < distance(1) / 2
    assert distance(32) < 0.25


# The statistics


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_statistics_are_those_of_plain_autograd(name: str) -> None:
    model, batch = tiny.build(name), batch_of(name)
    targets = find_targets(model)
    tokens = tokens_of(model, batch, targets)
    assert_statistics(collect_curvature(model, targets, [batch]), tokens, targets, weights_of(model, targets))


def test_tokens_count_alike_where_no_gradient_weighs_them() -> None:
    model, batch = tiny.build(CLASSIFIER), batch_of(CLASSIFIER)
    targets = find_targets(model)
    collector = CurvatureCollector(model, targets, token_weight=0.0)
    collector.run(0, batch)
    tokens = tokens_of(model, batch, targets)
    assert_statistics(collector.statistics(), tokens, targets, weights_of(model, targets), token_weight=0.0)


def test_long_and_short_gradients_are_clipped_and_their_power_stays() -> None:
    g = torch.randn(200, 5, generator=generator())
    g[0] *= 1e4
    g[1] *= 1e-4
    g[2] = 0
    found = g * clipping(g.norm(dim=1, keepdim=True))
    torch.testing.assert_close(found, clipped(g))
    assert found.square().sum() == pytest.approx(float(g.square().sum()), rel=1e-5)
    norms = found[found.norm(dim=1) > 0].norm(dim=1)
    assert norms.max() / norms.min() <= 100 * (1 + 1e-4)
    assert not found[2].any()


def test_gradients_that_are_all_nothing_stay_so() -> None:
    assert torch.equal(torch.zeros(4, 3) * clipping(torch.zeros(4, 1)), torch.zeros(4, 3))


def test_the_same_batch_twice_gives_the_same_statistics_of_twice_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "signs", lambda like, _generator: torch.ones_like(like).index_fill(1, FIRST, -1))
    model, batch = tiny.build(CLASSIFIER), batch_of(CLASSIFIER)
    targets = find_targets(model)
    once, twice = collect_curvature(model, targets, [batch]), collect_curvature(model, targets, [batch, batch])
    for target in targets:
        assert_close_statistics(twice[target.name], replace(once[target.name], tokens=2 * 3 * 17), 1e-9)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_passes_in_bfloat16_round_what_they_see_and_not_its_sums(name: str) -> None:
    model, batch = tiny.build(name), batch_of(name)
    targets = find_targets(model)
    exact = collect_curvature(model, targets, [batch])
    narrow = collect_curvature(model, targets, [batch], passes=passes_in(torch.device("cpu"), "bf16"))
    same = 0
    for target in targets:
        for entry in fields(LinearStats):
            want, got = (getattr(stats[target.name], entry.name) for stats in (exact, narrow))
            if isinstance(want, Tensor):
                assert got.dtype == torch.float64
                assert (got - want).norm() < 0.1 * want.norm(), (target.name, entry.name)
                same += torch.equal(got, want)
                if got.ndim == 2:  # sums in float32 leave no more of an asymmetry than that
                    assert (got - got.T).abs().max() < 1e-5 * got.abs().max()
    assert not same


@pytest.mark.parametrize("name", tiny.TEXT_MODELS)
def test_longer_padding_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "BertModel":  # draws a sign for each hidden number, also in the padding
        monkeypatch.setattr(fidelity, "signs", lambda like, _generator: torch.ones_like(like))
    model = tiny.build(name)
    targets = find_targets(model)
    short = collect_curvature(model, targets, [batch_of(name)])
    long = collect_curvature(model, targets, [batch_of(name, padding=7)])
    for target in targets:
        assert_close_statistics(long[target.name], short[target.name], 1e-5)


def test_the_same_seed_gives_the_same_statistics_and_another_one_others() -> None:
    model, batches = tiny.build(CLASSIFIER), [batch_of(CLASSIFIER), batch_of(CLASSIFIER, seed=1)]
    targets = find_targets(model)
    first = collect_curvature(model, targets, batches, seed=3)
    assert equal(first, collect_curvature(model, targets, batches, seed=3))
    assert not equal(first, collect_curvature(model, targets, batches, seed=4))


@pytest.mark.parametrize("name", [CLASSIFIER, "BertForSequenceClassification"])
def test_in_a_compressed_model_the_statistics_are_those_of_the_dense_layers(name: str) -> None:
    model, batch = tiny.build(name), batch_of(name)
    targets = find_targets(model)
    dense = weights_of(model, targets)
    replace_layers(model, {t.name: tiny.low_rank(model.get_submodule(t.name), 8) for t in targets})
    tokens = tokens_of(model, batch, targets)  # x and g of the compressed model, W of the dense one
    assert_statistics(collect_curvature(model, targets, [batch], weights=dense), tokens, targets, dense)


def test_a_model_compressed_without_loss_has_the_statistics_of_the_dense_one() -> None:
    model, batch = tiny.build(CLASSIFIER), batch_of(CLASSIFIER)
    targets = find_targets(model)
    low_rank = {target.name: tiny.low_rank(model.get_submodule(target.name), 16) for target in targets}
    with torch.no_grad():
        for name, layer in low_rank.items():
            model.get_submodule(name).weight.copy_(layer.dense_weight())
    want, dense = collect_curvature(model, targets, [batch]), weights_of(model, targets)
    replace_layers(model, low_rank)
    found = collect_curvature(model, targets, [batch], weights=dense)
    for target in targets:
        assert_close_statistics(found[target.name], want[target.name], 1e-4)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_functional_is_linear_in_the_outputs_and_one_number_a_sample(name: str) -> None:
    model, batch = tiny.build(name), batch_of(name)
    with torch.no_grad():
        here, there = model(**batch.inputs), model(**batch_of(name, seed=1).inputs)
        value = random_functional(model, here, batch, generator())
        key = "last_hidden_state" if "last_hidden_state" in here else "logits"
        between = type(here)(**{key: 0.25 * here[key] + 0.75 * there[key]})
    assert value(here).shape == (3,)
    torch.testing.assert_close(value(between), 0.25 * value(here) + 0.75 * value(there), rtol=1e-4, atol=1e-5)


# What a job relies on


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model = tiny.build(CLASSIFIER)
    frozen = [name for name, _ in model.named_parameters() if "embeddings" in name]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def batches() -> Iterator[Batch]:
        yield batch_of(CLASSIFIER)
        if fails:
            yield Batch({"pixel_values": torch.full((2, 3, 32, 32), float("nan"))})

    if fails:
        with pytest.raises(NumericsError):
            collect_curvature(model, find_targets(model), batches())
    else:
        collect_curvature(model, find_targets(model), batches())
    assert frozen
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {n: n not in frozen for n in before}
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not any(getattr(module, kind) for module in model.modules() for kind in hooks)


@pytest.mark.parametrize("name", [CLASSIFIER, "ViTModel"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_activation_that_is_not_finite_names_the_layer_and_the_batch(name: str, value: float) -> None:
    model = tiny.build(name)
    bad = batch_of(name)
    bad.inputs["pixel_values"][1, 0, 5, 5] = value
    with pytest.raises(NumericsError, match=r"layer '.*layers\.\d\..*' met NaN or Inf .* batch 1"):
        collect_curvature(model, find_targets(model), [batch_of(name), bad])


def test_no_batch_at_all_is_an_error() -> None:
    model = tiny.build(CLASSIFIER)
    with pytest.raises(DataError, match="empty"):
        collect_curvature(model, find_targets(model), [])


def test_gradients_are_taken_where_the_caller_has_switched_them_off() -> None:
    model, targets = tiny.build(CLASSIFIER), find_targets(tiny.build(CLASSIFIER))
    with torch.no_grad():
        found = collect_curvature(model, targets, [batch_of(CLASSIFIER)])
        assert not torch.is_grad_enabled()
    assert equal(found, collect_curvature(model, targets, [batch_of(CLASSIFIER)]))


def test_progress_is_told_in_samples() -> None:
    model, told = tiny.build(CLASSIFIER), []
    batches = [batch_of(CLASSIFIER, 3), batch_of(CLASSIFIER, 2)]
    collect_curvature(model, find_targets(model), batches, on_batch=told.append)
    assert told == [3, 2]


# The method


def test_the_predicted_loss_follows_the_measured_divergence() -> None:
    model, batch = tiny.build(CLASSIFIER), batch_of(CLASSIFIER, 64)
    targets = find_targets(model)
    stats = collect_curvature(model, targets, [batch], probes=8)
    factorize = get_method("curvature").factorize
    with torch.no_grad():
        dense = model(**batch.inputs).logits.log_softmax(-1)
    predicted, measured = [], []
    for target in targets:
        layer = model.get_submodule(target.name)
        weight = layer.weight.detach().clone()
        factors = factorize(weight.double(), stats[target.name], centered=False)
        for rank in (8, 16, 24, 28):
            with torch.no_grad():
                layer.weight.copy_(factors.up[:, :rank] @ factors.down[:rank])
                now = model(**batch.inputs).logits.log_softmax(-1)
                layer.weight.copy_(weight)
            predicted.append(float(factors.loss[rank]))
            measured.append(float(F.kl_div(now, dense, log_target=True, reduction="batchmean")))
    logs = torch.tensor([predicted, measured]).log()
    assert torch.corrcoef(logs)[0, 1] > 0.9
    by_layer = logs.view(2, len(targets), -1)
    assert (by_layer.diff(dim=2) < 0).all()  # more rank, less loss: predicted and measured


def test_the_method_loses_less_than_the_best_approximation_of_the_weights() -> None:
    model, batch, test = tiny.build(CLASSIFIER), batch_of(CLASSIFIER, 64), batch_of(CLASSIFIER, 64, seed=1)
    targets = find_targets(model)
    stats = collect_curvature(model, targets, [batch])
    with torch.no_grad():
        dense = model(**test.inputs).logits.log_softmax(-1)

    def divergence(name: str) -> float:
        compressed = tiny.build(CLASSIFIER)
        with torch.no_grad():
            for target in targets:
                layer = compressed.get_submodule(target.name)
                factors = get_method(name).factorize(layer.weight.double(), stats[target.name], centered=False)
                layer.weight.copy_(factors.up[:, :16] @ factors.down[:16])
            now = compressed(**test.inputs).logits.log_softmax(-1)
        return float(F.kl_div(now, dense, log_target=True, reduction="batchmean"))

    assert divergence("curvature") < divergence("svd") / 2


def test_statistics_that_come_one_by_one_are_let_go_of_one_by_one() -> None:
    model = tiny.build(CLASSIFIER)
    collector = CurvatureCollector(model, find_targets(model))
    with frozen(model):
        collector.run(0, batch_of(CLASSIFIER))
    found = collector.each()
    gone = []
    for _, each in found:
        assert not any(tensor() is not None for tensor in gone)
        gone.append(ref(each.gradient_gram if each.gradient_gram is not None else each.input_gradient_gram))
    assert len(gone) == len(find_targets(model))
