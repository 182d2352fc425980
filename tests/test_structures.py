"""Structures: what is described is what is built, counted and found again."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_attention_methods import at_rank
from torch import nn
from transformers import PreTrainedModel

from vitshrink.compression.quantization import quantized
from vitshrink.errors import CheckpointError
from vitshrink.methods import attention_methods, find_method
from vitshrink.models.checkpoint import replace_layers
from vitshrink.models.maps import approximate_maps, landmarks_of
from vitshrink.models.merged import merge_tokens
from vitshrink.models.pivoting import fix_gauge
from vitshrink.models.resolution import mix_tokens
from vitshrink.models.structures import describe, read, structure, structure_of
from vitshrink.models.structures.landmarks import FORMS
from vitshrink.models.structures.low_rank import LayerSpec
from vitshrink.models.structures.tokens import MixedTokens
from vitshrink.models.targets import find_targets


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
    with pytest.raises(CheckpointError, match=r"structure 'new', but this version knows .*low-rank"):
        read({"structure": "new"})
    with pytest.raises(ValueError, match="two structures are called 'low-rank'"):
        structure("low-rank")(LayerSpec)


def smaller(kind: str) -> tuple[PreTrainedModel, str]:
    """A tiny model with structures of this kind, and its architecture."""
    if kind in attention_methods():
        name = "BertForSequenceClassification" if kind == "cholesky" else "ViTForImageClassification"
        options = {"blocks": 2} if find_method(kind).stacked else {}  # type: ignore[union-attr]
        return at_rank(tiny.build(name), name, kind, 4, options=options), name
    name = "BertForMaskedLM" if kind == "int8" else "ViTForImageClassification"
    model = tiny.build(name)
    if kind == "low-rank":
        targets = find_targets(model)
        replace_layers(model, {each.name: tiny.low_rank(model.get_submodule(each.name), 4) for each in targets})
        fix_gauge(model, targets)
    elif kind in FORMS:
        approximate_maps(model, landmarks_of(model, 4, kind))
    elif kind == "mixed tokens":
        mix_tokens(model, MixedTokens(10))
    elif kind == "merged tokens":
        merge_tokens(model, (14, 12))
    else:
        model = quantized(model, int(kind.removeprefix("int")), "dynamic" if kind == "int8" else "none")
    return model, name


@pytest.mark.slow
def test_models_are_pickled_saved_whole_and_copied(tmp_path: Path) -> None:
    """And read again by a process that imports torch alone."""
    kinds = [*attention_methods(), "low-rank", *FORMS, "mixed tokens", "merged tokens", "int8", "int4"]
    for number, kind in enumerate(kinds):
        model, name = smaller(kind)
        with torch.no_grad():
            inputs = tiny.inputs(name)
            wanted = model(**inputs)[0]
            for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
                assert torch.equal(other(**inputs)[0], wanted), kind
                assert type(other) is type(model)
                assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
                assert not {id(each) for each in other.parameters()} & {id(each) for each in model.parameters()}
        torch.save((model, inputs, wanted), tmp_path / f"{number}.pt")
    program = """
import sys, torch
torch.set_num_threads(1)
for path in sys.argv[1:]:
    model, inputs, wanted = torch.load(path, weights_only=False)
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], wanted), path
print("read")
"""
    files = [str(path) for path in tmp_path.iterdir()]
    done = subprocess.run([sys.executable, "-c", program, *files], capture_output=True, text=True, check=False)
    assert done.stdout == "read\n", done.stderr
