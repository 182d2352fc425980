"""Statistics of the layers' inputs: of every real token and of nothing else, however the samples are batched."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.errors import DataError, NumericsError
from vitshrink.models.targets import Target, find_targets
from vitshrink.statistics.calibration import StatisticsCollector, collect
from vitshrink.statistics.curvature import CurvatureCollector
from vitshrink.statistics.needs import Needs
from vitshrink.statistics.stats import LinearStats


@dataclass
class Batch:
    inputs: dict[str, Tensor]
    mask: Tensor | None


def batch_of(inputs: dict[str, Tensor]) -> Batch:
    mask = inputs.get("attention_mask")
    return Batch(inputs, None if mask is None else mask.bool())


def padded(inputs: dict[str, Tensor], more: int) -> dict[str, Tensor]:
    """The same texts with ``more`` padding tokens at their ends."""
    return {name: nn.functional.pad(value, (0, more)) for name, value in inputs.items()}


def rows(inputs: dict[str, Tensor], which: slice) -> dict[str, Tensor]:
    return {name: value[which] for name, value in inputs.items()}


@pytest.fixture(scope="module")
def bert() -> PreTrainedModel:
    return tiny.build("BertModel")


@pytest.fixture(scope="module")
def vit() -> PreTrainedModel:
    return tiny.build("ViTForImageClassification")


@contextlib.contextmanager
def inputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What really goes into the layers, seen by other hooks than those under test."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: seen[name].append(args[0]))
        for name in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def gram_of(stats: LinearStats, weight: Tensor) -> Tensor:
    """E[(Wx)(Wx)ᵀ], whichever side was observed."""
    return stats.output_covariance(weight.detach().double(), centered=False)


def assert_same(a: dict[str, LinearStats], b: dict[str, LinearStats], tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].tokens == b[name].tokens
        for entry in ("mean", "abs_mean", "abs_max", "gram", "output_gram"):
            first, second = getattr(a[name], entry), getattr(b[name], entry)
            assert (first is None) == (second is None)
            if first is not None:
                scale = first.abs().max()
                torch.testing.assert_close(first, second, rtol=0, atol=float(tolerance * scale))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_statistics_are_those_of_the_real_tokens(bert: PreTrainedModel) -> None:
    inputs, targets = tiny.inputs("BertModel"), find_targets(bert)
    mask = inputs["attention_mask"].bool()
    with inputs_of(bert, [target.name for target in targets]) as seen:
        found = collect(bert, targets, [batch_of(inputs)], Needs.COVARIANCE)
    assert not mask.all()
    for target in targets:
        (activation,) = seen[target.name]
        x = activation[mask].double()
        stats, weight = found[target.name], bert.get_submodule(target.name).weight
        assert isinstance(weight, Tensor)
        expected = LinearStats.from_inputs(x)
        assert stats.tokens == int(mask.sum()) == expected.tokens
        torch.testing.assert_close(stats.mean, expected.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.abs_mean, expected.abs_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.abs_max, expected.abs_max, rtol=1e-6, atol=0)
        torch.testing.assert_close(gram_of(stats, weight), gram_of(expected, weight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needs", [Needs.SCALES, Needs.COVARIANCE])
def test_more_padding_changes_nothing(bert: PreTrainedModel, needs: Needs) -> None:
    inputs, targets = tiny.inputs("BertModel"), find_targets(bert)
    once = collect(bert, targets, [batch_of(inputs)], needs)
    more = collect(bert, targets, [batch_of(padded(inputs, 7))], needs)
    assert_same(once, more)


def test_unequal_batches_give_the_same_statistics(vit: PreTrainedModel) -> None:
    inputs, targets = tiny.inputs("ViTForImageClassification", batch=7), find_targets(vit)
    together = collect(vit, targets, [batch_of(inputs)], Needs.COVARIANCE)
    pieces = [batch_of(rows(inputs, piece)) for piece in (slice(0, 1), slice(1, 5), slice(5, 7))]
    assert_same(together, collect(vit, targets, pieces, Needs.COVARIANCE))
    assert_same(together, collect(vit, targets, pieces[::-1], Needs.COVARIANCE))


def test_layers_that_read_the_same_tensor_share_their_sums(vit: PreTrainedModel) -> None:
    found = collect(vit, find_targets(vit), [batch_of(tiny.inputs("ViTModel"))], Needs.COVARIANCE)
    block = "vit.layers.0.attention"
    for part in ("k_proj", "v_proj"):
        assert torch.equal(found[f"{block}.q_proj"].mean, found[f"{block}.{part}"].mean)
        gram, other = found[f"{block}.q_proj"].gram, found[f"{block}.{part}"].gram
        assert gram is not None
        assert other is not None
        assert torch.equal(gram, other)
    assert not torch.equal(found[f"{block}.q_proj"].mean, found[f"{block}.o_proj"].mean)


def test_one_hook_serves_a_group(vit: PreTrainedModel) -> None:
    block = [target for target in find_targets(vit) if target.block == 0]
    with StatisticsCollector(vit, block, Needs.COVARIANCE):
        count = hooks(vit)
    # inputs of the attention, of its output, and of the two layers of the MLP; and the output of the narrow one
    assert count == 5


def test_a_narrow_layer_is_observed_at_its_output(bert: PreTrainedModel) -> None:
    targets = find_targets(bert)
    batches = [batch_of(tiny.inputs("BertModel"))]
    found = collect(bert, targets, batches, Needs.COVARIANCE)
    with torch.no_grad(), StatisticsCollector(bert, targets, Needs.COVARIANCE, full_gram=True) as collector:
        collector.next_batch(batches[0].mask, 0)
        bert(**batches[0].inputs)
        full = collector.statistics()
    narrow = [target for target in targets if target.shape[0] < target.shape[1]]
    assert {target.role for target in narrow} == {"fc2"}
    for target in narrow:
        weight = bert.get_submodule(target.name).weight
        assert isinstance(weight, Tensor)
        assert found[target.name].gram is None
        assert full[target.name].output_gram is None
        observed, expected = gram_of(found[target.name], weight), gram_of(full[target.name], weight)
        torch.testing.assert_close(observed, expected, rtol=1e-4, atol=1e-5)


def test_scales_collect_no_gram(vit: PreTrainedModel) -> None:
    found = collect(vit, find_targets(vit), [batch_of(tiny.inputs("ViTModel"))], Needs.SCALES)
    assert all(stats.gram is None and stats.output_gram is None for stats in found.values())
    assert all(stats.mean.dtype == torch.float64 for stats in found.values())


def test_float64_sums_of_many_batches_do_not_drift(vit: PreTrainedModel) -> None:
    targets = find_targets(vit, include=["layers.0.attention.q_proj"])
    batch = batch_of(tiny.inputs("ViTModel"))
    once, often = (collect(vit, targets, [batch] * times, Needs.COVARIANCE) for times in (1, 200))
    (name,) = once
    assert often[name].tokens == 200 * once[name].tokens
    torch.testing.assert_close(once[name].gram, often[name].gram, rtol=1e-13, atol=0)


@pytest.mark.parametrize("needs", [Needs.SCALES, Needs.COVARIANCE])
def test_sums_that_were_put_away_go_on_to_the_same_statistics(bert: PreTrainedModel, needs: Needs) -> None:
    targets = find_targets(bert)
    batches = [batch_of(tiny.inputs("BertModel", seed=seed)) for seed in range(3)]
    saved: dict[str, Tensor] = {}

    def stop(collector: StatisticsCollector, given: Sequence[Batch], _on_batch: object) -> None:
        for number, batch in enumerate(given[:2]):
            collector.run(number, batch)
        saved.update({name: value.clone() for name, value in collector.state().items()})

    def go_on(collector: StatisticsCollector, given: Sequence[Batch], _on_batch: object) -> None:
        collector.restore(saved)
        collector.run(2, given[2])

    collect(bert, targets, batches, needs, course=stop)
    assert_same(collect(bert, targets, batches, needs, course=go_on), collect(bert, targets, batches, needs), 0)


def test_fewer_tokens_than_channels_is_no_error(bert: PreTrainedModel) -> None:
    inputs = {name: value[:1, :3] for name, value in tiny.inputs("BertModel").items()}
    found = collect(bert, find_targets(bert), [batch_of(inputs)], Needs.COVARIANCE)
    assert {stats.tokens for stats in found.values()} == {3}


def test_progress_counts_samples(vit: PreTrainedModel) -> None:
    inputs, seen = tiny.inputs("ViTModel", batch=5), []
    pieces = [batch_of(rows(inputs, piece)) for piece in (slice(0, 2), slice(2, 5))]
    collect(vit, find_targets(vit), pieces, Needs.SCALES, on_batch=seen.append)
    assert seen == [2, 3]


def test_no_batch_is_an_error(vit: PreTrainedModel) -> None:
    with pytest.raises(DataError, match="is the data set empty"):
        collect(vit, find_targets(vit), [], Needs.COVARIANCE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_activation_that_is_not_finite_names_the_layer_and_the_batch(value: float) -> None:
    model = tiny.build("ViTForImageClassification")
    targets = find_targets(model)
    good, bad = (batch_of(tiny.inputs("ViTModel", seed=seed)) for seed in (0, 1))
    bad.inputs["pixel_values"][1, 0, 3, 4] = value
    with pytest.raises(NumericsError, match=r"'vit\.layers\.0\.attention\.q_proj'.*input.*batch 2\b"):
        collect(model, targets, [good, good, bad], Needs.COVARIANCE)
    assert hooks(model) == 0


def test_an_output_that_overflows_names_its_layer() -> None:
    model = tiny.build("BertModel")
    name = "encoder.layer.1.output.dense"
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight[3].fill_(3e38)
    with pytest.raises(NumericsError, match=r"'encoder\.layer\.1\.output\.dense'.*output.*batch 0\b"):
        collect(model, find_targets(model), [batch_of(tiny.inputs("BertModel"))], Needs.COVARIANCE)


def test_hooks_are_gone_after_success_and_after_an_exception(vit: PreTrainedModel) -> None:
    def interrupted() -> Iterator[Batch]:
        yield batch_of(tiny.inputs("ViTModel"))
        raise KeyboardInterrupt

    before = hooks(vit)
    collect(vit, find_targets(vit), [batch_of(tiny.inputs("ViTModel"))], Needs.COVARIANCE)
    assert hooks(vit) == before
    with pytest.raises(KeyboardInterrupt):
        collect(vit, find_targets(vit), interrupted(), Needs.COVARIANCE)
    assert hooks(vit) == before


def test_hooks_of_others_stay(vit: PreTrainedModel) -> None:
    handle = vit.get_submodule("vit.layers.0.attention.q_proj").register_forward_hook(lambda *_: None)
    try:
        collect(vit, find_targets(vit), [batch_of(tiny.inputs("ViTModel"))], Needs.COVARIANCE)
        assert hooks(vit) == 1
    finally:
        handle.remove()


def test_the_model_is_left_as_it_was(vit: PreTrainedModel) -> None:
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    collect(vit, find_targets(vit), [batch_of(tiny.inputs("ViTModel"))], Needs.COVARIANCE)
    assert all(torch.equal(value, vit.state_dict()[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in vit.parameters())


def test_targets_of_one_block_can_be_observed_alone(vit: PreTrainedModel) -> None:
    targets: list[Target] = find_targets(vit, include=[r"layers\.1\.mlp"])
    found = collect(vit, targets, [batch_of(tiny.inputs("ViTModel"))], Needs.COVARIANCE)
    assert list(found) == ["vit.layers.1.mlp.fc1", "vit.layers.1.mlp.fc2"]


@pytest.mark.parametrize("role", ["query", "fc2"])
@pytest.mark.parametrize("curved", [False, True], ids=["covariance", "curvature"])
def test_the_spread_of_inputs_far_from_zero_is_not_lost(curved: bool, role: str) -> None:
    """Of what a norm, or a hidden layer, hands on, some channels are thousands of times as large as they vary."""
    model = tiny.build("BertForSequenceClassification")
    with torch.no_grad():
        before = model.bert.embeddings.LayerNorm if role == "query" else model.bert.encoder.layer[0].intermediate.dense
        before.bias[:3] += 10_000
    targets = [target for target in find_targets(model) if target.block == 0 and target.role == role]
    batches = [batch_of(tiny.inputs("BertForSequenceClassification", 8, seed)) for seed in range(3)]
    with inputs_of(model, [target.name for target in targets]) as seen, torch.no_grad():
        for batch in batches:
            model(**batch.inputs)
    if curved:
        collector = CurvatureCollector(model, targets, token_weight=0)  # which are all alike then
        for number, batch in enumerate(batches):
            collector.run(number, batch)
        found = collector.statistics()
    else:
        found = collect(model, targets, batches, Needs.COVARIANCE)
    for target in targets:
        layer = model.get_submodule(target.name)
        weight = layer.weight.detach().double()  # type: ignore[union-attr, operator]
        x = torch.cat([each[batch.mask].double() for each, batch in zip(seen[target.name], batches, strict=True)])
        torch.testing.assert_close(found[target.name].mean, x.mean(0), rtol=1e-7, atol=1e-5)
        wanted = weight @ (x - x.mean(0)).T @ (x - x.mean(0)) @ weight.T / len(x)
        covariance = found[target.name].output_covariance(weight, centered=True)
        assert (covariance - wanted).abs().max() < 1e-4 * wanted.abs().max()
        plain = weight @ x.T @ x @ weight.T / len(x)
        torch.testing.assert_close(
            found[target.name].output_covariance(weight, centered=False), plain, rtol=1e-6, atol=0
        )
