"""A folder of images, as people keep them."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .checkpoint import Checkpoint, Reference
from .data import Data

IMAGES = 20


@dataclass
class Picture:
    """One file. ``content`` stands for what is written in place of the image; ``good`` is None for no sample at all."""

    image: Image.Image
    name: bytes
    content: bytes | None = None
    good: bool | None = True
    options: dict[str, Any] = field(default_factory=dict)
    """Of Pillow's ``save``."""
    label: str = ""


@dataclass
class Images:
    """Class folders for a model that knows classes, else a flat folder."""

    checkpoint: Checkpoint
    pictures: list[Picture] = field(default_factory=list)
    flat: bool = False
    split: str = ""
    """Folder of the images, below the one that is named."""
    spell: Callable[[int, str], str] = lambda _index, name: name
    """Name of the folder of a class."""
    flags: list[str] = field(default_factory=list)
    files: list[Callable[[Path], Path]] = field(default_factory=list)
    """What is done with the folder at last; gives the path that is named on the command line."""
    sure: bool = True
    """Whether the number of samples is known, and whether the model is right in all of them."""
    right: bool = True

    def __post_init__(self) -> None:
        generator = np.random.default_rng(0)
        for number in range(IMAGES):
            height, width = generator.integers(24, 48, size=2)
            pixels = generator.integers(0, 256, size=(3, 3, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((int(width), int(height)), Image.Resampling.NEAREST)
            self.pictures.append(Picture(image, f"{number:03}.png".encode()))
        self.flat = not self.checkpoint.classifies

    def write(self, directory: Path, reference: Reference) -> Data:
        folder = directory / "images"
        answers = reference.answers([picture.image for picture in self.pictures])
        classes = reference.classes
        for number, picture in enumerate(self.pictures):
            index = answers[number] if answers else number % len(classes)
            place = folder / self.split if self.flat else folder / self.split / self.spell(index, classes[index])
            place.mkdir(parents=True, exist_ok=True)
            picture.label = classes[index]
            file = os.fsencode(place) + b"/" + picture.name
            with open(file, "wb") as opened:
                opened.write(encoded(picture))
        path = folder
        for finish in self.files:
            path = finish(path)
        good = sum(picture.good is True for picture in self.pictures)
        bad = sum(picture.good is False for picture in self.pictures)
        right = answers is not None and self.sure and self.right
        return Data(path, self.flags, good, bad, not self.flat, right, self.sure)


def encoded(picture: Picture) -> bytes:
    if picture.content is not None:
        return picture.content
    written = BytesIO()
    picture.image.save(written, **{"format": "PNG", **picture.options})
    return written.getvalue()
