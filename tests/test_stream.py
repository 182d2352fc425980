"""What the residual stream lacks after compression, and the layers that put it back."""

from collections.abc import Callable
from typing import ClassVar

import pytest
import tiny
import torch
from test_sequential import Batch, batches_of, compress, last_hidden, output_error
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.compression.repairs.stream import Lack, best_ridge, passage, regression, restore_stream, writers
from vitshrink.methods import Factorization, get_method
from vitshrink.models import fidelity
from vitshrink.models.checkpoint import replace_layers
from vitshrink.models.families import family_of
from vitshrink.models.targets import blocks_of, find_targets
from vitshrink.statistics.curvature import CurvatureCollector, collect_curvature, token_weights
from vitshrink.statistics.effects import component_effects
from vitshrink.statistics.importance import TokenWeights
from vitshrink.statistics.stats import LinearStats
from vitshrink.statistics.walk import hidden_batches

ENCODERS = ("ViTModel", "DeiTModel", "BertModel")


def factorize(_name: str, weight: Tensor, stats: LinearStats) -> Factorization:
    return get_method("curvature").factorize(weight, stats)


def many(name: str, samples: int = 48, seed: int = 7) -> list[Batch]:
    inputs = tiny.inputs(name, batch=samples, seed=seed)
    mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
    half = samples // 2
    return [
        Batch({key: value[part] for key, value in inputs.items()}, None if mask is None else mask[part])
        for part in (slice(half), slice(half, None))
    ]


def restored(model: PreTrainedModel, rank: int, batches: list[Batch]) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model truncated to ``rank`` everywhere, and the same with its stream restored."""
    truncated, targets, _ = compress(model, rank)
    repaired, _, _ = compress(model, rank)
    stats = collect_curvature(model, targets, batches)
    restore_stream(repaired, model, targets, stats, factorize, batches)
    return truncated, repaired


def test_a_restored_stream_ends_closer_to_that_of_the_dense_model() -> None:
    for name in ENCODERS:
        model, batches = tiny.build(name), many(name)
        truncated, repaired = restored(model, 4, batches)
        assert output_error(model, repaired, batches) < 0.9 * output_error(model, truncated, batches), name


def test_layers_that_write_to_the_stream_change_and_no_others_and_no_rank_does() -> None:
    model = tiny.build("ViTModel")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    truncated, repaired = restored(model, 4, many("ViTModel"))
    written = {target.name for target in writers(repaired, find_targets(model))}
    assert {name.rsplit(".", 1)[1] for name in written} == {"o_proj", "fc2"}
    for name, value in repaired.state_dict().items():
        was = truncated.state_dict()[name]
        assert was.shape == value.shape
        assert torch.equal(was, value) is (name.rsplit(".", 1)[0] not in written)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_where_little_is_lacking_little_changes() -> None:
    model, batches = tiny.build("ViTModel"), many("ViTModel")
    _, repaired = restored(model, 31, batches)
    power = torch.cat([last_hidden(model, batch) for batch in batches]).square().mean()
    assert output_error(model, repaired, batches) < 1e-3 * power


def test_dense_layers_and_layers_without_a_bias_are_left_alone() -> None:
    model = tiny.build("ViTModel")
    targets = [target for target in find_targets(model) if target.role == "fc2"]
    first = targets[0].name
    layer = tiny.low_rank(model.get_submodule(first), 3)
    layer.bias = None
    replace_layers(model, {first: layer})
    assert writers(model, targets) == []


@pytest.mark.parametrize("name", ENCODERS)
def test_the_stream_is_what_a_layer_adds_to(name: str) -> None:
    model, batch = tiny.build(name), batches_of(name)[0]
    family = family_of(model)
    block = blocks_of(model)[0]
    (entering,) = hidden_batches(model, block, [batch])
    with torch.no_grad():
        met = passage(block, family, entering)
        total = met.stream["fc2"] + block.get_submodule(family.modules["fc2"])(met.read)
        if family.norm == "after":
            total = block.output.LayerNorm(total)
    torch.testing.assert_close(total, met.left)


def test_padding_has_no_part_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "signs", lambda like, _generator: torch.ones_like(like))
    model = tiny.build("BertModel")
    batches = many("BertModel")

    def padded(batch: Batch, more: int) -> Batch:
        assert batch.mask is not None
        inputs = {key: nn.functional.pad(value, (0, more)) for key, value in batch.inputs.items()}
        return Batch(inputs, nn.functional.pad(batch.mask, (0, more)))

    _, one = restored(model, 4, batches)
    _, other = restored(model, 4, [padded(batch, 3) for batch in batches])
    for batch in batches:
        found, want = (last_hidden(each, batch)[batch.mask] for each in (other, one))
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)


def test_token_weights_are_those_of_the_curvature() -> None:
    model, batches = tiny.build("BertModel"), batches_of("BertModel")
    targets = [target for target in find_targets(model) if target.role == "fc2"]
    weights = TokenWeights([target.name for target in targets])
    component_effects(model, {}, batches, weights=weights)
    for number, batch in enumerate(batches):
        collector = Seen(model, targets)
        collector.run(number, batch)
        assert batch.mask is not None
        for target in targets:
            found = weights.found[number][target.name]
            torch.testing.assert_close(found[batch.mask], collector.weights[target.input_group])
            assert not found[~batch.mask].any()


class Seen(CurvatureCollector):
    """Keeps the weights of its last batch."""

    weights: ClassVar[dict[str, Tensor]] = {}

    def _sum_inputs(self, group: str) -> None:
        (reader,) = (target for target in self.targets if target.input_group == group)
        self.weights[group] = token_weights([self._importance[reader.name][0]])
        super()._sum_inputs(group)


# The regression


WEIGHT = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))


def lack(relation: Callable[[Tensor], Tensor], seed: int, tokens: int = 64, center: float = 0.5) -> Lack:
    x = torch.randn(tokens, 1, 6, generator=torch.Generator().manual_seed(seed))
    found = Lack.nothing(WEIGHT, torch.full((6,), center, dtype=torch.float64))
    found.add(x, relation(x), torch.linspace(0.5, 1.5, tokens)[:, None])
    return found


def test_a_linear_relation_to_what_is_written_is_found() -> None:
    B = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    one, other = (lack(lambda x: x @ WEIGHT.T @ B.T + 2, seed) for seed in (1, 2))
    ridge = best_ridge(one, other, None)
    assert ridge == 1e-3
    torch.testing.assert_close(regression(*(one + other).covariances(), ridge), B.double(), rtol=0.01, atol=0.01)


def test_moments_do_not_depend_on_what_is_taken_out_before() -> None:
    near, far = (lack(lambda x: x[..., :3].square(), 1, center=center) for center in (0.0, 3.0))
    for one, other in zip((*near.means(), *near.covariances()), (*far.means(), *far.covariances()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_what_holds_in_one_half_of_the_samples_only_is_not_added() -> None:
    halves = lack(lambda x: x[..., :3], 1), lack(lambda x: -x[..., :3], 2)
    assert best_ridge(*halves, None) is None


def test_half_of_no_samples_says_nothing() -> None:
    empty = Lack.nothing(WEIGHT, torch.zeros(6, dtype=torch.float64))
    assert best_ridge(lack(lambda x: x[..., :3], 1), empty, None) is None
