"""Preprocessing: the checkpoint's own, unchanged by threads and shortcuts; broken samples are counted and named."""

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, DeiTImageProcessor, ViTImageProcessor

from vitshrink.data import (
    BadSamples,
    Batch,
    ImageEncoder,
    Preprocessor,
    Sample,
    SampleSet,
    decode_image,
    open_samples,
)
from vitshrink.data.timm_transform import TimmTransform
from vitshrink.errors import CheckpointError, DataError, UsageError


def sentences(*lines: str | None, pairs: Sequence[str | None] | None = None) -> SampleSet:
    second = pairs or [None] * len(lines)
    samples = [
        Sample(f"row {number}", text=line, text_pair=pair, label=number)
        for number, (line, pair) in enumerate(zip(lines, second, strict=True), 1)
    ]
    return SampleSet("lines", "text", samples, None, "integers")


def keys(batches: Sequence[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


@pytest.fixture
def image_preprocessor(vit_directory: Path) -> Preprocessor:
    return Preprocessor.from_checkpoint(vit_directory, "image")


@pytest.fixture
def text_preprocessor(bert_directory: Path) -> Preprocessor:
    return Preprocessor.from_checkpoint(bert_directory, "text")


# Images


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_equal_the_processors_own_output_in_order(
    image_preprocessor: Preprocessor, vit_directory: Path, class_images: Path, workers: int
) -> None:
    samples = open_samples(class_images, "image")
    batches = list(image_preprocessor.batches(samples, 9, workers=workers))
    assert [len(batch.keys) for batch in batches] == [9, 9, 9, 5]
    assert keys(batches) == [sample.key for sample in samples.samples]
    assert [label for batch in batches for label in batch.labels] == [sample.label for sample in samples.samples]
    assert all(batch.mask is None for batch in batches)
    processor = AutoImageProcessor.from_pretrained(vit_directory)
    images = [decode_image(sample.image) for sample in samples.samples if sample.image is not None]
    expected = processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.cat([batch.inputs["pixel_values"] for batch in batches]), expected)


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(),
        ViTImageProcessor(do_rescale=False),
        ViTImageProcessor(do_normalize=False),
        ViTImageProcessor(do_resize=False),
        ViTImageProcessor(do_normalize=False, do_rescale=False),
        ViTImageProcessor(image_mean=0.5, image_std=0.25),
        DeiTImageProcessor(),
        DeiTImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, rescale_factor=1 / 127.5),
        DeiTImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 32, "width": 32}),  # pads with zeros
    ],
    ids=range(9),
)
def test_looking_levels_up_gives_the_same_bits_as_computing_them(processor: object) -> None:
    noise = [np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8) for seed in range(3)]
    images = [Image.fromarray(pixels) for pixels in noise]
    samples = SampleSet("noise", "image", [Sample(str(n), image=image) for n, image in enumerate(images)])
    (batch,) = Preprocessor(ImageEncoder(processor)).batches(samples, 3)
    expected = processor(images, return_tensors="pt")["pixel_values"]  # type: ignore[operator]
    assert batch.inputs["pixel_values"].dtype == expected.dtype
    assert torch.equal(batch.inputs["pixel_values"], expected)


def test_a_processor_with_steps_of_its_own_keeps_its_output() -> None:
    class Shading(type(ViTImageProcessor())):  # type: ignore[misc]
        def normalize(self, image: np.ndarray, *_: object) -> np.ndarray:
            return image * np.linspace(0, 1, image.shape[-1], dtype=image.dtype)

    processor = Shading()
    encoder = ImageEncoder(processor)
    assert encoder._levels is None
    image = Image.effect_noise((50, 50), 60).convert("RGB")
    (batch,) = Preprocessor(encoder).batches(SampleSet("x", "image", [Sample("a", image=image)]), 1)
    assert torch.equal(batch.inputs["pixel_values"], processor([image], return_tensors="pt")["pixel_values"])


def test_the_description_says_what_is_done(image_preprocessor: Preprocessor) -> None:
    assert image_preprocessor.description == {
        "kind": "image",
        "processor": "ViTImageProcessor",
        "backend": image_preprocessor.processor.backend,
        "size": {"height": 32, "width": 32},
        "resample": "bilinear",
        "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    json.dumps(image_preprocessor.description)


def test_unusual_images_are_preprocessed(image_preprocessor: Preprocessor, tmp_path: Path) -> None:
    for mode in ("L", "LA", "P", "RGBA", "CMYK", "1"):
        Image.new("RGB", (30, 20), (200, 100, 50)).convert(mode).save(
            tmp_path / f"{mode}.tiff" if mode == "CMYK" else tmp_path / f"{mode}.png"
        )
    Image.new("RGB", (1, 1)).save(tmp_path / "pixel.png")
    Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(tmp_path / "deep.png")
    (batch,) = image_preprocessor.batches(open_samples(tmp_path, "image"), 20)
    assert batch.inputs["pixel_values"].shape == (8, 3, 32, 32)
    assert batch.inputs["pixel_values"].isfinite().all()


@pytest.fixture
def broken_images(tmp_path: Path) -> Path:
    """Ten images, of which two cannot be decoded."""
    tiny.write_images(tmp_path, 8)
    (tmp_path / "a-empty.png").write_bytes(b"")
    (tmp_path / "z-page.jpg").write_text("<html>")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_counted_and_named(image_preprocessor: Preprocessor, broken_images: Path, workers: int) -> None:
    samples, bad = open_samples(broken_images, "image"), BadSamples(limit=2)
    for _ in range(2):  # a second pass, as for a second model, counts nothing twice
        batches = list(image_preprocessor.batches(samples, 3, bad=bad, workers=workers))
        assert [len(batch.keys) for batch in batches] == [3, 3, 2]
        assert bad.reasons == {
            "a-empty.png": "is empty (0 bytes)",
            "z-page.jpg": "is not an image that Pillow can read",
        }


def test_more_bad_images_than_allowed_end_the_reading(image_preprocessor: Preprocessor, broken_images: Path) -> None:
    samples = open_samples(broken_images, "image")
    with pytest.raises(DataError, match=r"a-empty\.png is empty.*z-page\.jpg is not an image.*--max-bad-samples"):
        list(image_preprocessor.batches(samples, 3, bad=BadSamples(limit=1)))
    with pytest.raises(DataError, match=r"1 of 10 samples cannot be used, but at most 0 are allowed: a-empty\.png"):
        list(image_preprocessor.batches(samples, 3))


def test_nothing_but_bad_images(image_preprocessor: Preprocessor, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no usable sample\. a\.png is not an image"):
        list(image_preprocessor.batches(open_samples(tmp_path, "image"), 3, bad=BadSamples(limit=1)))


def test_threads_end_when_the_caller_stops_early(image_preprocessor: Preprocessor, class_images: Path) -> None:
    def running() -> list[str]:
        return [thread.name for thread in threading.enumerate() if "vitshrink" in thread.name]

    batches = image_preprocessor.batches(open_samples(class_images, "image"), 2, workers=2)
    next(batches)
    assert running()
    batches.close()
    assert not running()


def test_rows_of_a_shard_can_be_read_by_several_threads(image_preprocessor: Preprocessor, tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "files", 40)
    files = [file.read_bytes() for file in sorted((tmp_path / "files").iterdir())]
    Dataset.from_dict({"image": files}).to_parquet(tmp_path / "x.parquet")
    shard, folder = open_samples(tmp_path / "x.parquet", "image"), open_samples(tmp_path / "files", "image")
    pixels = [
        torch.cat([batch.inputs["pixel_values"] for batch in image_preprocessor.batches(samples, 7, workers=6)])
        for samples in (shard, folder)
    ]
    assert torch.equal(*pixels)


def test_images_that_keep_different_sizes_are_explained(tmp_path: Path) -> None:
    for name, size in (("a", (8, 8)), ("b", (9, 8))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    preprocessor = Preprocessor(ImageEncoder(ViTImageProcessor(do_resize=False)))
    with pytest.raises(CheckpointError, match=r"b\.png.*do_resize"):
        list(preprocessor.batches(open_samples(tmp_path, "image"), 2))


# Texts


def test_texts_are_padded_by_batch_and_masked(text_preprocessor: Preprocessor) -> None:
    samples = sentences("a good film", "this is bad", "it", "the film is not so good and this is it")
    batches = list(text_preprocessor.batches(samples, 2))
    assert [batch.inputs["input_ids"].shape for batch in batches] == [(2, 5), (2, 12)]
    assert sorted(keys(batches)) == [f"row {n}" for n in range(1, 5)]
    for batch in batches:
        assert set(batch.inputs) == {"input_ids", "token_type_ids", "attention_mask"}
        assert batch.mask is not None
        assert batch.mask.dtype == torch.bool
        assert torch.equal(batch.mask, batch.inputs["attention_mask"].bool())
        assert [f"row {label}" for label in batch.labels] == batch.keys


def test_tokens_equal_the_tokenizers_own(text_preprocessor: Preprocessor, bert_directory: Path) -> None:
    samples = sentences("a good film", "this is so bad", pairs=["it is not", "good"])
    (batch,) = text_preprocessor.batches(samples, 2, in_order=True)
    tokenizer = AutoTokenizer.from_pretrained(bert_directory)
    expected = tokenizer(["a good film", "this is so bad"], ["it is not", "good"], padding=True, return_tensors="pt")
    assert {name: tensor.tolist() for name, tensor in batch.inputs.items()} == {
        name: tensor.tolist() for name, tensor in expected.items()
    }
    assert batch.inputs["token_type_ids"].any()


def test_the_order_is_kept_on_request(text_preprocessor: Preprocessor) -> None:
    samples = sentences("a good film and this is it", "it", "this is", "a")
    assert keys(list(text_preprocessor.batches(samples, 2, in_order=True))) == [f"row {n}" for n in range(1, 5)]


def test_long_texts_are_cut_and_counted(bert_directory: Path) -> None:
    preprocessor = Preprocessor.from_checkpoint(bert_directory, "text", max_length=8)
    batches = list(preprocessor.batches(sentences("a " * 6, "a " * 7, "good " * 500), 3))
    assert sum(batch.truncated for batch in batches) == 2
    tokens = batches[0].inputs["input_ids"]
    assert tokens.shape == (3, 8)
    assert len(set(tokens[:, -1].tolist())) == 1  # the separator stays at the end
    assert preprocessor.description["max_length"] == 8


def test_long_pairs_keep_both_texts(bert_directory: Path) -> None:
    preprocessor = Preprocessor.from_checkpoint(bert_directory, "text", max_length=10)
    (batch,) = preprocessor.batches(sentences("good " * 50, pairs=["bad " * 50]), 1)
    segments = batch.inputs["token_type_ids"][0].tolist()
    assert (len(segments), segments.count(1) >= 4, batch.truncated) == (10, True, 1)


def test_blank_texts_are_bad_samples(text_preprocessor: Preprocessor) -> None:
    bad = BadSamples(limit=3)
    samples = sentences("good", " \t", None, "bad", pairs=["a", "b", "c", " "])
    assert keys(list(text_preprocessor.batches(samples, 4, bad=bad))) == ["row 1"]
    assert bad.reasons == {"row 2": "has no text", "row 3": "has no text", "row 4": "has no second text"}


def test_pairs_in_some_rows_only_are_bad_samples(text_preprocessor: Preprocessor) -> None:
    bad = BadSamples(limit=1)
    samples = sentences("good", "bad", "it", pairs=["a", None, "b"])
    assert len(keys(list(text_preprocessor.batches(samples, 4, bad=bad)))) == 2
    assert bad.reasons == {"row 2": "has no second text"}


@pytest.mark.parametrize("max_length", [0, 3, 65, 10**6])
def test_lengths_that_the_model_cannot_take_are_refused(bert_directory: Path, max_length: int) -> None:
    with pytest.raises(UsageError, match=f"--max-length {max_length} is not possible.*at most 64 tokens"):
        Preprocessor.from_checkpoint(bert_directory, "text", max_length=max_length)


# Misuse


def test_samples_of_the_other_kind_are_refused(
    image_preprocessor: Preprocessor, text_preprocessor: Preprocessor, flat_images: Path
) -> None:
    with pytest.raises(DataError, match="contains text samples, but the model takes image"):
        next(image_preprocessor.batches(sentences("a"), 1))
    with pytest.raises(DataError, match="contains image samples, but the model takes text"):
        next(text_preprocessor.batches(open_samples(flat_images, "image"), 1))
    with pytest.raises(UsageError, match="at least 1"):
        next(text_preprocessor.batches(sentences("a"), 0))


# Checkpoints


def copied(source: Path, target: Path, *left_out: str) -> Path:
    shutil.copytree(source, target)
    for name in left_out:
        (target / name).unlink()
    return target


def test_a_missing_image_processor_is_never_replaced_by_a_default(vit_directory: Path, tmp_path: Path) -> None:
    path = copied(vit_directory, tmp_path / "model", "preprocessor_config.json")
    with pytest.raises(CheckpointError, match=r"no image processor.*preprocessor_config\.json.*Copy"):
        Preprocessor.from_checkpoint(path, "image")


def test_a_missing_vocabulary_is_never_replaced_by_an_empty_one(bert_directory: Path, tmp_path: Path) -> None:
    vocabularies = [name for name in ("tokenizer.json", "vocab.txt") if (bert_directory / name).exists()]
    path = copied(bert_directory, tmp_path / "model", *vocabularies)
    with pytest.raises(CheckpointError, match=r"no tokenizer.*tokenizer\.json or vocab\.txt"):
        Preprocessor.from_checkpoint(path, "text")


@pytest.mark.parametrize("content", ["", "{", "[]", "<html>", '{"image_processor_type": "NoSuchProcessor"}'])
def test_damaged_image_processors_are_named(vit_directory: Path, tmp_path: Path, content: str) -> None:
    path = copied(vit_directory, tmp_path / "model")
    (path / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"cannot read the image processor of .*model"):
        Preprocessor.from_checkpoint(path, "image")


def test_damaged_tokenizers_are_named(bert_directory: Path, tmp_path: Path) -> None:
    path = copied(bert_directory, tmp_path / "model")
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"cannot read the tokenizer of .*model"):
        Preprocessor.from_checkpoint(path, "text")


def test_code_in_a_checkpoint_is_not_run(vit_directory: Path, tmp_path: Path) -> None:
    path = copied(vit_directory, tmp_path / "model")
    settings = {"image_processor_type": "Mine", "auto_map": {"AutoImageProcessor": "code.Mine"}}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    (path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(CheckpointError, match="needs code from the checkpoint"):
        Preprocessor.from_checkpoint(path, "image")
    assert not (tmp_path / "ran").exists()


def change_tokenizer(directory: Path, change: Callable[[dict[str, object]], None]) -> None:
    for name in ("tokenizer_config.json", "config.json"):
        entries = json.loads((directory / name).read_text())
        change(entries)
        (directory / name).write_text(json.dumps(entries))


def test_a_tokenizer_of_another_model_is_refused(bert_directory: Path, tmp_path: Path) -> None:
    path = copied(bert_directory, tmp_path / "model")
    change_tokenizer(path, lambda entries: entries.update(vocab_size=7))
    with pytest.raises(CheckpointError, match="tokens, but the model has 7: they do not belong together"):
        Preprocessor.from_checkpoint(path, "text")


# Real material


@pytest.mark.real
def test_real_images_equal_the_processors_own_output(real_folder: Path) -> None:
    preprocessor = Preprocessor.from_checkpoint(real_folder / "deit-tiny", "image")
    samples = open_samples(real_folder / "imagenet-unlabelled", "image").select(24, 0)
    (batch,) = preprocessor.batches(samples, 24)
    processor = AutoImageProcessor.from_pretrained(real_folder / "deit-tiny")
    images = [decode_image(sample.image) for sample in samples.samples if sample.image is not None]
    assert torch.equal(batch.inputs["pixel_values"], processor(images, return_tensors="pt")["pixel_values"])
    assert preprocessor.description["resample"] == "bicubic"
    assert preprocessor.description["size"] == {"shortest_edge": 256}


@pytest.mark.real
def test_real_texts_are_all_tokenized(real_folder: Path) -> None:
    preprocessor = Preprocessor.from_checkpoint(real_folder / "minilm-sst2", "text")
    samples = open_samples(real_folder / "text" / "sst2" / "test.tsv", "text")
    batches = list(preprocessor.batches(samples, 32))
    assert sorted(keys(batches)) == sorted(sample.key for sample in samples.samples)
    assert preprocessor.description["max_length"] == 512


# timm's geometry


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (227, 227), (248, 248), (1000, 41), (249, 275)])
def test_the_geometry_of_timm(size: tuple[int, int]) -> None:
    """Resize(248, bicubic) and CenterCrop(224) of torchvision, which rounds halves to even, on pixels one can count."""
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    long = int(248 * max(size) / min(size))
    resized = (248, long) if width < height else (long, 248)
    whole = np.asarray(Image.fromarray(pixels).resize(resized, Image.Resampling.BICUBIC))
    top, left = int(round((resized[1] - 224) / 2.0)), int(round((resized[0] - 224) / 2.0))  # noqa: RUF046
    cut = np.asarray(TimmTransform(224)(Image.fromarray(pixels)))
    assert cut.shape == (224, 224, 3)
    assert np.array_equal(cut, whole[top : top + 224, left : left + 224])


def test_from_384_pixels_on_timm_keeps_the_whole_middle() -> None:
    assert (TimmTransform(224).short_side, TimmTransform(384).short_side) == (248, 384)
    assert TimmTransform(384)(Image.new("RGB", (500, 400))).size == (384, 384)


def test_timm_style_keeps_mean_and_deviation_of_the_checkpoint(vit_directory: Path, flat_images: Path) -> None:
    timm = Preprocessor.from_checkpoint(vit_directory, "image", style="timm")
    samples = open_samples(flat_images, "image")
    pixels = torch.cat([batch.inputs["pixel_values"] for batch in timm.batches(samples, 5)])
    first = TimmTransform(32)(decode_image(samples.samples[0].image or b""))
    expected = (torch.from_numpy(np.asarray(first).copy()).permute(2, 0, 1) / 255 - 0.5) / 0.5
    assert torch.allclose(pixels[0], expected, atol=1e-6)
    assert timm.description["image_mean"] == [0.5, 0.5, 0.5]


def test_timm_style_is_for_images(bert_directory: Path) -> None:
    with pytest.raises(UsageError, match="--preprocess timm is for images"):
        Preprocessor.from_checkpoint(bert_directory, "text", style="timm")
