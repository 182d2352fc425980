"""Backward passes in little memory: the activations inside a block are computed again when its turn comes."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from vitshrink.models.cost import memory_bytes
from vitshrink.models.example import usual_tokens
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.targets import blocks_of, first_blocks
from vitshrink.runtime.attention import short_in_full
from vitshrink.runtime.offloading import running, runs_on
from vitshrink.runtime.paging import drop
from vitshrink.runtime.precision import mixed_type

SHARE = 1 / 8
"""Of the memory that is free: what the activations of all blocks may take before some are computed twice."""

ROOM, MODELS = 2**29, 0.5
"""Bytes that they may take anyway, and more by so many times the model, however much memory is free."""

NARROW_BYTES = 3
"""Of a number that passes in mixed precision keep, on average: some stay in float32."""

MOST_SAMPLES, FEW_SAMPLES, TOGETHER = 32, 4, 2**26
"""Of a batch that goes backward, where nobody says how large it is: samples at most, those that may take twice the
bytes, and bytes of activations in one block: a dozen of blocks of so many needs to compute none of them twice."""


@dataclass(eq=False)
class Recomputing:
    """Decides pass by pass how many blocks of a model keep their activations; the gradients are the same."""

    blocks: Sequence[nn.Module]
    """In the order in which they run, one after the other, within each encoder."""
    starts: Collection[nn.Module]
    """Those that the encoders begin with."""
    room: int
    """Bytes for activations, where enough memory is free."""
    recomputed: int = 0
    """How many blocks of an encoder, the first ones, are computed twice: the last ones need their activations first."""
    call: int | None = None
    """The call of a block that is computed, the same number both times; None where it is computed once."""
    _calls: int = 0
    _encoder: dict[nn.Module, list[nn.Module]] = field(default_factory=dict)
    """The blocks of the encoder that a block is one of."""

    def __post_init__(self) -> None:
        encoder: list[nn.Module] = []
        for block in self.blocks:
            encoder = [block] if block in self.starts else [*encoder, block]
            self._encoder |= dict.fromkeys(encoder, encoder)

    def decide(self, hidden: Tensor, encoder: Sequence[nn.Module]) -> None:
        """For a pass in which the first block of an encoder reads ``hidden`` (samples, tokens, width)."""
        tokens = hidden.numel() // hidden.shape[-1]
        room = min(self.room, SHARE * free_memory(hidden.device))
        each = 4 if mixed_type(hidden.device) is None else NARROW_BYTES
        kept = int(len(encoder) * room / max(each * tokens * sum(map(read_and_given, encoder)), 1))
        away = any(runs_on(block) is not None for block in encoder)  # where their weights would stay, too
        self.recomputed = len(encoder) if away else max(len(encoder) - kept, 0)

    def forward(self, block: nn.Module, dense: Callable[..., Any]) -> Callable[..., Any]:
        """What stands for the ``forward`` of a block, which is ``dense``."""
        dense = short_in_full(dense)

        def forward(*inputs: Any, **options: Any) -> Any:
            drop()  # weights in files of the blocks before
            if not inputs or not isinstance(inputs[0], Tensor):
                return dense(*inputs, **options)
            hidden, *rest = inputs
            if hidden.requires_grad and torch.is_grad_enabled():
                hidden.register_hook(_let_go)
            encoder = self._encoder[block]
            if block is encoder[0]:
                self.decide(hidden, encoder)
            recomputes = encoder.index(block) < self.recomputed
            if not (recomputes and torch.is_grad_enabled() and hidden.requires_grad):
                return dense(hidden, *rest, **options)
            # hooks inside see one pass with gradients, the second: the first one has none. Some blocks change what they
            # read in place, which a leaf does not allow
            self._calls += 1
            run = partial(self._run, self._calls, block, lambda x: dense(x.clone(), *rest, **options))
            return checkpoint(run, hidden, use_reentrant=True, preserve_rng_state=False)

        return forward

    def _run(self, call: int, block: nn.Module, dense: Callable[[Tensor], Any], hidden: Tensor) -> Any:
        self.call = call
        try:
            with running(block):
                return dense(hidden)
        finally:
            self.call = None


def _let_go(_gradient: Tensor) -> None:
    """The backward pass of a block has ended: of its weights in files nothing is used any more."""
    drop()


def room_for(model: nn.Module) -> int:
    """Bytes that a job on a model may take beside it, however much memory is free, before it saves room."""
    return int(ROOM + MODELS * memory_bytes(model))


def is_large(nbytes: int, model: nn.Module) -> bool:
    """Whether what a job learns of a model takes so much room that it is better kept in files."""
    return nbytes > room_for(model) / 4


def batch_that_fits(model: PreTrainedModel) -> int:
    """Samples in a batch that goes forward and backward, where nobody says how many: a power of two, up to 32.

    So many that the activations of one block take at most ``TOGETHER`` bytes, or, of ``FEW_SAMPLES``, twice as many. It
    follows from the model alone, as what is learned of it depends on the batches.
    """
    largest = max(map(read_and_given, blocks_of(model)), default=1)
    of_one = 4 * usual_tokens(model) * max(largest, 1)
    fitting = max(TOGETHER // of_one, min(FEW_SAMPLES, 2 * TOGETHER // of_one))
    return int(1 << min(max(fitting, 1).bit_length() - 1, MOST_SAMPLES.bit_length() - 1))


def read_and_given(block: nn.Module) -> int:
    """Of a token: the numbers that the linear layers of a block read and give, and those between two factors."""
    layers = [each for each in block.modules() if isinstance(each, nn.Linear | LowRankLinear)]
    between = sum(2 * each.rank for each in layers if isinstance(each, LowRankLinear))
    return between + sum(each.in_features + each.out_features for each in layers)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


@contextmanager
def recomputing(model: PreTrainedModel) -> Iterator[Recomputing]:
    """Inside, passes over ``model`` take little memory for activations, whatever they compute.

    Blocks whose activations find no room are computed twice: a third more time, if there is none for any. Hooks on
    modules of a block are called again in the backward pass, then with gradients.
    """
    found = Recomputing(list(blocks_of(model)), first_blocks(model), room_for(model))
    for block in found.blocks:
        block.forward = found.forward(block, block.forward)
    try:
        yield found
    finally:
        for block in found.blocks:
            vars(block).pop("forward", None)
