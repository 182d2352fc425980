"""The geometry of timm's evaluation of ViT and DeiT, for accuracies that can be compared with those it publishes."""

import math
from dataclasses import dataclass
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class TimmTransform:
    """Resize the short side to ``size / crop_fraction``, bicubic, and cut ``size`` × ``size`` out of the middle.

    The whole middle is kept from 384 pixels on, 0.9 of it below, as timm has it for its ViT and DeiT. Rounding is that
    of torchvision, which timm uses. Mean and standard deviation stay those of the checkpoint.
    """

    size: int

    @property
    def crop_fraction(self) -> float:
        return 1.0 if self.size >= 384 else 0.9

    @property
    def short_side(self) -> int:
        return math.floor(self.size / self.crop_fraction)

    @property
    def description(self) -> dict[str, Any]:
        """In the words of preprocessor_config.json."""
        return {
            "geometry": "timm",
            "size": {"shortest_edge": self.short_side},
            "resample": "bicubic",
            "crop_size": {"height": self.size, "width": self.size},
        }

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        short = min(width, height)
        resized = (int(self.short_side * width / short), int(self.short_side * height / short))
        if resized != image.size:
            image = image.resize(resized, Image.Resampling.BICUBIC)
        left, top = (round((length - self.size) / 2) for length in image.size)
        return image.crop((left, top, left + self.size, top + self.size))
