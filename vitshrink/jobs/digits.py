"""1797 scanned digits of 8×8 pixels as files, and a small ViT trained on them.

``digits.npz`` beside this file holds the scans; ``digits.txt`` says whose they are and under which license.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from vitshrink.models.loading import quiet_transformers

SCANS = Path(__file__).with_name("digits.npz")
CLASSES = tuple("0123456789")
IMAGE_SIZE = 8
PATCH_SIZE = 2
HIDDEN_SIZE = 64
HELD_OUT = 400
CALIBRATION_IMAGES = 256
EPOCHS = 30


def write_digits(folder: Path, *, seed: int = 0) -> None:
    """Write the digits as PNG: ``train/<class>/``, ``val/<class>/`` and, without labels, ``calibration/``.

    The calibration images are training images, so nothing of the held-out part is seen before evaluation.
    """
    with np.load(SCANS, allow_pickle=False) as held:
        pixels = np.round(held["scans"] * (255 / 16)).astype(np.uint8)
        labels = held["labels"]
    order = np.random.default_rng(seed).permutation(len(pixels))
    for position, index in enumerate(order):
        part = "val" if position < HELD_OUT else "train"
        file = folder / part / CLASSES[labels[index]] / f"{index:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[index]).save(file)
        if HELD_OUT <= position < HELD_OUT + CALIBRATION_IMAGES:
            (folder / "calibration").mkdir(exist_ok=True)
            copyfile(file, folder / "calibration" / file.name)


def train_digits_model(images: Path, output: Path, *, seed: int = 0, epochs: int = EPOCHS) -> None:
    """Train a small ViT on ``images/<class>/*.png`` and save it to ``output`` with its processor and labels.

    The same seed gives the same weights on the same machine; the random state of the caller is left alone.
    """
    processor = ViTImageProcessorPil(
        do_resize=True,
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_rescale=True,
        do_normalize=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    pixels, labels = read_images(images, processor)
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        model = ViTForImageClassification(
            ViTConfig(
                image_size=IMAGE_SIZE,
                patch_size=PATCH_SIZE,
                hidden_size=HIDDEN_SIZE,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=4 * HIDDEN_SIZE,
                # near 1/√width: the usual 0.02 trains, at this width, to weights of so low a rank that every
                # method compresses them without loss and there is nothing to compare
                initializer_range=0.1,
                id2label=dict(enumerate(CLASSES)),
                label2id={name: index for index, name in enumerate(CLASSES)},
            )
        )
        _train(model, pixels, labels, epochs=epochs)
    with quiet_transformers():
        model.save_pretrained(output)
        processor.save_pretrained(output)


def read_images(folder: Path, processor: ViTImageProcessorPil) -> tuple[Tensor, Tensor]:
    """Pixels (images, 3, height, width) and labels (images,) of ``folder/<class>/*.png``, sorted by path."""
    files = sorted(folder.glob("*/*.png"))
    images = [Image.open(file).convert("RGB") for file in files]
    labels = torch.tensor([CLASSES.index(file.parent.name) for file in files])
    return processor(images, return_tensors="pt")["pixel_values"], labels


def _train(model: ViTForImageClassification, pixels: Tensor, labels: Tensor, *, epochs: int) -> None:
    batch_size, peak = 64, 2e-3
    steps = len(pixels) // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak, epochs=epochs, steps_per_epoch=steps, pct_start=0.15
    )
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(pixels))
        for batch in order[: steps * batch_size].view(steps, batch_size):
            loss = F.cross_entropy(model(pixel_values=_shift(pixels[batch])).logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


def _shift(pixels: Tensor) -> Tensor:
    """Move every second batch, on average, by up to one pixel each way."""
    if torch.rand(()) < 0.5:
        return pixels
    row, column = torch.randint(0, 3, (2,)).tolist()
    padded = F.pad(pixels, (1, 1, 1, 1), value=-1.0)  # black
    return padded[..., row : row + IMAGE_SIZE, column : column + IMAGE_SIZE]


@contextmanager
def _one_thread() -> Iterator[None]:
    """A model this small gains nothing from threads, and loses much to them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
