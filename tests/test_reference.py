"""The dense model's outputs: computed once for a batch, as long as there is room."""

from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from test_curvature import batch_of

from vitshrink.statistics.reference import DenseOutputs

NAME = "ViTForImageClassification"


@pytest.mark.parametrize(("room", "runs"), [(2**28, 2), (0, 4), (128, 3)])
def test_outputs_are_kept_while_there_is_room(room: int, runs: int) -> None:
    model, batches = tiny.build(NAME), [batch_of(NAME, 8, seed=seed) for seed in range(2)]
    assert model(**batches[0].inputs).logits.nbytes == 128
    ran: list[Any] = []
    model.register_forward_pre_hook(lambda _module, _given: ran.append(1))
    outputs = DenseOutputs(model, room=room)
    found = [outputs(batch).logits for batch in (*batches, *batches)]
    assert len(ran) == runs
    for batch, first, again in zip(batches, found[:2], found[2:], strict=True):
        assert torch.equal(first, again)
        assert torch.equal(first, model(**batch.inputs).logits)
        assert not first.requires_grad


def test_passes_are_run_in_the_arithmetic_that_was_asked_for() -> None:
    entered = []

    @contextmanager
    def passes() -> Any:
        entered.append(1)
        with torch.autocast("cpu", torch.bfloat16):
            yield

    batch = batch_of(NAME, 2)
    assert DenseOutputs(tiny.build(NAME), passes)(batch).logits.dtype == torch.bfloat16
    assert entered == [1]
