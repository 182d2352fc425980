"""Sensitivities against what autograd says of the same model, token by token."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import kinds
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, PreTrainedModel, SiglipConfig, ViTConfig

from vitshrink.errors import DataError, NumericsError
from vitshrink.models.targets import blocks_of, find_outside, find_targets
from vitshrink.runtime.modes import frozen
from vitshrink.statistics import recomputing
from vitshrink.statistics.curvature import collect_curvature
from vitshrink.statistics.effects import Components, component_effects
from vitshrink.statistics.functionals import batch_generator, random_functional
from vitshrink.statistics.halves import half_of
from vitshrink.statistics.recomputing import Recomputing, batch_that_fits, read_and_given
from vitshrink.statistics.sensitivity import (
    WEIGHTS,
    Sensitivity,
    SensitivityCollector,
    collect_sensitivity,
    patches,
)

VIT, BERT = "ViTForImageClassification", "BertForSequenceClassification"
FC1 = {VIT: "vit.layers.1.mlp.fc1", BERT: "bert.encoder.layer.1.intermediate.dense"}
PATCHES = "vit.embeddings.patch_embeddings.projection"
WORDS = "bert.embeddings.word_embeddings"


@dataclass
class Batch:
    inputs: dict[str, Tensor]
    mask: Tensor | None = None


def batch_of(name: str, size: int = 3, seed: int = 0, padding: int = 0) -> Batch:
    inputs = tiny.inputs(name, size, seed)
    if "attention_mask" not in inputs:
        return Batch(inputs)
    inputs = {key: F.pad(tensor, (0, padding)) for key, tensor in inputs.items()}
    return Batch(inputs, inputs["attention_mask"].bool())


def seen_by_autograd(model: PreTrainedModel, name: str, batch: Batch, number: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and output gradients of one module."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        seen.extend((inputs[0].detach(), output))

    handle = model.get_submodule(name).register_forward_hook(hook)
    outputs = model(**batch.inputs)
    random_functional(model, outputs, batch, batch_generator(0, number))(outputs).sum().backward()
    handle.remove()
    assert seen[1].grad is not None
    return seen[0], seen[1].grad


def expected(inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sensitivity:
    """Of the tokens (tokens, n) of each sample and their gradients (tokens, m)."""
    inputs, gradients = [x.double() for x in inputs], [g.double() for g in gradients]
    power = torch.cat(gradients).square().sum(1).mean()
    weights = [(g.square().sum(1) / power).clamp(*WEIGHTS)[:, None] for g in gradients]
    x, weight = torch.cat(inputs), torch.cat(weights)
    mean = (x * weight).sum(0) / weight.sum()
    covariance = ((x - mean) * weight).T @ (x - mean) / weight.sum()
    means = torch.stack([(each * w).sum(0) / w.sum() for each, w in zip(inputs, weights, strict=True)])
    shares = torch.stack([w.sum() for w in weights])[:, None] / weight.sum()
    between = ((means - mean) * shares).T @ (means - mean)
    alone = torch.stack([g.square().sum(0) for g in gradients]).mean(0)
    together = torch.stack([g.sum(0).square() for g in gradients]).mean(0)
    within, common = covariance.trace() - between.trace(), between.trace()
    ratio = together.sum() / alone.sum()
    return Sensitivity(
        (within * alone + common * together) / (within + ratio * common),
        mean,
        half_of(covariance - between + ratio * between),
        tokens=float(weight.sum() ** 2 / weight.square().sum()),
    )


def close(found: Any, wanted: Any) -> bool:
    return torch.allclose(found.double(), wanted.double(), rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("site", ["layers.0.mlp.fc1", "layers.0.attention.v_proj", "layers.1.mlp.fc1"])
def test_a_layer_of_images_has_the_gradients_and_the_covariance_of_its_tokens(site: str) -> None:
    model, batch, name = tiny.build(VIT), batch_of(VIT), f"vit.{site}"
    found = collect_sensitivity(model, [name], [batch])[name]
    wanted = expected(*seen_by_autograd(model, name, batch))
    assert close(found.outputs, wanted.outputs)
    assert close(found.mean, wanted.mean)
    assert close(found.covariance, wanted.covariance)


def test_what_moves_all_keys_of_a_sample_alike_costs_nothing() -> None:
    """Scores of a query move by the same amount, which the softmax does not see."""
    model, batch, name = tiny.build(VIT), batch_of(VIT, size=8), "vit.layers.0.attention.k_proj"
    found = collect_sensitivity(model, [name], [batch])[name]
    x, _ = seen_by_autograd(model, name, batch)
    common = x.double().mean(1) - x.double().mean((0, 1))
    direction = torch.linalg.svd(common).Vh[0]
    assert found.covariance is not None
    plain = ((x.double() - x.double().mean((0, 1))) @ direction).square().mean()
    assert direction @ found.covariance.double() @ direction < 0.9 * plain


@pytest.mark.parametrize("name", [VIT, BERT])
def test_a_layer_has_the_gradients_and_the_covariance_of_its_tokens(name: str) -> None:
    model, batch = tiny.build(name), batch_of(name)
    found = collect_sensitivity(model, [FC1[name]], [batch])[FC1[name]]
    x, gradient = seen_by_autograd(model, FC1[name], batch)
    real = torch.ones(x.shape[:2], dtype=torch.bool) if batch.mask is None else batch.mask
    wanted = expected(*([each[kept] for each, kept in zip(all_, real, strict=True)] for all_ in (x, gradient)))
    assert close(found.outputs, wanted.outputs)
    assert close(found.mean, wanted.mean)
    assert close(found.covariance, wanted.covariance)
    assert found.tokens == pytest.approx(wanted.tokens, rel=1e-4)


@pytest.mark.parametrize("name", kinds.ONE_OF_EACH)
def test_blocks_that_are_computed_again_say_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, and all but the last, whatever is learned from a pass."""
    model = kinds.build(name)
    targets = find_targets(model)
    names = [each.name for each in targets] + find_outside(model)
    inputs = kinds.inputs(name)
    mask = inputs.get("attention_mask")
    batches = [Batch(inputs, None if mask is None else mask.bool())] * 2
    components = {each.name: identity(each.shape) for each in targets}

    def learned() -> list[dict[str, Any]]:
        torch.manual_seed(0)  # some hide patches at random
        curvature = collect_curvature(model, targets, batches)
        effects = component_effects(model, components, batches)
        return [collect_sensitivity(model, names, batches), curvature, effects.layers, effects.shifts]

    kept = learned()
    decided = list[int]()
    for room in (0, 1):  # blocks of which activations are kept

        def decide(self: Recomputing, _hidden: Tensor, encoder: Sequence[nn.Module], room: int = room) -> None:
            self.recomputed = len(encoder) - room
            decided.append(self.recomputed)

        monkeypatch.setattr(Recomputing, "decide", decide)
        for found, wanted in zip(learned(), kept, strict=True):
            assert list(found) == list(wanted)
            for site in wanted:
                assert_same(found[site], wanted[site], site)
    assert max(decided) >= 1
    assert all("forward" not in vars(block) for block in blocks_of(model))


def identity(shape: tuple[int, int]) -> Components:
    """A layer as one component for each of its inputs, of random effects."""
    m, n = shape
    return Components(torch.randn(m, n, dtype=torch.float64), torch.eye(n).double(), torch.zeros(n).double())


def assert_same(found: Any, wanted: Any, site: str) -> None:
    """To the bit."""
    pairs = (
        [(found, wanted)] if isinstance(wanted, Tensor) else [(getattr(found, f), v) for f, v in vars(wanted).items()]
    )
    for one, other in pairs:
        assert torch.equal(one, other) if isinstance(other, Tensor) else one == other, site


def test_room_for_activations_says_how_many_blocks_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build(VIT)
    hidden = torch.zeros(1000, 100, model.config.hidden_size)
    blocks = list(blocks_of(model))
    found = Recomputing(blocks, blocks[:1], 2**60)
    of_one = 4 * 100_000 * read_and_given(blocks[0])
    counts = []
    for free in (0, 8 * of_one, 2**62):
        monkeypatch.setattr(recomputing, "free_memory", lambda _device, free=free: free)
        found.decide(hidden, blocks)
        counts.append(found.recomputed)
    assert counts == [2, 1, 0]
    found.room = 0
    found.decide(hidden, blocks)
    assert found.recomputed == 2, "however much memory is free"


@pytest.mark.parametrize(
    ("config", "samples"),
    [
        (ViTConfig(hidden_size=192, intermediate_size=768, num_attention_heads=3), 16),
        (ViTConfig(hidden_size=768, intermediate_size=3072), 4),
        (ViTConfig(hidden_size=1280, intermediate_size=5120, num_attention_heads=16), 4),
        (ViTConfig(hidden_size=768, intermediate_size=3072, image_size=448), 2),
        (BertConfig(hidden_size=768, intermediate_size=3072), 8),
        (SiglipConfig(vision_config={"image_size": 448}), 2),
    ],
    ids=["small", "large", "huge", "large images", "texts", "pairs"],
)
def test_batches_that_go_backward_are_smaller_for_larger_models(config: Any, samples: int) -> None:
    config = copy.deepcopy(config)
    for tower in (config, *(getattr(config, name, config) for name in ("text_config", "vision_config"))):
        tower.num_hidden_layers = 2
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert batch_that_fits(model) == samples


@pytest.mark.parametrize("name", kinds.ONE_OF_EACH)
def test_it_is_the_same_whether_samples_are_kept_apart(name: str) -> None:
    """Where a layer is used often in a pass, and where it reads something else as well."""
    model, inputs = kinds.build(name), kinds.inputs(name)
    names = [each.name for each in find_targets(model)]
    mask = inputs.get("attention_mask")
    batches = [Batch(inputs, None if mask is None else mask.bool())] * 2
    torch.manual_seed(0)
    found = collect_sensitivity(model, names, batches)
    together = SensitivityCollector(model, names)
    torch.manual_seed(0)
    with frozen(model):
        for number, batch in enumerate(batches):
            together.run(number, batch)
    for site, each in together.found().items():
        assert close(found[site].covariance, each.covariance), site
        assert close(found[site].outputs, each.outputs), site


def test_few_samples_are_kept_one_by_one() -> None:
    """In as many rows as there are samples, in place of a Gram of all inputs; it comes to the same."""
    model, batches = tiny.build(VIT), [batch_of(VIT, size=2, seed=seed) for seed in range(2)]
    few, all_ = (SensitivityCollector(model, [FC1[VIT]], starts=starts) for starts in ([0, 2, 4], []))
    for number, batch in enumerate(batches):
        few.run(number, batch)
        all_.run(number, batch)
    rows = few.sums[FC1[VIT]].between
    assert rows is not None
    assert rows.shape[0] == 4 < rows.shape[1]
    assert (rows.abs().sum(1) > 0).all()
    assert close(few.found()[FC1[VIT]].covariance, all_.found()[FC1[VIT]].covariance)


def test_a_convolution_is_the_linear_layer_of_its_patches() -> None:
    model, batch = tiny.build(VIT), batch_of(VIT)
    found = collect_sensitivity(model, [PATCHES], [batch])[PATCHES]
    module = model.get_submodule(PATCHES)
    assert isinstance(module, nn.Conv2d)
    x, gradient = seen_by_autograd(model, PATCHES, batch)
    read = patches(x, module)
    assert torch.allclose(
        F.linear(read, module.weight.flatten(1), module.bias), module(x).flatten(2).mT, rtol=1e-4, atol=1e-5
    )
    wanted = expected(read, gradient.flatten(2).mT)
    assert close(found.outputs, wanted.outputs)
    assert close(found.covariance, wanted.covariance)


@pytest.mark.parametrize("padding", ["valid", "same", 1])
def test_a_convolution_may_have_padding(padding: Any) -> None:
    module, x = nn.Conv2d(3, 4, 3, padding=padding), torch.rand(2, 3, 8, 8)
    product = F.linear(patches(x, module), module.weight.flatten(1), module.bias).mT
    assert torch.allclose(product, module(x).flatten(2), atol=1e-5)


def test_a_table_says_which_rows_are_used() -> None:
    model, batch = tiny.build(BERT), batch_of(BERT)
    found = collect_sensitivity(model, [WORDS], [batch])[WORDS]
    tokens, gradient = seen_by_autograd(model, WORDS, batch)
    power = torch.zeros(len(tiny.VOCABULARY)).index_add_(0, tokens.flatten(), gradient.square().sum(-1).flatten())
    assert found.uses is not None
    assert close(found.uses, (power / power.sum()).double())
    assert close(found.outputs, gradient.square().sum((0, 1)).double() / 3)
    assert found.uses[0] == 0, "padding is no use"
    assert found.half is None


def test_padding_does_not_count() -> None:
    """Not even where a text is as long as the pooler is wide."""
    model, names = tiny.build(BERT), [FC1[BERT], WORDS, "bert.pooler.dense"]
    short, long = (
        collect_sensitivity(model, names, [batch_of(BERT, padding=padding)])
        for padding in (0, model.config.hidden_size - 10)
    )
    for name in names:
        for field, value in vars(short[name]).items():
            if isinstance(value, Tensor):
                assert close(getattr(long[name], field), value), (name, field)


def test_what_the_output_does_not_depend_on_is_left_out() -> None:
    model = tiny.build("BertModel")
    names = ["encoder.layer.1.intermediate.dense", "pooler.dense"]
    assert list(collect_sensitivity(model, names, [batch_of("BertModel")])) == names[:1]


def test_a_walk_may_be_interrupted() -> None:
    model, names = tiny.build(BERT), [FC1[BERT], WORDS]
    batches = [batch_of(BERT, seed=seed) for seed in range(3)]
    whole = collect_sensitivity(model, names, batches)
    starts = [0, 3, 6, 9]
    first, second = (SensitivityCollector(model, names, starts=starts) for _ in range(2))
    first.run(0, batches[0])
    second.restore(first.state())
    for number in (1, 2):
        second.run(number, batches[number])
    for name, found in second.found().items():
        for field, value in vars(whole[name]).items():
            same = torch.equal(getattr(found, field), value) if isinstance(value, Tensor) else True
            assert same, (name, field)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.build(VIT)
    collect_sensitivity(model, [FC1[VIT], PATCHES], [batch_of(VIT)])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_batches_are_named() -> None:
    model = tiny.build(VIT)
    with pytest.raises(DataError, match="is the data set empty"):
        collect_sensitivity(model, [FC1[VIT]], [])
    with torch.no_grad():
        model.get_submodule("vit.layers.1.mlp.fc2").weight[0, 0] = torch.inf
    with pytest.raises(NumericsError, match="NaN or Inf"):
        collect_sensitivity(model, [FC1[VIT]], [batch_of(VIT)])


def test_positions_are_a_table_of_which_every_sample_uses_every_row() -> None:
    model, batch = tiny.build(VIT), batch_of(VIT)
    found = collect_sensitivity(model, ["vit.embeddings"], [batch])["vit.embeddings"]
    _, gradient = seen_by_autograd(model, "vit.embeddings", batch)
    power = gradient.double().square()
    assert found.uses is not None
    assert close(found.uses, power.sum((0, 2)) / power.sum())
    assert close(found.outputs, power.sum((0, 1)) / 3)
