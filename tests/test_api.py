"""``vitshrink.compress`` on models in memory: what it takes, what it gives back, what it leaves alone."""

import contextlib
import copy
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import transformers
from PIL import Image
from test_architecture import FILES, OWN
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel

import vitshrink
from vitshrink.config.fields import names_of
from vitshrink.config.options import CompressConfig
from vitshrink.data.given import ReadyBatches
from vitshrink.errors import CheckpointError, DataError, OutputError, TargetError, UsageError
from vitshrink.jobs.compress import CompressionResult
from vitshrink.models import cost
from vitshrink.report import figures

FEW: dict[str, Any] = {"keep": 0.8, "samples": 12, "holdout": 4, "batch_size": 5}
Compressed = Callable[..., CompressionResult]


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "available", lambda: False)


@pytest.fixture
def vit(vit_directory: Path) -> PreTrainedModel:
    return transformers.AutoModelForImageClassification.from_pretrained(vit_directory)


@pytest.fixture
def bert(bert_directory: Path) -> PreTrainedModel:
    return transformers.AutoModelForSequenceClassification.from_pretrained(bert_directory)


@pytest.fixture
def images(flat_images: Path) -> Iterator[list[Image.Image]]:
    """Files that nobody has read yet."""
    with contextlib.ExitStack() as opened:
        yield [opened.enter_context(Image.open(file)) for file in sorted(flat_images.iterdir())]


@pytest.fixture
def texts(text_file: Path) -> list[str]:
    return text_file.read_text().splitlines()


def assert_untouched(model: PreTrainedModel, before: PreTrainedModel) -> None:
    assert model.config.to_dict() == before.config.to_dict()
    assert model.training == before.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for (name, parameter), other in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, other), name
        assert parameter.requires_grad == other.requires_grad
        assert parameter.grad is None


def test_a_list_of_images_makes_a_model_in_memory_smaller(vit: PreTrainedModel, images: list[Image.Image]) -> None:
    vit.train()
    before = copy.deepcopy(vit)
    result = vitshrink.compress(vit, images, **FEW)
    assert_untouched(vit, before)
    assert not result.model.training
    assert cost.parameters(result.model) <= 0.8 * cost.parameters(vit)
    assert result.report.parameters.compressed == cost.parameters(result.model)
    assert result.report.evaluation is not None
    assert result.report.evaluation.samples == 4
    assert result.report.command is None
    assert "of the parameters" in str(result)
    assert all(parameter.requires_grad for parameter in result.model.parameters()), "it can be trained"


def test_the_command_line_makes_the_same_model(
    vit: PreTrainedModel, images: list[Image.Image], compressed: Compressed
) -> None:
    result = vitshrink.compress(vit, images, keep=0.8, samples=16, holdout=8, batch_size=7)
    ours = vitshrink.load(compressed("ViTForImageClassification").directory or "")
    assert result.model.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in result.model.state_dict().items())


@pytest.mark.parametrize(
    "shape", ["loader of tensors", "loader of pairs", "list of features", "generator", "one batch"]
)
def test_batches_in_any_usual_form_do(vit: PreTrainedModel, images: list[Image.Image], shape: str) -> None:
    processor = AutoImageProcessor.from_pretrained(vit.config._name_or_path)
    pixels = processor([image.convert("RGB") for image in images[:16]], return_tensors="pt")["pixel_values"]
    calibration: Any = {
        "loader of tensors": DataLoader(pixels, batch_size=5),
        "loader of pairs": DataLoader(TensorDataset(pixels, torch.arange(16)), batch_size=5),
        "list of features": [{"pixel_values": part, "labels": torch.zeros(len(part))} for part in pixels.split(5)],
        "generator": (part for part in pixels.split(5)),
        "one batch": {"pixel_values": pixels},
    }[shape]
    result = vitshrink.compress(vit, calibration, **FEW)
    assert result.report.parameters.kept <= 0.8
    assert result.report.calibration is not None
    assert result.report.calibration.samples == 12
    assert result.report.evaluation is not None
    assert result.report.evaluation.samples == 4


def test_padding_in_batches_changes_nothing(bert: PreTrainedModel, texts: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert.config._name_or_path)
    short = [dict(tokenizer(texts[i : i + 4], padding=True, return_tensors="pt")) for i in range(0, 16, 4)]
    padded = [
        dict(tokenizer(texts[i : i + 4], padding="max_length", max_length=40, return_tensors="pt"))
        for i in range(0, 16, 4)
    ]
    results = [vitshrink.compress(bert, batches, method="whitened", **FEW) for batches in (short, padded)]
    ranks = [[layer.rank for layer in result.report.layers] for result in results]
    assert ranks[0] == ranks[1]
    fingerprints = [result.report.calibration.fingerprint for result in results]
    assert fingerprints[0] == fingerprints[1]
    inputs = tiny.inputs("BertForSequenceClassification")
    with torch.no_grad():
        logits = [result.model(**inputs).logits for result in results]
    assert torch.allclose(*logits, atol=1e-4)


def test_a_recipe_says_how_many_samples_where_the_caller_does_not(
    bert: PreTrainedModel, text_file: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"kind: text\npath: {text_file}\nsamples: 9\nseed: 4\n")
    found = vitshrink.compress(bert, recipe, keep=0.8, method="svd", compensation="bias", holdout=4)
    assert found.report.calibration is not None
    assert (found.report.calibration.samples, found.report.calibration.seed) == (9, 4)
    stated = vitshrink.compress(bert, recipe, method="svd", compensation="bias", **FEW)
    assert stated.report.calibration.samples == 12


def test_texts_pairs_and_folders_do(bert: PreTrainedModel, texts: list[str], text_file: Path) -> None:
    pairs = list(zip(texts, reversed(texts), strict=True))
    for calibration in (texts, pairs, text_file, str(text_file)):
        result = vitshrink.compress(bert, calibration, method="svd", compensation="bias", **FEW)
        assert result.report.calibration.samples == 12


def test_no_data_are_needed_for_what_needs_none(vit: PreTrainedModel) -> None:
    result = vitshrink.compress(vit, keep=0.7, method="svd", compensation="none")
    assert result.report.evaluation is None
    assert result.report.parameters.kept <= 0.7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_result_has_the_type_of_the_model(
    vit: PreTrainedModel, images: list[Image.Image], dtype: torch.dtype
) -> None:
    result = vitshrink.compress(vit.to(dtype), images, **FEW)
    assert {parameter.dtype for parameter in result.model.parameters()} == {dtype}
    assert result.report.bytes.dense == cost.memory_bytes(vit)


def test_what_is_saved_loads_with_stock_calls(vit: PreTrainedModel, images: list[Image.Image], tmp_path: Path) -> None:
    result = vitshrink.compress(vit, images, **FEW)
    directory = result.save(tmp_path / "small")
    again = transformers.AutoModelForImageClassification.from_pretrained(directory).eval()
    inputs = tiny.inputs("ViTForImageClassification")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, result.model(**inputs).logits)
    assert {"report.json", "README.md", "preprocessor_config.json"} <= {file.name for file in directory.iterdir()}
    (answer,) = transformers.pipeline("image-classification", str(directory), device="cpu")(images[0], top_k=1)
    pixels = result.processor(images[0].convert("RGB"), return_tensors="pt")
    with torch.no_grad():
        assert answer["label"] == vit.config.id2label[int(result.model(**pixels).logits.argmax())]
    with pytest.raises(OutputError, match="exists"):
        result.save(directory)
    result.save(directory, overwrite=True)


def test_a_processor_is_needed_where_none_can_be_found(images: list[Image.Image], vit_directory: Path) -> None:
    nameless = tiny.build("ViTForImageClassification")
    with pytest.raises(UsageError, match="pass its image processor"):
        vitshrink.compress(nameless, images, **FEW)
    processor = AutoImageProcessor.from_pretrained(vit_directory)
    assert vitshrink.compress(nameless, images, processor=processor, **FEW).report.parameters.kept <= 0.8
    with pytest.raises(UsageError, match="needs its image processor, not a str"):
        vitshrink.compress(nameless, images, processor="deit", **FEW)


def test_a_masked_lm_is_measured_where_the_tokenizer_is_known(masked_lm_directory: Path, texts: list[str]) -> None:
    model = transformers.AutoModelForMaskedLM.from_pretrained(masked_lm_directory)
    tokenizer = AutoTokenizer.from_pretrained(masked_lm_directory)
    batches = [dict(tokenizer(texts[:16], padding=True, return_tensors="pt"))]
    blind = vitshrink.compress(model, batches, **FEW)
    assert blind.report.evaluation is None
    assert any("tokenizer" in warning for warning in blind.report.warnings)
    assert vitshrink.compress(model, batches, processor=tokenizer, **FEW).report.evaluation is not None


@pytest.mark.parametrize(
    ("calibration", "choices", "error", "message"),
    [
        (None, {}, UsageError, "needs calibration data"),
        ([], {}, DataError, "there are no samples"),
        (7, {}, DataError, "a int holds no samples"),
        (["a text"], {}, DataError, "needs a PIL image"),
        ([torch.zeros(3, 32, 32)], {}, DataError, "do not fit together"),
        ([{"image": 1}], {}, DataError, "column 'image' contains .*, not images"),
        ([{"label": torch.zeros(4)}], {}, DataError, "no tensor 'pixel_values'"),
        (torch.zeros(4, 1, 32, 32), {}, DataError, "batch 0 .* images of 1 × 32 × 32 .* takes 3 × 32 × 32"),
        (torch.zeros(4, 3, 48, 48), {}, DataError, "batch 0 .* images of 3 × 48 × 48 .* own image processor"),
        (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), {}, DataError, "torch.uint8.* normalized"),
        (torch.zeros(4, 3, 32, 32) / 0, {}, DataError, "batch 0, row 0 .* NaN"),
        (np.zeros((4, 32, 32, 3)), {}, DataError, "array of float64.* pass images as uint8"),
        ([np.zeros((3, 32, 32), np.uint8)], {}, DataError, "item 0 .* not an image .* pass uint8"),
        ("no-such-folder/", {}, DataError, "no-such-folder"),
        ([torch.zeros(4, 3, 32, 32)], {"keep": 0.001}, TargetError, "cannot reach"),
        ([torch.zeros(4, 3, 32, 32)], {"keep": None}, UsageError, "choose a size with"),
        ([torch.zeros(4, 3, 32, 32)], {"keep": [0.5, 0.6]}, UsageError, "give one fraction"),
        ([torch.zeros(4, 3, 32, 32)], {"sample": 3}, UsageError, "Did you mean 'samples'"),
        ([torch.zeros(4, 3, 32, 32)], {"output": "there"}, UsageError, "has no argument 'output'"),
        ([torch.zeros(4, 3, 32, 32)], {"save_every": 5}, UsageError, "has no argument 'save_every'"),
    ],
)
def test_what_makes_no_sense_is_explained(
    vit: PreTrainedModel, calibration: Any, choices: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        vitshrink.compress(vit, calibration, **{**FEW, **choices})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": [[2, 6, 500, 3]]}, "batch 1, row 0 .* input_ids that are not below .* own tokenizer"),
        ({"input_ids": [[2, 6, -1, 3]]}, "batch 1, row 0 .* input_ids"),
        ({"input_ids": [[2.0, 6.0, 7.0, 3.0]]}, "batch 1 .* as torch.float32.* integers"),
        ({"token_type_ids": [[0, 2, 0, 0]]}, "batch 1, row 0 .* token_type_ids that are not below 2"),
        ({"attention_mask": [[0, 0, 0, 0]]}, "batch 1, row 0 .* no token that its attention_mask keeps"),
        ({"input_ids": [[5] * 65], "attention_mask": [[1] * 65]}, "batch 1 .* 65 tokens .* takes at most 64 integers"),
    ],
    ids=["beyond", "negative", "float", "types", "masked", "long"],
)
def test_tokens_that_the_model_cannot_take_are_named(
    bert: PreTrainedModel, changes: dict[str, Any], message: str
) -> None:
    good = {"input_ids": torch.tensor([[2, 6, 7, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    bad = good | {name: torch.tensor(rows) for name, rows in changes.items()}
    with pytest.raises(DataError, match=message):
        vitshrink.compress(bert, [good, bad], **FEW)


@pytest.mark.parametrize(
    "form",
    [
        *("data set", "rows", "frame", "generator", "labeled", "arrays", "array", "paths"),
        *("inference tensor", "inference mode", "inference model", "return_dict"),
    ],
)
def test_images_in_any_usual_form_do(
    vit: PreTrainedModel, images: list[Image.Image], vit_directory: Path, flat_images: Path, form: str
) -> None:
    images = [image.convert("RGB").resize((32, 32)) for image in images]
    pixels = AutoImageProcessor.from_pretrained(vit_directory)(images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        tensor, copied = pixels.clone(), copy.deepcopy(vit)
    forms: dict[str, Callable[[], Any]] = {
        "data set": lambda: datasets.Dataset.from_dict({"image": images, "label": [0] * len(images)}),
        "rows": lambda: [{"image": image} for image in images],
        "frame": lambda: pd.Series(images),
        "generator": lambda: (image for image in images),
        "labeled": lambda: [(image, 3) for image in images],
        "arrays": lambda: [np.asarray(image) for image in images],
        "array": lambda: np.stack([np.asarray(image) for image in images]),
        "paths": lambda: sorted(map(str, flat_images.iterdir())),
        "inference tensor": lambda: (tensor[start : start + 6] for start in range(0, 24, 6)),
        "inference mode": lambda: pixels,
        "inference model": lambda: pixels,
        "return_dict": lambda: pixels,
    }
    vit.config.return_dict = form != "return_dict"
    with torch.inference_mode(form == "inference mode"):
        small = vitshrink.compress(copied if form == "inference model" else vit, forms[form](), **FEW)
    assert small.report.evaluation is not None
    assert small.report.evaluation.samples == 4
    assert small.model(pixels[:2]).logits.shape == (2, 4)


@pytest.mark.parametrize(
    "form", ["data set", "pairs", "tokenized", "frame", "series", "array", "objects", "set", "generator", "rows"]
)
def test_texts_in_any_usual_form_do(bert: PreTrainedModel, bert_directory: Path, texts: list[str], form: str) -> None:
    encoded = dict(AutoTokenizer.from_pretrained(bert_directory)(texts, padding=True))
    forms: dict[str, Callable[[], Any]] = {
        "data set": lambda: datasets.Dataset.from_dict({"text": texts, "label": [0] * len(texts)}),
        "pairs": lambda: datasets.Dataset.from_dict({"sentence1": texts, "sentence2": texts}),
        "tokenized": lambda: datasets.Dataset.from_dict(encoded),
        "frame": lambda: pd.DataFrame({"text": texts, "target": 1}, index=range(5, 5 + len(texts))),
        "series": lambda: pd.Series(texts),
        "array": lambda: np.array(texts),
        "objects": lambda: np.array(texts, dtype=object),
        "set": lambda: set(texts),
        "generator": lambda: (text for text in texts),
        "rows": lambda: [{"text": text} for text in texts],
    }
    small = vitshrink.compress(bert, forms[form](), **FEW, refine=0)
    assert small.report.evaluation is not None
    assert small.report.evaluation.samples == 4


def test_data_sets_that_do_not_say_what_to_read_are_refused(bert: PreTrainedModel, texts: list[str]) -> None:
    data = datasets.Dataset.from_dict({"foo": texts, "bar": texts})
    with pytest.raises(DataError, match=r"no column looks like the text\. Give text-column"):
        vitshrink.compress(bert, data, **FEW)
    assert vitshrink.compress(bert, data, text_column="foo", refine=0, **FEW).report.evaluation is not None
    with pytest.raises(DataError, match="has the splits train, test: give one"):
        vitshrink.compress(bert, datasets.DatasetDict({"train": data, "test": data}), **FEW)
    with pytest.raises(DataError, match="is a stream: pass rows of it"):
        vitshrink.compress(bert, data.to_iterable_dataset(), **FEW)


def test_a_decoder_in_memory_is_refused(bert: PreTrainedModel, texts: list[str]) -> None:
    bert.config.is_decoder = True
    with pytest.raises(CheckpointError, match="the model's config has is_decoder"):
        vitshrink.compress(bert, texts, **FEW)


def test_models_that_cannot_be_compressed_are_refused(vit: PreTrainedModel, images: list[Image.Image]) -> None:
    with pytest.raises(UsageError, match="expected a transformers model"):
        vitshrink.compress(torch.nn.Linear(3, 3), images, keep=0.5)  # type: ignore[arg-type]
    gpt = transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20))
    with pytest.raises(CheckpointError, match="GPT2Model"):
        vitshrink.compress(gpt, images, keep=0.5)
    with torch.no_grad():
        vit.vit.layers[0].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        vitshrink.compress(vit, images, keep=0.5)


def test_masks_are_asked_for() -> None:
    with pytest.raises(DataError, match="attention_mask"):
        ReadyBatches([torch.ones(2, 5, dtype=torch.long)], "text", 8)


def test_every_flag_has_a_place() -> None:
    """An entry that a job in memory ignores in silence would be a trap: each is refused, or read by what it runs."""
    entries = set(names_of(CompressConfig, lambda _: True))
    refused = set(names_of(CompressConfig, lambda option: not option.in_memory))
    reached, ahead = set[str](), {"vitshrink.jobs.in_memory"}
    while ahead:
        reached |= ahead
        ahead = {each.module for module, each in OWN if module in ahead and each.module in FILES} - reached
    sources = [FILES[module].read_text(encoding="utf-8") for module in reached - {"vitshrink.config.options"}]
    derived: list[Any] = [CompressConfig.calibration_data, CompressConfig.stores, CompressConfig.stored_dtype]
    sources += [inspect.getsource(each.fget).replace("self.", "config.") for each in derived]
    read = set(re.findall(r"\bconfig\.(\w+)", "\n".join(sources)))
    assert entries - refused - read == set()
