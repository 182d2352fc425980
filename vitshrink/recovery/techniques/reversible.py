"""Bidirectional integration approximation (BDIA), and back-propagation that recomputes activations from outputs.

Guoqiang Zhang, J. P. Lewis and W. B. Kleijn, "On Exact Bit-level Reversible Transformers Without Changing
Architectures", arXiv 2407.09093. With h_k(x) = block_k(x) − x, training runs

    x_1 = x_0 + h_0(x_0),    x_{k+1} = γ x_{k−1} + (1 − γ) x_k + (1 + γ) h_k(x_k),    γ = ±½ a sample and block,

and inference, γ = 0, is the model as it was. x_{k−1} follows from x_k and x_{k+1}: where activations are rounded to
multiples of 2^−l, and the bit that halving x_{k−1} loses is kept, it does so exactly, and the activations of a model
need not be stored, however deep it is. Smaller powers of two, γ = ±2^−m, stay nearer to the model and keep m bits.

With γ = −g in every block this is the momentum residual network of Sander et al., "Momentum Residual Neural Networks",
ICML 2021, arXiv 2102.07870: x_{k+1} = x_k + v_{k+1}, v_{k+1} = g v_k + (1 − g) h_k(x_k), begun with v_0 = h_0(x_0).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.config.options import GAMMAS
from vitshrink.models.structures.following import borrowed_parameters
from vitshrink.models.targets import blocks_of

FRACTION_BITS = 9
"""l: activations are multiples of 2^−l. A float32 holds them exactly up to ±2^(24−l)."""

_WEIGHTS_OF_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


@contextmanager
def bidirectional(
    model: PreTrainedModel, *, reversible: bool, gamma: float = GAMMAS[0], momentum: bool = False
) -> Iterator["Stack"]:
    """Inside, passes of ``model`` in training mode run its blocks under BDIA; others run them as ever.

    γ is ±``gamma``, a power of two of at most ½, or −``gamma`` throughout with ``momentum``.

    With ``reversible`` activations are rounded, and recomputed in the backward pass instead of kept. Hooks inside the
    blocks then see values from which no gradient flows.
    """
    stack = Stack(model, reversible=reversible, gamma=gamma, momentum=momentum)
    blocks = list(blocks_of(model))
    try:
        # On the instances: names, parameters and what has been wrapped around the model stay as they are.
        blocks[0].forward = stack.forward
        for block in blocks[1:]:
            block.forward = stack.later(block)
        yield stack
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


class Stack:
    """All blocks of a model as one function of the hidden states that enter the first."""

    def __init__(self, model: PreTrainedModel, *, reversible: bool, gamma: float, momentum: bool) -> None:
        self.model = model
        self.blocks = list(blocks_of(model))
        self.reversible = reversible
        self.gamma = gamma
        self.momentum = momentum

    def forward(self, hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """Takes the place of the first block's: hidden states (batch, tokens, width) through all of them."""
        steps = [_step(block, arguments, keywords) for block in self.blocks]
        if not self.model.training or len(steps) == 1:
            return steps[0](hidden)
        shape = (len(steps) - 1, hidden.shape[0]) + (1,) * (hidden.ndim - 1)
        signs = torch.randint(0, 1 if self.momentum else 2, shape, device=hidden.device).to(torch.float32)
        gamma = self.gamma * (2 * signs - 1)
        hidden = hidden.float()
        if self.reversible and torch.is_grad_enabled():
            read = [(*block.parameters(), *borrowed_parameters(block)) for block in self.blocks]
            parameters = [[p for p in group if p.requires_grad] for group in read]
            plan = Plan(steps, gamma, FRACTION_BITS, [len(group) for group in parameters], hidden.device.type)
            return _Reversible.apply(plan, hidden, *(p for group in parameters for p in group))  # type: ignore[no-any-return, no-untyped-call]
        return integrate(steps, gamma, hidden, FRACTION_BITS if self.reversible else None)

    def later(self, block: nn.Module) -> Callable[..., Tensor]:
        """Takes the place of another block's forward: in training the first has done its work already."""

        def forward(hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
            return hidden if self.model.training else _step(block, arguments, keywords)(hidden)

        return forward


Step = Callable[[Tensor], Tensor]


def _step(block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Step:
    def step(hidden: Tensor) -> Tensor:
        output = type(block).forward(block, hidden, *arguments, **keywords)
        assert isinstance(output, Tensor)
        return output

    return step


def integrate(steps: Sequence[Step], gamma: Tensor, hidden: Tensor, fraction_bits: int | None) -> Tensor:
    """The forward pass, all activations kept for autograd; rounded where ``fraction_bits`` is given."""
    if fraction_bits is None:
        before, now = hidden, steps[0](hidden).float()
        for step, g in zip(steps[1:], gamma, strict=True):
            before, now = now, g * before + _increment(step, g, now)
        return now
    before = _rounded(hidden, fraction_bits)
    now = _rounded(steps[0](before), fraction_bits)
    for step, g in zip(steps[1:], gamma, strict=True):
        whole = before + _missing(before.detach(), g, fraction_bits) * 2.0**-fraction_bits
        before, now = now, g * whole + _rounded(_increment(step, g, now), fraction_bits)
    return now


def _increment(step: Step, gamma: Tensor, hidden: Tensor) -> Tensor:
    """(1 − γ) x + (1 + γ) h(x) with h(x) = block(x) − x."""
    return (1 + gamma) * step(hidden).float() - 2 * gamma * hidden


def _rounded(x: Tensor, fraction_bits: int) -> Tensor:
    """The nearest multiples of 2^−l; the gradient passes straight through."""
    x = x.float()
    nearest = torch.round(x.detach() * 2.0**fraction_bits) * 2.0**-fraction_bits
    return x + (nearest - x.detach())  # the difference of two so near is exact, and so is the sum


def _missing(x: Tensor, gamma: Tensor, fraction_bits: int) -> Tensor:
    """How many times 2^−l multiples of it lack, until γ = ±2^−m times them is one again: 0 to 2^m − 1."""
    return torch.remainder(-x * 2.0**fraction_bits, 1 / gamma.abs())


@dataclass(eq=False)
class Plan:
    """What a reversible pass does; ``seeds`` and ``autocast`` let the backward pass repeat the forward one."""

    steps: Sequence[Step]
    gamma: Tensor
    fraction_bits: int
    sizes: Sequence[int]
    """Trainable parameters that each block reads, which follow the hidden states among the arguments."""
    device_type: str
    seeds: list[int] = field(default_factory=list)
    autocast: tuple[bool, torch.dtype] = (False, torch.bfloat16)

    @property
    def bits_kept(self) -> int:
        """m, for γ = ±2^−m."""
        return -round(math.log2(self.gamma.abs().max().item()))

    def remember(self) -> None:
        self.seeds = torch.randint(2**31, (len(self.steps),)).tolist()
        enabled = torch.is_autocast_enabled(self.device_type)
        self.autocast = (enabled, torch.get_autocast_dtype(self.device_type))

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Block ``index``, with the dropout that it drew the first time."""
        enabled, dtype = self.autocast
        with self._random_state(self.seeds[index]), torch.autocast(self.device_type, dtype, enabled=enabled):
            if index == 0:
                return self.steps[0](hidden).float()
            return _increment(self.steps[index], self.gamma[index - 1], hidden)

    @contextmanager
    def _random_state(self, seed: int) -> Iterator[None]:
        devices = [torch.cuda.current_device()] if self.device_type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield


class _Reversible(torch.autograd.Function):
    """Keeps the last two activations, and m bits for each number of the others."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, hidden: Tensor, *_parameters: Tensor) -> Tensor:
        plan.remember()
        bits = plan.fraction_bits
        before = _rounded(hidden.detach(), bits)
        now = _rounded(plan.run(0, before), bits)
        kept, bits_kept = [], plan.bits_kept  # asked once: a GPU has to be waited for
        for index, g in enumerate(plan.gamma, start=1):
            lost = _missing(before, g, bits)
            kept.append(_packed(lost, bits_kept))
            before, now = now, g * (before + lost * 2.0**-bits) + _rounded(plan.run(index, now), bits)
        ctx.plan, ctx.kept, ctx.parameters = plan, kept, _parameters
        ctx.save_for_backward(before, now)
        return now.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        plan: Plan = ctx.plan
        before, now = ctx.saved_tensors
        of_before, of_now = torch.zeros_like(gradient), gradient
        found: list[Tensor | None] = []
        remaining = list(ctx.parameters)
        for index in reversed(range(len(plan.steps))):
            start = len(remaining) - plan.sizes[index]
            parameters, remaining = remaining[start:], remaining[:start]
            with torch.enable_grad():
                entered = before.detach().requires_grad_()
                output = plan.run(index, entered)
            of_entered, *of_parameters = torch.autograd.grad(output, (entered, *parameters), of_now, allow_unused=True)
            found = [*of_parameters, *found]
            of_before = of_before + of_entered
            if index:
                g = plan.gamma[index - 1]
                lost = _unpacked(ctx.kept[index - 1], before.shape) * 2.0**-plan.fraction_bits
                before, now = (now - _rounded(output.detach(), plan.fraction_bits)) / g - lost, before
                of_before, of_now = g * of_now, of_before
        return None, of_before, *found


def _packed(numbers: Tensor, bits: int) -> Tensor:
    """Numbers of so many bits, the lowest ones of all first, eight to a byte: (bits, bytes)."""
    flat = torch.nn.functional.pad(numbers.flatten().to(torch.uint8), (0, -numbers.numel() % 8)).view(-1, 8)
    weights = torch.tensor(_WEIGHTS_OF_BITS, dtype=torch.uint8, device=flat.device)
    return torch.stack([((flat >> i & 1) * weights).sum(1, dtype=torch.uint8) for i in range(bits)])


def _unpacked(packed: Tensor, shape: torch.Size) -> Tensor:
    weights = torch.tensor(_WEIGHTS_OF_BITS, dtype=torch.uint8, device=packed.device)
    planes = [(each[:, None] & weights).ne(0).flatten()[: shape.numel()] * 2.0**i for i, each in enumerate(packed)]
    return torch.stack(planes).sum(0).view(shape)
