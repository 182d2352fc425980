"""Structures: what is described is what is built, counted and found again."""

import copy

import pytest
import tiny
import torch
from torch import nn

from vitshrink.errors import CheckpointError
from vitshrink.lowrank import LayerSpec
from vitshrink.structures import describe, read, structure, structure_of


def test_an_entry_without_a_structure_is_a_low_rank_layer() -> None:
    """Checkpoints from before there were other structures read as they did."""
    for spec in (LayerSpec(3), LayerSpec(3, 2)):
        assert describe(spec) == spec.to_dict()
        assert read(describe(spec)) == spec
    assert "structure" not in describe(LayerSpec(3))


def test_a_built_module_is_empty_where_the_dense_one_was_and_counts_as_promised() -> None:
    linear = nn.Linear(10, 6, device="meta", dtype=torch.bfloat16)
    built = LayerSpec(2).build(linear)
    assert structure_of(built) == LayerSpec(2)
    assert {(p.device.type, p.dtype) for p in built.parameters()} == {("meta", torch.bfloat16)}
    assert sum(p.numel() for p in built.parameters()) == 38


def test_modules_of_the_dense_model_have_no_structure() -> None:
    model = copy.deepcopy(tiny.build("ViTModel"))
    assert not any(structure_of(module) for module in model.modules())


def test_an_unknown_structure_and_a_second_of_one_name_are_errors() -> None:
    with pytest.raises(CheckpointError, match=r"structure 'new', and this version knows .*low-rank"):
        read({"structure": "new"})
    with pytest.raises(ValueError, match="two structures are called 'low-rank'"):
        structure("low-rank")(LayerSpec)
