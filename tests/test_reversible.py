"""BDIA: exact reversibility, gradients equal to autograd's, and the unchanged model at inference."""

from functools import partial

import pytest
import tiny
import torch
from torch import Tensor, nn

from vitshrink.models.targets import blocks_of
from vitshrink.recovery.techniques.reversible import Plan, _packed, _Reversible, _unpacked, bidirectional, integrate

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


@pytest.mark.parametrize("size", [0.5, 0.125])
def test_gradients_are_those_of_autograd_at_depth_twelve(size: float) -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(Residual(16) for _ in range(DEPTH))
    x = (3 * torch.randn(4, 5, 16)).requires_grad_()
    gamma = size * (2 * torch.randint(0, 2, (DEPTH - 1, 4, 1, 1)).float() - 1)
    parameters = list(blocks.parameters())

    kept = integrate(list(blocks), gamma, x, 9)
    wanted = torch.autograd.grad(kept.square().sum(), [x, *parameters])

    plan = Plan(list(blocks), gamma, 9, [len(list(block.parameters())) for block in blocks], "cpu")
    recomputed = _Reversible.apply(plan, x, *parameters)
    assert torch.equal(recomputed, kept)
    for found, expected in zip(torch.autograd.grad(recomputed.square().sum(), [x, *parameters]), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("size", [0.5, 0.25, 0.125])
def test_activations_are_recomputed_to_the_last_bit(size: float) -> None:
    torch.manual_seed(1)
    blocks = [Residual(16) for _ in range(DEPTH)]
    seen: dict[str, list[Tensor]] = {"forward": [], "backward": []}

    def step(block: nn.Module, x: Tensor) -> Tensor:
        seen["backward" if torch.is_grad_enabled() else "forward"].append(x.detach().clone())
        return block(x)

    gamma = size * (2 * torch.randint(0, 2, (DEPTH - 1, 4, 1, 1)).float() - 1)
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


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_numbers_of_few_bits_are_packed_without_loss(bits: int) -> None:
    numbers = torch.randint(0, 2**bits, (3, 7, 5), generator=torch.Generator().manual_seed(0)).float()
    packed = _packed(numbers, bits)
    assert packed.nbytes == bits * -(-numbers.numel() // 8)
    assert torch.equal(_unpacked(packed, numbers.shape), numbers)


@pytest.mark.parametrize("reversible", [False, True])
def test_one_sign_is_a_momentum_residual_network(reversible: bool) -> None:
    """v_{k+1} = g v_k + (1 − g) h_k(x_k), x_{k+1} = x_k + v_{k+1}, as published; up to the rounding of activations."""
    model, x = tiny.build("ViTForImageClassification"), tiny.inputs("ViTForImageClassification")
    entered: list[Tensor] = []
    handle = blocks_of(model)[0].register_forward_pre_hook(lambda _module, given: entered.append(given[0]))
    with torch.no_grad():
        model(**x)
        handle.remove()
        hidden, velocity = entered[0], None
        for block in blocks_of(model):
            increment = block(hidden) - hidden
            velocity = increment if velocity is None else 0.25 * velocity + 0.75 * increment
            hidden = hidden + velocity
        expected = model.classifier(model.vit.layernorm(hidden)[:, 0])
        with bidirectional(model, reversible=reversible, gamma=0.25, momentum=True):
            model.eval()
            model.training = True
            found = model(**x).logits
    model.training = False
    tolerance = 0.02 if reversible else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gamma", [0.5, 0.125])
def test_a_smaller_gamma_strays_less(gamma: float) -> None:
    model, x = tiny.build("ViTForImageClassification"), tiny.inputs("ViTForImageClassification")
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model(**x).logits
        model.training = True
        with bidirectional(model, reversible=False, gamma=gamma):
            strayed = (model(**x).logits - expected).norm()
        with bidirectional(model, reversible=False, gamma=gamma / 2):
            nearer = (model(**x).logits - expected).norm()
    model.training = False
    assert nearer < strayed
