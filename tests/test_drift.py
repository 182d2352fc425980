"""Drift: after the correction every layer hands on the dense model's mean."""

import copy

import pytest
import tiny
import torch

from vitshrink.data import Batch
from vitshrink.drift import correct_drift
from vitshrink.models import find_targets


def batches(architecture: str) -> list[Batch]:
    made = []
    for seed in range(4):
        inputs = tiny.inputs(architecture, batch=8, seed=seed)
        mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
        made.append(Batch(inputs, mask, [None] * 8, [f"{seed}.{row}" for row in range(8)]))
    return made


@pytest.mark.parametrize("architecture", ["ViTForImageClassification", "DeiTModel", "BertForSequenceClassification"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_last_mean_is_that_of_the_dense_model(architecture: str, weighted: bool) -> None:
    dense = tiny.build(architecture)
    targets = find_targets(dense)
    model = copy.deepcopy(dense)
    for target in targets:
        model.set_submodule(target.name, tiny.low_rank(model.get_submodule(target.name), 6))
    data = batches(architecture)
    tokens = sum(int(b.mask.sum()) if b.mask is not None else 8 * 17 for b in data)
    if architecture == "DeiTModel":
        tokens = 4 * 8 * 18
    generator = torch.Generator().manual_seed(0)
    weights = 0.5 + torch.rand(tokens, generator=generator) if weighted else torch.ones(tokens)

    def mean(each: torch.nn.Module) -> torch.Tensor:
        """Weighted mean of what the last fc2 writes into the residual stream, in the model's own forward pass."""
        seen: list[torch.Tensor] = []
        name = targets[-1].name
        handle = each.get_submodule(name).register_forward_hook(
            lambda _m, _i, output: seen.append(output), always_call=False
        )
        fc1: list[torch.Tensor] = []
        blocks = each.base_model.get_submodule("encoder.layer" if "Bert" in architecture else "layers")
        other = blocks[-1].register_forward_hook(lambda _m, _i, output: fc1.append(output))
        inner = each.get_submodule(targets[-2].name).register_forward_pre_hook(lambda _m, i: fc1.append(i[0]))
        rows = []
        with torch.no_grad():
            for batch in data:
                seen.clear()
                fc1.clear()
                each(**batch.inputs)
                handed = fc1[0] + seen[0] if "Bert" in architecture else fc1[1]
                rows.append(handed[batch.mask] if batch.mask is not None else handed.flatten(0, 1))
        for hook in (handle, other, inner):
            hook.remove()
        return (weights[:, None] * torch.cat(rows)).sum(0) / weights.sum()

    before = (mean(model) - mean(dense)).abs().max()
    names = {target.name: weights for target in targets}
    correct_drift(model, dense, targets, names, data)
    assert before > 0.01
    torch.testing.assert_close(mean(model), mean(dense), rtol=0, atol=1e-4)


def test_the_dense_model_has_nothing_to_correct() -> None:
    dense = tiny.build("ViTForImageClassification")
    targets = find_targets(dense)
    model = copy.deepcopy(dense)
    data = batches("ViTForImageClassification")
    correct_drift(model, dense, targets, {t.name: torch.ones(4 * 8 * 17) for t in targets}, data)
    for one, other in zip(dense.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
