"""The digits on disk and the model trained on them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from vitshrink.jobs import digits


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    digits.write_digits(folder)
    return folder


def pixels(folder: Path) -> set[bytes]:
    return {Image.open(file).tobytes() for file in folder.rglob("*.png")}


def test_every_class_is_in_both_parts(images: Path) -> None:
    for part in ("train", "val"):
        assert sorted(folder.name for folder in (images / part).iterdir()) == list(digits.CLASSES)
    assert len(list((images / "val").glob("*/*.png"))) == digits.HELD_OUT
    assert len(list((images / "train").glob("*/*.png"))) == 1797 - digits.HELD_OUT


def test_calibration_is_flat_and_holds_nothing_of_the_held_out_part(images: Path) -> None:
    assert len(list((images / "calibration").glob("*.png"))) == digits.CALIBRATION_IMAGES
    assert pixels(images / "calibration") <= pixels(images / "train")
    assert not pixels(images / "calibration") & pixels(images / "val")


def test_the_scans_are_those_of_the_data_set() -> None:
    scans, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    with np.load(digits.SCANS, allow_pickle=False) as held:
        assert np.array_equal(held["scans"].reshape(len(scans), -1), scans)
        assert np.array_equal(held["labels"], labels)
    assert "CC BY 4.0" in digits.SCANS.with_suffix(".txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_training_learns_the_digits(images: Path, tmp_path: Path) -> None:
    """A shortened schedule is far above chance; the full one is left to the demo itself."""
    digits.train_digits_model(images / "train", tmp_path, epochs=6)
    model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    held_out, labels = digits.read_images(images / "val", AutoImageProcessor.from_pretrained(tmp_path))
    with torch.inference_mode():
        correct = model(held_out).logits.argmax(dim=-1) == labels
    assert correct.float().mean() > 0.8
    assert tuple(model.config.id2label.values()) == digits.CLASSES


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(images: Path, tmp_path: Path) -> None:
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        digits.train_digits_model(images / "val", tmp_path / name, seed=seed, epochs=1)
    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again", "other"))
    assert first == again
    assert first != other


def test_training_leaves_the_random_state_and_the_threads_alone(images: Path, tmp_path: Path) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    digits.train_digits_model(images / "val", tmp_path, epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
