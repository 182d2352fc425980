"""BDIA: exact reversibility, gradients equal to autograd's, and the unchanged model at inference."""

from functools import partial

import pytest
import tiny
import torch
from torch import Tensor, nn

from vitshrink.models import blocks_of
from vitshrink.recovery.reversible import Plan, _packed, _Reversible, _unpacked, bidirectional, integrate

DEPTH = 12


class Residual(nn.Module):
    """x + h(x), with enough of a slope that errors would grow over twelve of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + 2 * self.inner(x)


def test_gradients_are_those_of_autograd_at_depth_twelve() -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(Residual(16) for _ in range(DEPTH))
    x = (3 * torch.randn(4, 5, 16)).requires_grad_()
    gamma = torch.randint(0, 2, (DEPTH - 1, 4, 1, 1)).float() - 0.5
    parameters = list(blocks.parameters())

    kept = integrate(list(blocks), gamma, x, 9)
    wanted = torch.autograd.grad(kept.square().sum(), [x, *parameters])

    plan = Plan(list(blocks), gamma, 9, [len(list(block.parameters())) for block in blocks], "cpu")
    recomputed = _Reversible.apply(plan, x, *parameters)
    assert torch.equal(recomputed, kept)
    for found, expected in zip(torch.autograd.grad(recomputed.square().sum(), [x, *parameters]), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_activations_are_recomputed_to_the_last_bit() -> None:
    torch.manual_seed(1)
    blocks = [Residual(16) for _ in range(DEPTH)]
    seen: dict[str, list[Tensor]] = {"forward": [], "backward": []}

    def step(block: nn.Module, x: Tensor) -> Tensor:
        seen["backward" if torch.is_grad_enabled() else "forward"].append(x.detach().clone())
        return block(x)

    gamma = torch.randint(0, 2, (DEPTH - 1, 4, 1, 1)).float() - 0.5
    plan = Plan([partial(step, block) for block in blocks], gamma, 9, [0] * DEPTH, "cpu")
    x = (3 * torch.randn(4, 5, 16)).requires_grad_()
    _Reversible.apply(plan, x).sum().backward()
    assert len(seen["forward"]) == len(seen["backward"]) == DEPTH
    for forward, backward in zip(seen["forward"], reversed(seen["backward"]), strict=True):
        assert torch.equal(forward, backward)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "DeiTModel", "BertForMaskedLM"])
def test_inference_is_the_model_as_it_was(name: str) -> None:
    model, x = tiny.build(name), tiny.inputs(name)
    with torch.no_grad():
        expected = model(**x)[0]
        with bidirectional(model, reversible=True):
            assert torch.equal(model(**x)[0], expected)
            model.train()
            assert not torch.equal(model(**x)[0], expected)
            model.eval()
        assert torch.equal(model(**x)[0], expected)
    assert all("forward" not in block.__dict__ for block in blocks_of(model))


def test_dropout_is_drawn_once() -> None:
    """Blocks that the backward pass runs again drop the same numbers."""
    model = tiny.build("BertForSequenceClassification")
    x = tiny.inputs("BertForSequenceClassification")
    model.train()
    assert model.config.hidden_dropout_prob > 0
    gradients = []
    with bidirectional(model, reversible=True):
        for _ in range(2):
            torch.manual_seed(3)
            model.zero_grad()
            model(**x).logits.sum().backward()
            gradients.append(model.classifier.weight.grad.clone())
    assert torch.equal(*gradients)


def test_bits_are_packed_without_loss() -> None:
    bits = torch.rand(3, 7, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = _packed(bits)
    assert packed.nbytes == -(-bits.numel() // 8)
    assert torch.equal(_unpacked(packed, bits.shape), bits)
