import pytest
import tiny
import torch
from torch import Tensor, nn

from vitshrink.methods.ranks import rank_cost
from vitshrink.models import cost
from vitshrink.models.structures.low_rank import LayerSpec, LowRankLinear

HIDDEN, MLP, BLOCKS = 32, 64, 2


def encoder_macs(tokens: int, rank: int | None = None) -> int:
    """By hand: four square projections, two of the MLP, and the two products of the attention."""

    def linear(outputs: int, inputs: int) -> int:
        return tokens * (outputs * inputs if rank is None else rank_cost(outputs, inputs, rank))

    layers = 4 * linear(HIDDEN, HIDDEN) + linear(MLP, HIDDEN) + linear(HIDDEN, MLP)
    return BLOCKS * (layers + 2 * tokens * tokens * HIDDEN)


def vit_macs(rank: int | None = None) -> int:
    patches = (tiny.IMAGE_SIZE // 8) ** 2
    embedding, head = patches * 3 * 8 * 8 * HIDDEN, HIDDEN * len(tiny.IMAGE_CLASSES)
    return embedding + encoder_macs(patches + 1, rank) + head


def compress(model: nn.Module, rank: int) -> list[str]:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, tiny.low_rank(model.get_submodule(name), rank))  # type: ignore[arg-type]
    return names


def test_macs_of_a_dense_vit_are_those_counted_by_hand_with_attention() -> None:
    inputs = tiny.inputs("ViTForImageClassification", batch=1)
    assert cost.macs(tiny.build("ViTForImageClassification"), inputs) == vit_macs()


def test_macs_of_a_low_rank_vit_are_those_of_its_factors() -> None:
    model = tiny.build("ViTForImageClassification")
    compress(model, rank=5)
    assert cost.macs(model, tiny.inputs("ViTForImageClassification", batch=1)) == vit_macs(rank=5)


def test_macs_grow_with_the_samples_and_leave_gradients_and_half_precision_alone() -> None:
    model = tiny.build("ViTForImageClassification").to(torch.bfloat16)
    assert cost.macs(model, tiny.inputs("ViTForImageClassification", batch=3)) == 3 * vit_macs()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_macs_of_text_count_attention_too() -> None:
    tokens = 10
    inputs = tiny.inputs("BertModel", batch=1)
    pooler = HIDDEN * HIDDEN
    assert cost.macs(tiny.build("BertModel"), inputs) == encoder_macs(tokens) + pooler


def test_tied_weights_count_once() -> None:
    model = tiny.build("BertForMaskedLM")
    stored = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    assert cost.parameters(model) == sum(parameter.numel() for parameter in stored.values())
    assert cost.memory_bytes(model) >= 4 * cost.parameters(model)
    embedding = len(tiny.VOCABULARY) * HIDDEN
    assert cost.parameters(model) < sum(p.numel() for p in model.state_dict().values()) - embedding + 1


def test_layers_count_their_factors_and_no_biases() -> None:
    model = tiny.build("ViTForImageClassification")
    dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    assert cost.layers_parameters(model, dense) == BLOCKS * (4 * HIDDEN**2 + 2 * HIDDEN * MLP)
    names = compress(model, rank=5)
    expected = BLOCKS * (4 * rank_cost(HIDDEN, HIDDEN, 5) + 2 * rank_cost(HIDDEN, MLP, 5))
    assert cost.layers_parameters(model, names) == expected


def test_memory_follows_the_dtype() -> None:
    layer = LowRankLinear(8, 6, LayerSpec(2), dtype=torch.float16)
    assert cost.memory_bytes(layer) == 2 * cost.parameters(layer) == 2 * (2 * 14 + 6)


class Recorder(nn.Module):
    def __init__(self, name: str, calls: list[str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.name, self.calls = name, calls

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        self.calls.append(self.name)
        return x


def test_models_are_timed_in_turn_after_warming_up() -> None:
    calls: list[str] = []
    models = {name: Recorder(name, calls) for name in "ab"}
    found = cost.latency(models, {"x": torch.zeros(4, 2)}, repeats=5, warmup=2)
    assert calls == ["a", "b"] * 7
    assert all(model.training for model in models.values())
    timing = found["a"]
    assert (timing.repeats, timing.batch_size) == (5, 4)
    assert 0 < timing.lower_quartile <= timing.median <= timing.upper_quartile
    assert timing.throughput == pytest.approx(4 / timing.median)


def test_no_repeats_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        cost.latency({"a": nn.Linear(1, 1)}, {"input": torch.zeros(1, 1)}, repeats=0)


def test_peak_memory_is_that_of_a_python_process() -> None:
    assert 50e6 < cost.peak_memory_bytes() < 1e12
