"""Images and their patches as (height, width), which a config may give as one number for both."""

from collections.abc import Iterable
from typing import Any


def sides(size: int | Iterable[int]) -> tuple[int, int]:
    """Height and width, of a pair or of one number for both."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def image_shape(config: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model with this config takes."""
    config = getattr(config, "vision_config", config)  # of a pair of encoders
    if (shape := (getattr(config, "pretrained_cfg", None) or {}).get("input_size")) is not None:  # of timm
        channels, height, width = shape
        return channels, height, width
    return (config.num_channels, *sides(config.image_size))


def grid_of(config: Any) -> tuple[int, int]:
    """Rows and columns of the patches of an image of the size that a config names."""
    (height, width), patch = sides(config.image_size), sides(config.patch_size)
    return height // patch[0], width // patch[1]
