"""Compressed checkpoints reload exactly, through transformers and through the strict loader, or not at all."""

import copy
import importlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import vitshrink
from vitshrink.errors import CheckpointError, NumericsError, OutputError
from vitshrink.models import checkpoint as checkpoints
from vitshrink.models import hf_quantizer
from vitshrink.models import loading as models
from vitshrink.models.loading import LoadedModel
from vitshrink.models.source import examine
from vitshrink.models.targets import find_targets

each_architecture = pytest.mark.parametrize("name", tiny.ARCHITECTURES)
each_type = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
AUTO_CLASSES = {
    "ViTForImageClassification": "AutoModelForImageClassification",
    "DeiTForImageClassification": "AutoModelForImageClassification",
    "BertForSequenceClassification": "AutoModelForSequenceClassification",
    "BertForMaskedLM": "AutoModelForMaskedLM",
    "ViTModel": "AutoModel",
    "DeiTModel": "AutoModel",
    "BertModel": "AutoModel",
}


def compress(directory: Path, rank: int = 6) -> LoadedModel:
    """The tiny checkpoint with every second block layer at a rank of its own."""
    loaded = models.load_dense(directory)
    targets = find_targets(loaded.model)[::2]
    layers = {
        target.name: tiny.low_rank(loaded.model.get_submodule(target.name), rank + index)
        for index, target in enumerate(targets)
    }
    checkpoints.replace_layers(loaded.model, layers)
    return loaded


def logits(model: nn.Module, name: str) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tiny.inputs(name).items()}
    with torch.no_grad():
        output: torch.Tensor = model.eval()(**inputs)[0]
    return output


@pytest.fixture
def written(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., tuple[LoadedModel, Path]]:
    """``written(name, dtype)``: a compressed model and the directory it was saved to."""

    def write(name: str, dtype: torch.dtype | None = None) -> tuple[LoadedModel, Path]:
        loaded = compress(checkpoint(name))
        checkpoints.save(loaded.model, tmp_path / "out", source=loaded, dtype=dtype)
        return loaded, tmp_path / "out"

    return write


@each_architecture
def test_the_replaced_layers_are_the_models_layers(name: str) -> None:
    model = tiny.build(name)
    target = find_targets(model)[3]
    layer = tiny.low_rank(model.get_submodule(target.name), 5)
    checkpoints.replace_layers(model, {target.name: layer})
    assert checkpoints.compressed_layers(model) == {target.name: layer}
    with pytest.raises(AttributeError):
        checkpoints.replace_layers(model, {"no.such.layer": layer})


@each_architecture
def test_a_saved_model_reloads_exactly_and_saves_again(
    name: str, written: Callable[..., tuple[LoadedModel, Path]], tmp_path: Path
) -> None:
    loaded, directory = written(name)
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) < sum(
        parameter.numel() for parameter in tiny.build(name).parameters()
    )
    expected = logits(loaded.model, name)
    checkpoints.verify(directory, loaded.model, tiny.inputs(name))

    strict = checkpoints.load(directory)
    assert type(strict) is type(loaded.model)
    assert not strict.training
    assert torch.equal(logits(strict, name), expected)
    assert {key: layer.spec for key, layer in checkpoints.compressed_layers(strict).items()} == {
        key: layer.spec for key, layer in checkpoints.compressed_layers(loaded.model).items()
    }

    stock = getattr(transformers, name).from_pretrained(directory)
    torch.testing.assert_close(logits(stock, name), expected)
    stock.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(checkpoints.load(tmp_path / "again"), name), expected)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()


@each_type
@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_the_auto_classes_load_it_in_its_own_type(
    name: str, dtype: torch.dtype, written: Callable[..., tuple[LoadedModel, Path]]
) -> None:
    loaded, directory = written(name, dtype)
    checkpoints.verify(directory, loaded.model, tiny.inputs(name))
    model = getattr(transformers, AUTO_CLASSES[name]).from_pretrained(directory)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    torch.testing.assert_close(logits(model, name), logits(copy.deepcopy(loaded.model).to(dtype), name))


@pytest.mark.parametrize(
    ("name", "auto"), [(name, "AutoModel") for name in (*tiny.IMAGE_CLASSIFIERS, "BertForMaskedLM")]
)
def test_a_classifier_opens_without_its_head(
    name: str, auto: str, written: Callable[..., tuple[LoadedModel, Path]]
) -> None:
    loaded, directory = written(name)
    headless = getattr(transformers, auto).from_pretrained(directory, add_pooling_layer=False)
    torch.testing.assert_close(logits(headless, name), logits(loaded.model.base_model, name))


def test_a_base_model_opens_below_a_head(written: Callable[..., tuple[LoadedModel, Path]]) -> None:
    loaded, directory = written("BertModel")
    classifier = transformers.BertForSequenceClassification.from_pretrained(directory)
    torch.testing.assert_close(logits(classifier.bert, "BertModel"), logits(loaded.model, "BertModel"))


@pytest.mark.parametrize("name", ["ViTForImageClassification", "DeiTForImageClassification", "BertForMaskedLM"])
def test_tensors_keep_the_names_of_the_source(name: str, written: Callable[..., tuple[LoadedModel, Path]]) -> None:
    loaded, directory = written(name)
    before = set(load_file(loaded.directory / "model.safetensors"))
    after = set(load_file(directory / "model.safetensors"))
    assert before <= after
    assert {key for key in after - before if not key.endswith(".down")} == set()
    if name == "ViTForImageClassification":
        assert "vit.encoder.layer.0.attention.attention.query.down" in after


def test_a_source_with_the_new_names_keeps_them(tmp_path: Path) -> None:
    tiny.build("ViTForImageClassification").save_pretrained(tmp_path / "in", save_original_format=False)
    loaded = compress(tmp_path / "in")
    checkpoints.save(loaded.model, tmp_path / "out", source=loaded)
    assert "vit.layers.0.attention.q_proj.down" in load_file(tmp_path / "out" / "model.safetensors")
    checkpoints.verify(tmp_path / "out", loaded.model, tiny.inputs("ViTForImageClassification"))


def test_tied_weights_are_stored_once(written: Callable[..., tuple[LoadedModel, Path]]) -> None:
    _, directory = written("BertForMaskedLM")
    assert "cls.predictions.decoder.weight" not in load_file(directory / "model.safetensors")
    model = checkpoints.load(directory)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertForSequenceClassification"])
def test_processor_and_tokenizer_come_along(name: str, written: Callable[..., tuple[LoadedModel, Path]]) -> None:
    loaded, directory = written(name)
    assert loaded.companions.files
    for companion in loaded.companions.files:
        assert (directory / companion).read_bytes() == (loaded.directory / companion).read_bytes()
    assert {file.name for file in directory.iterdir()} == {
        "config.json",
        "model.safetensors",
        *map(str, loaded.companions.files),
    }


def test_pipelines_open_it(written: Callable[..., tuple[LoadedModel, Path]], flat_images: Path) -> None:
    loaded, directory = written("ViTForImageClassification")
    answer = transformers.pipeline("image-classification", str(directory))(str(flat_images / "000.png"))
    reference = transformers.pipeline(
        "image-classification",
        model=loaded.model,
        image_processor=transformers.AutoImageProcessor.from_pretrained(directory),
    )(str(flat_images / "000.png"))
    scores = {row["label"]: row["score"] for row in reference}
    assert {row["label"]: row["score"] for row in answer} == pytest.approx(scores, rel=1e-5)
    assert {row["label"] for row in answer} == set(tiny.IMAGE_CLASSES)


def test_a_loaded_model_casts_copies_and_trains(
    written: Callable[..., tuple[LoadedModel, Path]], tmp_path: Path
) -> None:
    _, directory = written("BertForSequenceClassification")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory)
    assert model.half().float().to(torch.bfloat16).float() is model
    copy.deepcopy(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    row = {key: value[0] for key, value in tiny.inputs("BertForSequenceClassification").items()}
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            tmp_path / "trainer", max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
        ),
        train_dataset=[{**row, "labels": label % 2} for label in range(8)],
    )
    trainer.train()
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    trainer.save_model(str(tmp_path / "trained"))
    reloaded = checkpoints.load(tmp_path / "trained").state_dict()
    assert all(torch.equal(tensor, reloaded[name]) for name, tensor in model.state_dict().items())


def test_a_compressed_model_saved_by_transformers_itself_reloads(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    loaded = compress(checkpoint("DeiTModel"))
    loaded.model.save_pretrained(tmp_path)
    assert torch.equal(logits(checkpoints.load(tmp_path), "DeiTModel"), logits(loaded.model, "DeiTModel"))


def test_a_model_exports(written: Callable[..., tuple[LoadedModel, Path]]) -> None:
    _, directory = written("ViTForImageClassification")
    model = checkpoints.load(directory)
    inputs = tiny.inputs("ViTForImageClassification")
    exported = torch.export.export(model, (), kwargs=inputs)
    torch.testing.assert_close(exported.module()(**inputs)[0], model(**inputs)[0])


def test_the_same_model_gives_the_same_bytes(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("first", "second"):
        loaded = compress(checkpoint("BertForMaskedLM"))
        checkpoints.save(loaded.model, tmp_path / name, source=loaded, metadata={"keep": 0.5})
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()


def test_saving_changes_neither_model_nor_source(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoint("ViTModel"), tmp_path / "in")
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    loaded = compress(directory)
    expected = logits(loaded.model, "ViTModel")
    checkpoints.save(loaded.model, tmp_path / "out", source=loaded, dtype=torch.float16)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert torch.equal(logits(loaded.model, "ViTModel"), expected)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_saved_in_the_type_of_the_source(dtype: torch.dtype, tmp_path: Path) -> None:
    loaded = compress(tiny.write("ViTModel", tmp_path / "in", dtype=dtype))
    checkpoints.save(loaded.model, tmp_path / "out", source=loaded)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    checkpoints.verify(tmp_path / "out", loaded.model, tiny.inputs("ViTModel"))


def test_metadata_extra_files_and_no_paths(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    loaded = compress(checkpoint("ViTModel"))
    extra = {"report.json": '{"ä": 1}', "figures/plot.png": b"\x89PNG"}
    checkpoints.save(loaded.model, tmp_path / "out", source=loaded, metadata={"keep": 0.5}, extra_files=extra)
    assert (tmp_path / "out" / "report.json").read_text(encoding="utf-8") == '{"ä": 1}'
    assert (tmp_path / "out" / "figures" / "plot.png").read_bytes() == b"\x89PNG"
    text = (tmp_path / "out" / "config.json").read_text()
    assert json.loads(text)["quantization_config"]["metadata"] == {"keep": 0.5}
    assert str(loaded.directory) not in text
    again = models.load_dense(tmp_path / "out", allow_compressed=True)
    checkpoints.save(again.model, tmp_path / "again", source=again)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["metadata"] == {
        "keep": 0.5
    }


def test_a_dense_model_is_saved_as_a_plain_checkpoint(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    loaded = models.load_dense(checkpoint("ViTModel"))
    checkpoints.save(loaded.model, tmp_path / "out", source=loaded)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    checkpoints.verify(tmp_path / "out", loaded.model, tiny.inputs("ViTModel"))


def test_a_value_that_does_not_fit_the_type_is_named(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    loaded = compress(checkpoint("ViTModel"))
    with torch.no_grad():
        loaded.model.layers[0].mlp.fc1.down[0, 0] = 1e5
    with pytest.raises(NumericsError, match=r"layers\.0\.mlp\.fc1\.down cannot be saved as float16.*1e\+05.*bfloat16"):
        checkpoints.save(loaded.model, tmp_path / "out", source=loaded, dtype=torch.float16)
    with torch.no_grad():
        loaded.model.layers[0].mlp.fc1.down[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"layers\.0\.mlp\.fc1\.down has values that are NaN"):
        checkpoints.save(loaded.model, tmp_path / "out", source=loaded)


def test_a_full_rank_layer_is_not_stored_as_factors(checkpoint: Callable[[str], Path]) -> None:
    model = models.load_dense(checkpoint("ViTModel")).model
    name = "layers.0.attention.q_proj"
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.q_proj has rank 32, which is its full rank"):
        checkpoints.replace_layers(model, {name: tiny.low_rank(model.get_submodule(name), 32)})


def test_a_layer_outside_the_base_model_is_refused(checkpoint: Callable[[str], Path]) -> None:
    model = models.load_dense(checkpoint("BertForMaskedLM")).model
    name = "cls.predictions.transform.dense"
    with pytest.raises(CheckpointError, match="outside the base model"):
        checkpoints.replace_layers(model, {name: tiny.low_rank(model.get_submodule(name), 4)})


@pytest.mark.slow
def test_without_vitshrink_loading_fails_instead_of_giving_random_layers(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    names = ["ViTForImageClassification", "DeiTModel", "BertForMaskedLM"]
    for name in names:
        loaded = compress(checkpoint(name))
        checkpoints.save(loaded.model, tmp_path / name, source=loaded)
    program = textwrap.dedent(
        """
        import sys
        import transformers

        def attempt(path):
            try:
                getattr(transformers, path.rpartition("/")[2]).from_pretrained(path)
            except RuntimeError as error:
                print("size mismatch" if "mismatch" in str(error) else error)
            else:
                print("loaded")

        for path in sys.argv[1:]: attempt(path)
        import vitshrink
        for path in sys.argv[1:]: attempt(path)
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *(str(tmp_path / name) for name in names)],
        env={**os.environ, "PYTHONPATH": str(Path(vitshrink.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert result.stdout.splitlines() == ["size mismatch"] * 3 + ["loaded"] * 3


def test_registration_can_be_repeated(written: Callable[..., tuple[LoadedModel, Path]]) -> None:
    _, directory = written("ViTModel")
    importlib.reload(hf_quantizer)
    checkpoints.load(directory)
    transformers.AutoModel.from_pretrained(directory).save_pretrained(directory.parent / "again")
    checkpoints.load(directory.parent / "again")


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


QUERY = "layers.0.attention.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.update(format_version=2), r"format 2, but this is vitshrink .* up to 1\. Upgrade"),
        (lambda plan: plan.update(format_version="new"), "format 'new'"),
        (lambda plan: plan.update(novelty=3), r"unknown entries: \['novelty'\]"),
        (lambda plan: plan.update(layers=None), "lists no layers"),
        (lambda plan: plan.pop("layers"), "lists no layers"),
        (lambda plan: plan["layers"].update({QUERY: {"rank": 0}}), "rank 0"),
        (lambda plan: plan["layers"].update({QUERY: {"structure": "new", "rank": 4}}), "a structure 'new'.* Upgrade"),
        (lambda plan: plan["layers"].update({QUERY: {"rank": "4"}}), "cannot read the layer description"),
        (lambda plan: plan["layers"].update({QUERY: {"rank": 4, "new": 1}}), "cannot read the layer description"),
        (
            lambda plan: plan.update(
                transformers_version="4.40.0",
                layers=plan["layers"] | {"encoder.layer.0.attention.attention.query": {"rank": 4}},
            ),
            r"'encoder.layer.0.attention.attention.query'; ViTModel has no such module.*transformers 4\.40.*install",
        ),
        (lambda plan: plan["layers"].update({"layernorm": {"rank": 4}}), "'layernorm'; ViTModel has a LayerNorm there"),
        (
            lambda plan: plan["layers"].update({"layers.9.mlp.fc1": {"rank": 4}}),
            "no such module.*has 2 blocks, and this module is in block 9, counted from 0. If blocks were removed",
        ),
        (lambda plan: plan["layers"].update({QUERY: {"rank": 5}}), r"shapes do not fit.*q_proj\.down"),
        (lambda plan: plan["layers"].pop(QUERY), r"shapes do not fit.*q_proj\.weight.*does not use: .*q_proj\.down"),
        (
            lambda plan: plan["layers"].update({"layers.0.attention.k_proj": {"rank": 5}}),
            r"no weights for .*k_proj\.down",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_an_error(
    change: Callable[[dict[str, Any]], object], message: str, written: Callable[..., tuple[LoadedModel, Path]]
) -> None:
    _, directory = written("ViTModel")
    edit(directory, change)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(directory)


def test_stock_transformers_meet_the_same_refusal(written: Callable[..., tuple[LoadedModel, Path]]) -> None:
    _, directory = written("ViTModel")
    edit(directory, lambda plan: plan.update(format_version=2))
    with pytest.raises(CheckpointError, match="Upgrade vitshrink"):
        transformers.AutoModel.from_pretrained(directory)


def test_a_missing_factor_is_an_error(written: Callable[..., tuple[LoadedModel, Path]]) -> None:
    _, directory = written("BertModel")
    weights = load_file(directory / "model.safetensors")
    del weights["encoder.layer.0.attention.self.query.down"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no weights for encoder\.layer\.0\.attention\.self\.query\.down"):
        checkpoints.load(directory)
    weights["encoder.layer.0.attention.self.query.down"] = torch.full((6, 32), float("nan"))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"query\.down has 192 of 192 values that are NaN"):
        checkpoints.load(directory)
    weights["encoder.layer.0.attention.self.query.down"] = torch.zeros(6, 32)
    save_file(weights | {"surplus": torch.zeros(1)}, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="does not use: surplus"):
        checkpoints.load(directory)


def test_a_compressed_model_is_not_compressed_again_by_accident(
    written: Callable[..., tuple[LoadedModel, Path]],
) -> None:
    loaded, directory = written("ViTModel")
    with pytest.raises(CheckpointError, match="compressed by vitshrink"):
        models.load_dense(directory)
    again = models.load_dense(directory, allow_compressed=True)
    assert torch.equal(logits(again.model, "ViTModel"), logits(loaded.model, "ViTModel"))


def test_types_and_devices_can_be_chosen(written: Callable[..., tuple[LoadedModel, Path]]) -> None:
    _, directory = written("ViTModel", torch.float16)
    assert checkpoints.load(directory).dtype == torch.float16
    assert checkpoints.load(directory, dtype=torch.float32).dtype == torch.float32
    assert checkpoints.load(directory, device="cpu").device == torch.device("cpu")


class TestVerify:
    def test_other_weights(self, written: Callable[..., tuple[LoadedModel, Path]]) -> None:
        loaded, directory = written("ViTModel")
        with torch.no_grad():
            loaded.model.layers[1].mlp.fc1.bias[0] += 1e-6
        with pytest.raises(OutputError, match=r"does not contain the weights in memory: layers\.1\.mlp\.fc1\.bias"):
            checkpoints.verify(directory, loaded.model, tiny.inputs("ViTModel"))

    def test_another_activation(self, written: Callable[..., tuple[LoadedModel, Path]]) -> None:
        loaded, directory = written("ViTModel")
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
        with pytest.raises(OutputError, match=r"outputs of the reloaded model differ by up to \d"):
            checkpoints.verify(directory, loaded.model, tiny.inputs("ViTModel"))

    def test_other_layers(self, written: Callable[..., tuple[LoadedModel, Path]]) -> None:
        loaded, directory = written("ViTModel")
        name = "layers.0.attention.k_proj"
        checkpoints.replace_layers(loaded.model, {name: tiny.low_rank(loaded.model.get_submodule(name), 4)})
        with pytest.raises(OutputError, match=r"k_proj\.down differ"):
            checkpoints.verify(directory, loaded.model, tiny.inputs("ViTModel"))

    def test_a_damaged_file(self, written: Callable[..., tuple[LoadedModel, Path]]) -> None:
        loaded, directory = written("ViTModel")
        weights = directory / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        with pytest.raises(OutputError, match="just written does not load"):
            checkpoints.verify(directory, loaded.model, tiny.inputs("ViTModel"))

    def test_a_weight_stored_twice(self, written: Callable[..., tuple[LoadedModel, Path]]) -> None:
        loaded, directory = written("BertForMaskedLM")
        weights = load_file(directory / "model.safetensors")
        weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"].clone()
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(OutputError, match="bytes of tensors"):
            checkpoints.verify(directory, loaded.model, tiny.inputs("BertForMaskedLM"))


def test_file_bytes_are_those_of_the_weights(written: Callable[..., tuple[LoadedModel, Path]]) -> None:
    loaded, directory = written("ViTModel")
    assert examine(directory).nbytes == (directory / "model.safetensors").stat().st_size
    assert examine(directory).nbytes < loaded.source.nbytes


@pytest.mark.real
@pytest.mark.parametrize("name", ["deit-tiny-imagenette", "minilm-sst2"])
def test_real_checkpoints_survive_the_round_trip(name: str, real_folder: Path, tmp_path: Path) -> None:
    loaded = models.load_dense(real_folder / name)
    targets = find_targets(loaded.model, include=[r"\.0\.attention"])
    layers = {target.name: tiny.low_rank(loaded.model.get_submodule(target.name), 64) for target in targets}
    checkpoints.replace_layers(loaded.model, layers)
    checkpoints.save(loaded.model, tmp_path, source=loaded)
    image = {"pixel_values": torch.randn(2, 3, 224, 224)}
    text = {"input_ids": torch.randint(1000, 2000, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    checkpoints.verify(tmp_path, loaded.model, image if loaded.family.modality == "image" else text)
    assert examine(tmp_path).nbytes < loaded.source.nbytes


def removed(model: Any, kept: list[int]) -> Any:
    """Only the blocks of these numbers, as one does it by hand."""
    base = model.base_model
    holder = base.encoder if hasattr(base, "encoder") else base
    name = "layer" if hasattr(holder, "layer") else "layers"
    setattr(holder, name, torch.nn.ModuleList([getattr(holder, name)[number] for number in kept]))
    model.config.num_hidden_layers = len(kept)
    return model


@pytest.mark.parametrize("kept", [[0], [1]])
@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertForSequenceClassification"])
@pytest.mark.parametrize("opened", ["by transformers", "in memory"])
def test_blocks_may_be_removed_after_compression(
    opened: str, kept: list[int], name: str, written: Callable[..., tuple[LoadedModel, Path]], tmp_path: Path
) -> None:
    loaded, directory = written(name)
    auto = getattr(transformers, AUTO_CLASSES[name])
    model = removed(auto.from_pretrained(directory) if opened == "by transformers" else loaded.model, kept).eval()
    if kept == [1] and name.startswith("ViT"):
        model.base_model.layers[0].mlp.fc1 = torch.nn.Linear(32, 64)  # a layer may be dense again as well
    model.save_pretrained(tmp_path / "again")
    for again in (auto.from_pretrained(tmp_path / "again"), checkpoints.load(tmp_path / "again")):
        assert len(again.config.quantization_config.layers) == len(checkpoints.compressed_layers(model))
        assert torch.equal(logits(again, name), logits(model, name))
