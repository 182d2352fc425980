"""Fixtures shared by all tests: tiny checkpoints, images and text on disk, and the real material."""

import os
import shutil
import tempfile
from pathlib import Path

# read when huggingface_hub and datasets are imported: no test may reach the network, or leave files in the user's cache
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="vitshrink-tests-")
# for the processes that tests start: this code, and one thread, as below
os.environ["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in Path(__file__).resolve().parents[:2])
os.environ["OMP_NUM_THREADS"] = "1"
# readline, where it is loaded, tells the processes of pytest-xdist of a terminal that they do not have
os.environ.pop("COLUMNS", None)
os.environ.pop("LINES", None)

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import transformers

from vitshrink.config.options import CompressConfig
from vitshrink.jobs.compress import CompressionResult, compress
from vitshrink.report import figures


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("real"):
            item.add_marker(pytest.mark.slow)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_HOME"])


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The models are tiny: more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``checkpoint("ViTModel")``: the directory of a tiny checkpoint, shared by all: copy it to change it."""
    root = tmp_path_factory.mktemp("checkpoints")

    def directory(name: str) -> Path:
        path = root / name
        return path if path.exists() else tiny.write(name, path)

    return directory


@pytest.fixture(scope="session")
def vit_directory(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("ViTForImageClassification")


@pytest.fixture(scope="session")
def deit_directory(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("DeiTForImageClassificationWithTeacher")


@pytest.fixture(scope="session")
def bert_directory(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("BertForSequenceClassification")


@pytest.fixture(scope="session")
def masked_lm_directory(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("BertForMaskedLM")


@pytest.fixture(scope="session")
def flat_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 unlabeled images in one folder."""
    return tiny.write_images(tmp_path_factory.mktemp("flat-images"), 24)


@pytest.fixture(scope="session")
def class_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four folders of 8 images, named by the classes of the tiny image classifiers."""
    root = tmp_path_factory.mktemp("class-images")
    for seed, name in enumerate(tiny.IMAGE_CLASSES):
        tiny.write_images(root / name, 8, seed=seed)
    return root


@pytest.fixture(scope="session")
def learned_images(tmp_path_factory: pytest.TempPathFactory, vit_directory: Path) -> Path:
    """40 images in folders named by the classes: 34 as the tiny ViT sees them, and 6 of another class."""
    root = tmp_path_factory.mktemp("learned-images")
    classify = transformers.pipeline("image-classification", str(vit_directory), device="cpu")
    files = sorted(tiny.write_images(root, 40, seed=7).iterdir())
    for number, file in enumerate(files):
        seen = tiny.IMAGE_CLASSES.index(classify(str(file))[0]["label"])
        name = tiny.IMAGE_CLASSES[seen if number >= 6 else (seen + 1) % len(tiny.IMAGE_CLASSES)]
        (root / name).mkdir(exist_ok=True)
        file.rename(root / name / file.name)
    return root


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 sentences, one a line."""
    return tiny.write_text(tmp_path_factory.mktemp("text") / "sentences.txt", 40)


@pytest.fixture(scope="session")
def compressed(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path], flat_images: Path, text_file: Path
) -> Callable[..., CompressionResult]:
    """``compressed("BertModel", method="svd")``: the result of a job on a tiny checkpoint. Equal jobs are run once."""
    root = tmp_path_factory.mktemp("compressed")
    results: dict[str, CompressionResult] = {}

    def job(name: str, **entries: Any) -> CompressionResult:
        data = text_file if name in tiny.TEXT_MODELS else flat_images
        entries = {"calibration": str(data), "samples": 16, "holdout": 8, "batch_size": 7} | entries
        if not entries.keys() & {"target_params", "target_size", "rank", "explained_variance"}:
            entries.setdefault("keep", (0.8,))
        entries = {name: value for name, value in entries.items() if value is not None}
        key = f"{name} {sorted(entries.items())}"
        if key not in results:
            output = str(root / f"{len(results)}-{name}")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(figures, "available", lambda: False)  # half of the time of a job on a tiny model
                (results[key],) = compress(CompressConfig(str(checkpoint(name)), output, **entries))
        return results[key]

    return job


@pytest.fixture(scope="session")
def real_folder() -> Path:
    """The real checkpoints and data: ``VITSHRINK_REAL``, or ``shared/real`` beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "real"
    folder = Path(os.environ.get("VITSHRINK_REAL", default))
    if not folder.is_dir():
        pytest.skip(f"no real checkpoints and data at {folder}: set VITSHRINK_REAL")
    return folder
