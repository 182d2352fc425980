"""Which layers may be factorized, and loading dense checkpoints strictly."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vitshrink.errors import CheckpointError, UsageError
from vitshrink.models import checkpoint as checkpoints
from vitshrink.models import loading as models
from vitshrink.models.families import family_of
from vitshrink.models.targets import blocks_of, find_targets
from vitshrink.models.tasks import task_of
from vitshrink.models.views import rounded, view_of

each_architecture = pytest.mark.parametrize("name", tiny.ARCHITECTURES)
TASKS = {
    "ViTForImageClassification": "image-classification",
    "DeiTForImageClassification": "image-classification",
    "DeiTForImageClassificationWithTeacher": "image-classification",
    "BertForSequenceClassification": "text-classification",
    "BertForTokenClassification": "token-classification",
    "BertForMaskedLM": "masked-lm",
}


@pytest.fixture
def copied(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint directory of its own, to be changed."""
    return lambda name: shutil.copytree(checkpoint(name), tmp_path / name)


def edit_config(directory: Path, **entries: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def logits(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(**tiny.inputs(name))[0]
    return output


@each_architecture
def test_targets_are_the_linear_layers_of_the_blocks(name: str) -> None:
    model = tiny.build(name)
    targets = find_targets(model)
    blocks = blocks_of(model)
    linear = {id(module) for module in blocks.modules() if isinstance(module, nn.Linear)}
    assert {id(model.get_submodule(target.name)) for target in targets} == linear
    for target in targets:
        module = model.get_submodule(target.name)
        assert target.shape == tuple(module.weight.shape)
        assert id(module) in {id(inner) for inner in blocks[target.block].modules()}
    assert [target.role for target in targets[:6]] == ["query", "key", "value", "output", "fc1", "fc2"]
    assert [target.block for target in targets] == [0] * 6 + [1] * 6
    assert task_of(model) == TASKS.get(name, "features")
    assert family_of(model).modality == ("text" if name in tiny.TEXT_MODELS else "image")


@each_architecture
def test_layers_of_one_input_group_read_the_same_tensor(name: str) -> None:
    model = tiny.build(name)
    read: dict[str, list[torch.Tensor]] = {}
    for target in find_targets(model):
        model.get_submodule(target.name).register_forward_pre_hook(
            lambda _, inputs, group=target.input_group: read.setdefault(group, []).append(inputs[0].clone())
        )
    logits(model, name)
    assert sorted(len(tensors) for tensors in read.values()) == [1] * 6 + [3] * 2
    for group in read.values():
        assert all(torch.equal(group[0], tensor) for tensor in group)
    firsts = [group[0] for group in read.values()]
    assert not any(
        a.shape == b.shape and torch.equal(a, b) for index, a in enumerate(firsts) for b in firsts[index + 1 :]
    )


def test_layers_and_expressions_select_targets() -> None:
    model = tiny.build("ViTForImageClassification")

    def names(**options: Any) -> set[str]:
        return {target.name for target in find_targets(model, **options)}

    assert names(layers="attention") | names(layers="mlp") == names()
    assert names(layers="mlp") == {f"vit.layers.{block}.mlp.{fc}" for block in (0, 1) for fc in ("fc1", "fc2")}
    assert names(include=[r"layers\.0\.", "fc1"]) == {name for name in names() if ".0." in name or "fc1" in name}
    assert names(exclude=["q_proj$", "k_proj$"]) == {name for name in names() if "q_proj" not in name} - {
        "vit.layers.0.attention.k_proj",
        "vit.layers.1.attention.k_proj",
    }
    assert names(include=["fc"], exclude=["fc2"]) == {"vit.layers.0.mlp.fc1", "vit.layers.1.mlp.fc1"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ["nothing_like_it"]}, r"include: 'nothing_like_it' matches none of the 12 layers.*q_proj"),
        ({"exclude": ["classifier"]}, r"exclude: 'classifier' matches none"),
        ({"include": ["fc1("]}, r"include: 'fc1\(' is not a valid regular expression"),
        ({"exclude": ["."]}, "no layer is left"),
    ],
)
def test_expressions_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_targets(tiny.build("ViTModel"), **options)


def test_compressed_layers_are_no_targets() -> None:
    model = tiny.build("BertModel")
    targets = find_targets(model)
    checkpoints.replace_layers(model, {targets[0].name: tiny.low_rank(model.get_submodule(targets[0].name), 4)})
    assert find_targets(model) == targets[1:]
    checkpoints.replace_layers(model, {t.name: tiny.low_rank(model.get_submodule(t.name), 4) for t in targets[1:]})
    with pytest.raises(UsageError, match="already compressed"):
        find_targets(model)


@each_architecture
def test_a_checkpoint_loads_exactly(name: str, checkpoint: Callable[[str], Path]) -> None:
    loaded = models.load_dense(checkpoint(name))
    assert type(loaded.model).__name__ == name
    assert not loaded.model.training
    assert loaded.source_dtype == torch.float32
    assert loaded.directory == checkpoint(name)
    assert loaded.ignored == ()
    assert torch.equal(logits(loaded.model, name), logits(tiny.build(name), name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_float_type_are_computed_with_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    loaded = models.load_dense(tiny.write("ViTModel", tmp_path, dtype=dtype))
    assert loaded.source_dtype == dtype
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


def test_loading_writes_nothing_to_the_terminal(
    copied: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    directory = copied("BertForMaskedLM")
    edit_weights(directory, lambda weights: weights | {"bert.pooler.dense.bias": torch.ones(32)})
    models.load_dense(directory)
    assert capfd.readouterr() == ("", "")


def test_a_loaded_model_does_not_depend_on_its_file(copied: Callable[[str], Path]) -> None:
    directory = copied("ViTModel")
    model = models.load_dense(directory).model
    weights = directory / "model.safetensors"
    with weights.open("r+b") as file:  # in place: a mapped file would change under the model
        file.write(bytes(weights.stat().st_size))
    assert torch.equal(logits(model, "ViTModel"), logits(tiny.build("ViTModel"), "ViTModel"))


def test_an_untrained_head_is_refused(copied: Callable[[str], Path]) -> None:
    directory = copied("BertForMaskedLM")
    edit_config(directory, architectures=["BertForSequenceClassification"])
    with pytest.raises(CheckpointError, match=r"no weights for .*classifier\.bias, classifier\.weight.*another class"):
        models.load_dense(directory)


def test_a_head_of_another_size_is_refused(copied: Callable[[str], Path]) -> None:
    directory = copied("ViTForImageClassification")
    labels = [str(index) for index in range(7)]
    edit_config(directory, id2label=dict(enumerate(labels)), label2id={name: int(name) for name in labels})
    with pytest.raises(CheckpointError, match=r"classifier\.weight \(\[4, 32\] instead of \[7, 32\]\)"):
        models.load_dense(directory)


def test_a_missing_block_weight_is_refused(copied: Callable[[str], Path]) -> None:
    directory = copied("DeiTModel")
    name = "encoder.layer.1.output.dense.bias"
    edit_weights(directory, lambda weights: {key: value for key, value in weights.items() if key != name})
    with pytest.raises(CheckpointError, match=r"no weights for layers\.1\.mlp\.fc2\.bias"):
        models.load_dense(directory)


def test_left_over_weights_are_reported_outside_the_blocks_and_refused_within(copied: Callable[[str], Path]) -> None:
    directory = copied("BertForMaskedLM")
    pretraining = {
        "bert.pooler.dense.weight": torch.ones(32, 32),
        "cls.seq_relationship.weight": torch.ones(2, 32),
        "bert.embeddings.position_ids": torch.arange(64)[None],
    }
    edit_weights(directory, lambda weights: weights | pretraining)
    assert models.load_dense(directory).ignored == ("bert.pooler.dense.weight", "cls.seq_relationship.weight")
    adapter = {"bert.encoder.layer.0.attention.self.query.lora_A": torch.ones(4, 32)}
    edit_weights(directory, lambda weights: weights | adapter)
    with pytest.raises(CheckpointError, match=r"does not use: bert\.encoder\.layer\.0\.attention\.self\.query\.lora_A"):
        models.load_dense(directory)


@pytest.mark.parametrize("name", ["ViTModel", "DeiTModel", "BertModel"])
def test_a_base_model_saved_without_its_pooler_gets_none(name: str, copied: Callable[[str], Path]) -> None:
    directory = copied(name)
    edit_weights(directory, lambda weights: {key: value for key, value in weights.items() if "pooler" not in key})
    model = models.load_dense(directory).model
    assert model.pooler is None
    assert torch.equal(logits(model, name), logits(tiny.build(name), name))


def test_the_oldest_names_of_bert_are_understood(copied: Callable[[str], Path]) -> None:
    directory = copied("BertForMaskedLM")
    rename = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def old_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for new, old in rename.items():
            weights = {key.replace(new, old): value for key, value in weights.items()}
        return weights

    edit_weights(directory, old_names)
    model = models.load_dense(directory).model
    assert torch.equal(logits(model, "BertForMaskedLM"), logits(tiny.build("BertForMaskedLM"), "BertForMaskedLM"))


@pytest.mark.parametrize(
    ("before", "removed"),
    [
        ("module.{}", "'module.'"),
        ("_orig_mod.{}", "'_orig_mod.'"),
        ("model.{}", "'model.'"),
        ("base_model.model.{}", "'base_model.model.'"),
        ("module._orig_mod.model.{}", "'module.', '_orig_mod.', 'model.'"),
    ],
)
@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertForMaskedLM", "BertModel"])
def test_the_names_of_wrappers_are_taken_off(
    name: str, before: str, removed: str, copied: Callable[[str], Path]
) -> None:
    directory = copied(name)
    edit_weights(directory, lambda weights: {before.format(key): value for key, value in weights.items()})
    notes: list[str] = []
    loaded = models.load_dense(directory, warn=notes.append)
    assert torch.equal(logits(loaded.model, name), logits(tiny.build(name), name))
    assert loaded.model.config.name_or_path == str(directory)
    assert removed in notes[0]
    assert len(notes) == 1


def test_a_part_that_was_compiled_alone_is_no_other_model(copied: Callable[[str], Path]) -> None:
    directory, name = copied("BertModel"), "BertModel"
    edit_weights(directory, lambda weights: {key.replace("er.0.", "er.0._orig_mod."): weights[key] for key in weights})
    assert torch.equal(logits(models.load_dense(directory).model, name), logits(tiny.build(name), name))


@pytest.mark.parametrize("change", ["doubled", "missing", "around all"])
def test_the_base_models_own_prefix_may_be_there_or_not(change: str, copied: Callable[[str], Path]) -> None:
    """transformers sees to it: this is a promise of the documentation, held here."""
    name, directory = "BertForSequenceClassification", copied("BertForSequenceClassification")
    names = {
        "doubled": lambda key: f"bert.{key}" if key.startswith("bert.") else key,
        "missing": lambda key: key.removeprefix("bert."),
        "around all": lambda key: f"bert.{key}",
    }
    edit_weights(directory, lambda weights: {names[change](key): value for key, value in weights.items()})
    assert torch.equal(logits(models.load_dense(directory).model, name), logits(tiny.build(name), name))


def test_a_prefix_that_some_tensors_lack_is_left_and_named(copied: Callable[[str], Path]) -> None:
    directory = copied("BertModel")
    edit_weights(
        directory,
        lambda weights: {(f"module.{key}" if ".0." in key else key): value for key, value in weights.items()},
    )
    with pytest.raises(CheckpointError, match=r"only some .* prefix of a wrapper \(module\.encoder\.layer\.0"):
        models.load_dense(directory)


def test_tensors_with_and_without_a_prefix_are_two_models(copied: Callable[[str], Path]) -> None:
    directory = copied("BertModel")
    edit_weights(directory, lambda weights: weights | {f"_orig_mod.{key}": weights[key].clone() for key in weights})
    with pytest.raises(CheckpointError, match=r"some tensors twice, with and without _orig_mod\."):
        models.load_dense(directory)


def test_tied_weights_stay_tied(checkpoint: Callable[[str], Path]) -> None:
    model = models.load_dense(checkpoint("BertForMaskedLM")).model
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"architectures": ["ViTForMaskedImageModeling"]},
            "ViTForMaskedImageModeling.*Supported are ViTForImageClass.*, ViTModel",
        ),
        ({"architectures": ["BertModel"]}, r"BertModel \(model type 'vit'\) is not supported"),
        ({"architectures": None}, "names no architecture"),
        ({"architectures": "ViTModel"}, "names no architecture"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM.*not supported"),
        ({"model_type": "no_such_type"}, "model type 'no_such_type'"),
        ({"hidden_size": 33}, r"shapes do not fit its config: classifier.weight \(\[4, 32\] instead of \[4, 33\]\)"),
        ({"hidden_size": "wide"}, "cannot build"),
        ({"num_hidden_layers": 1}, "does not use: .*layers?.1"),
        ({"num_hidden_layers": 3}, "no weights for .*layers.2"),
        ({"num_hidden_layers": 10**9}, "describes 1000000000 blocks"),
    ],
)
def test_unsupported_and_contradictory_configs(
    entries: dict[str, Any], message: str, copied: Callable[[str], Path]
) -> None:
    directory = copied("ViTForImageClassification")
    edit_config(directory, **entries)
    with pytest.raises(CheckpointError, match=message) as caught:
        models.load_dense(directory)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize(("value", "count"), [(float("nan"), 3), (float("inf"), 1), (float("-inf"), 2)])
def test_weights_that_are_not_finite_are_named_and_counted(
    value: float, count: int, copied: Callable[[str], Path]
) -> None:
    directory = copied("ViTForImageClassification")

    def damage(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights["vit.encoder.layer.1.output.dense.weight"].view(-1)[:count] = value
        return weights

    edit_weights(directory, damage)
    with pytest.raises(CheckpointError, match=rf"vit\.layers\.1\.mlp\.fc2\.weight has {count} of 2048 values"):
        models.load_dense(directory)


def test_double_weights_too_large_for_float32_are_refused(tmp_path: Path) -> None:
    directory = tiny.write("ViTModel", tmp_path, dtype=torch.float64)

    def enlarge(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights["layernorm.bias"][0] = 1e300
        return weights

    edit_weights(directory, enlarge)
    with pytest.raises(CheckpointError, match=r"layernorm\.bias has 1 of 32 values"):
        models.load_dense(directory)


def test_a_quantized_checkpoint_is_refused(copied: Callable[[str], Path]) -> None:
    directory = copied("ViTModel")
    edit_config(directory, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match=r"already quantized \('gptq'\)"):
        models.load_dense(directory)


def test_a_kernel_named_by_the_config_is_not_fetched(copied: Callable[[str], Path]) -> None:
    directory = copied("ViTModel")
    edit_config(directory, attn_implementation="somebody/kernel")
    model = models.load_dense(directory).model
    assert model.config._attn_implementation == "sdpa"


def test_the_state_of_the_random_generator_is_left_alone(checkpoint: Callable[[str], Path]) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    models.load_dense(checkpoint("ViTModel"))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "dtype", "count"),
    [
        ("deit-tiny", torch.float32, 72),
        ("deit-tiny-imagenette", torch.float16, 72),
        ("minilm-sst2", torch.float16, 36),
    ],
)
def test_real_checkpoints_load(name: str, dtype: torch.dtype, count: int, real_folder: Path) -> None:
    loaded = models.load_dense(real_folder / name)
    assert loaded.source_dtype == dtype
    assert loaded.ignored == ()
    assert len(find_targets(loaded.model)) == count


def test_a_model_that_is_rounded_to_a_type_computes_in_its_own() -> None:
    model = tiny.build("ViTModel")
    found = rounded(view_of(model), torch.float16)
    assert found.dtype == model.dtype == torch.float32
    for one, other in zip(found.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other.half().float())
