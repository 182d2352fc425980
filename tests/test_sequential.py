"""Block by block through a model: the walk computes what the model computes, and repairs what compression lost."""

import copy
from collections.abc import Iterator

import pytest
import tiny
import torch
from test_calibration import Batch, batch_of, hooks, padded, rows
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.compression.repairs.sequential import compensate_residuals, refit, stages
from vitshrink.errors import NumericsError
from vitshrink.models.checkpoint import replace_layers
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.targets import Target, blocks_of, find_targets
from vitshrink.statistics.calibration import collect
from vitshrink.statistics.needs import Needs
from vitshrink.statistics.stats import LinearStats
from vitshrink.statistics.walk import hidden_batches

ENCODERS = ("ViTModel", "DeiTModel", "BertModel")


def batches_of(name: str) -> list[Batch]:
    """Two batches of differing length; texts are padded in both."""
    inputs = tiny.inputs(name, batch=9, seed=4)
    first, second = rows(inputs, slice(0, 3)), rows(inputs, slice(3, 9))
    return [batch_of(first), batch_of(padded(second, 5) if name == "BertModel" else second)]


def last_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    return model(**batch.inputs).last_hidden_state


@torch.no_grad()
def compress(model: PreTrainedModel, rank: int) -> tuple[PreTrainedModel, list[Target], dict[str, nn.Linear]]:
    """A copy with every target truncated by SVD, the targets, and their dense layers."""
    targets = find_targets(model)
    dense: dict[str, nn.Linear] = {}
    for target in targets:
        layer = model.get_submodule(target.name)
        assert isinstance(layer, nn.Linear)
        dense[target.name] = layer
    compressed = copy.deepcopy(model)
    replace_layers(compressed, {name: tiny.low_rank(layer, rank) for name, layer in dense.items()})
    return compressed, targets, dense


@torch.no_grad()
def output_error(model: PreTrainedModel, compressed: PreTrainedModel, batches: list[Batch]) -> float:
    """Mean squared difference of the last hidden states over the real tokens."""
    differences = []
    for batch in batches:
        difference = last_hidden(model, batch) - last_hidden(compressed, batch)
        differences.append(difference[batch.mask] if batch.mask is not None else difference.flatten(0, 1))
    return float(torch.cat(differences).square().mean())


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_the_walk_reproduces_the_models_own_output(name: str) -> None:
    model, batches = tiny.build(name), batches_of(name)
    walked = hidden_batches(model, blocks_of(model)[0], batches)
    for block in blocks_of(model):
        for hidden in walked:
            hidden.hidden = hidden.through(block)
    norm = getattr(model, "layernorm", nn.Identity())
    for hidden, batch in zip(walked, batches, strict=True):
        expected, got = last_hidden(model, batch), norm(hidden.hidden)
        mask = torch.ones(expected.shape[:2], dtype=torch.bool) if batch.mask is None else batch.mask
        torch.testing.assert_close(got[mask], expected[mask])
        assert hidden.mask is None or torch.equal(hidden.mask, mask)


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_the_walk_leaves_no_hook_and_the_model_untouched(name: str) -> None:
    model, batches = tiny.build(name), batches_of(name)
    before = last_hidden(model, batches[0])
    hidden_batches(model, blocks_of(model)[0], batches)
    assert hooks(model) == 0
    assert torch.equal(before, last_hidden(model, batches[0]))

    def interrupted() -> Iterator[Batch]:
        yield batches[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hidden_batches(model, blocks_of(model)[0], interrupted())
    assert hooks(model) == 0


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_targets_come_in_the_order_of_a_forward_pass(name: str) -> None:
    model = tiny.build(name)
    met: list[str] = []
    targets = find_targets(model)
    handles = [
        model.get_submodule(t.name).register_forward_pre_hook(lambda _m, _a, name=t.name: met.append(name))
        for t in targets
    ]
    with torch.no_grad():
        model(**tiny.inputs(name))
    for handle in handles:
        handle.remove()
    grouped = list(stages(targets))
    assert [target.name for _, group in grouped for target in group] == [target.name for target in targets]
    assert met == [target.name for target in targets]
    assert [len(group) for _, group in grouped] == [3, 1, 1, 1] * 2


@pytest.mark.parametrize("name", ENCODERS)
def test_compensation_lowers_the_error_of_the_output(name: str) -> None:
    model, batches = tiny.build(name), batches_of(name)
    compressed, targets, dense = compress(model, 12)
    before = output_error(model, compressed, batches)
    seen: list[str] = []
    compensate_residuals(compressed, blocks_of(compressed), targets, dense, batches, on_layer=seen.append)
    after = output_error(model, compressed, batches)
    assert after < 0.8 * before
    assert seen == [target.name for target in targets]
    assert hooks(compressed) == 0
    assert all(parameter.isfinite().all() for parameter in compressed.parameters())


def test_compensation_changes_low_rank_layers_only() -> None:
    model, batches = tiny.build("BertModel"), batches_of("BertModel")
    compressed, targets, dense = compress(model, 8)
    replaced = {target.name for target in targets if target.role in ("value", "fc2")}
    replace_layers(compressed, {t.name: dense[t.name] for t in targets if t.name not in replaced})  # type: ignore[misc]
    before = {name: value.clone() for name, value in compressed.state_dict().items()}
    compensate_residuals(compressed, blocks_of(compressed), targets, {n: dense[n] for n in replaced}, batches)
    changed = {name for name, value in compressed.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert {name.rpartition(".")[0] for name in changed} == replaced


def test_padding_has_no_part_in_the_compensation() -> None:
    model = tiny.build("BertModel")
    inputs = tiny.inputs("BertModel", batch=9, seed=4)
    results = []
    for more in (0, 11):
        compressed, targets, dense = compress(model, 12)
        batches = [batch_of(padded(inputs, more))]
        compensate_residuals(compressed, blocks_of(compressed), targets, dense, batches)
        results.append(compressed.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=0, atol=2e-3)


def test_each_layer_meets_what_the_compensated_layers_before_it_give() -> None:
    """The last layer's fit is that of the statistics of the finished model up to it."""
    model, batches = tiny.build("ViTModel"), batches_of("ViTModel")
    compressed, targets, dense = compress(model, 12)
    last = targets[-1].name
    truncated = copy.deepcopy(compressed.get_submodule(last))
    compensate_residuals(compressed, blocks_of(compressed), targets, dense, batches)
    with torch.no_grad():
        x: list[Tensor] = []
        handle = compressed.get_submodule(last).register_forward_pre_hook(
            lambda _m, args: x.append(args[0].flatten(0, 1))
        )
        for batch in batches:
            compressed(**batch.inputs)
        handle.remove()
        assert isinstance(truncated, LowRankLinear)
        refit(truncated, dense[last], LinearStats.from_inputs(torch.cat(x)))
    found = compressed.get_submodule(last)
    assert isinstance(found, LowRankLinear)
    torch.testing.assert_close(truncated.dense_weight(), found.dense_weight(), rtol=0, atol=1e-4)
    torch.testing.assert_close(truncated.bias, found.bias, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_a_refit_layer_has_less_output_error_with_or_without_bias(bias: bool) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(20, 14, bias=bias)
    x = torch.randn(300, 20) @ torch.randn(20, 20) + 1
    layer = tiny.low_rank(dense, 5)
    stats = LinearStats.from_inputs(x)
    with torch.no_grad():
        before = (dense(x) - layer(x)).square().mean()
        refit(layer, dense, stats)
        difference = dense(x) - layer(x)
    assert difference.square().mean() < before
    assert (layer.bias is None) == (not bias)
    if bias:
        torch.testing.assert_close(difference.mean(0), torch.zeros(14), rtol=0, atol=1e-5)


def test_an_activation_that_is_not_finite_stops_the_compensation() -> None:
    model, batches = tiny.build("ViTModel"), batches_of("ViTModel")
    compressed, targets, dense = compress(model, 12)
    batches[1].inputs["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"layers\.0\.attention\.q_proj.*batch 1"):
        compensate_residuals(compressed, blocks_of(compressed), targets, dense, batches)
    assert hooks(compressed) == 0


def test_the_walk_sees_the_same_inputs_as_calibration() -> None:
    """Statistics collected on the way equal those of whole forward passes while nothing is changed."""
    model, batches = tiny.build("BertModel"), batches_of("BertModel")
    targets = find_targets(model)
    whole = collect(model, targets, batches, Needs.SCALES)
    walked = hidden_batches(model, blocks_of(model)[0], batches)
    seen: dict[str, Tensor] = {}
    first = targets[0].name
    handle = model.get_submodule(first).register_forward_pre_hook(lambda _m, args: seen.update({first: args[0]}))
    with torch.no_grad():
        tokens = []
        for hidden in walked:
            hidden.through(blocks_of(model)[0])
            tokens.append(seen[first][hidden.mask])
    handle.remove()
    torch.testing.assert_close(torch.cat(tokens).double().mean(0), whole[first].mean, rtol=0, atol=1e-6)
