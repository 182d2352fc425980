"""Decoding of images from anywhere, of any mode, to upright ones of the channels that a model takes."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vitshrink.errors import DataError

ImageSource = Path | bytes | Image.Image | Callable[[], bytes]
"""Where the bytes of an image are: a file, memory, an open image, or a function that fetches them."""

MAX_ASPECT_RATIO = 200
"""Longer and thinner than this, resizing the short side to 224 pixels would need gigabytes."""

IMAGE_SUFFIXES = frozenset(
    (
        *(".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm"),
        *(".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
    )
)


class ImageError(DataError):
    """One image that cannot be decoded; the message says why, the caller says which."""


def read_image_bytes(source: ImageSource) -> bytes:
    """The encoded bytes, or for an open image its mode, size and pixels. Raises OSError, ValueError."""
    if isinstance(source, Path):
        if source.is_fifo() or source.is_char_device():  # reading would wait for ever
            raise OSError("is a pipe or a device, not a file")
        return source.read_bytes()
    if isinstance(source, bytes):
        return source
    if isinstance(source, Image.Image):
        return f"{source.mode} {source.size} ".encode() + source.tobytes()
    return source()


MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""What Pillow calls 8-bit images of these channels: gray, color, and color with opacity."""


def decode_image(source: ImageSource, mode: str = "RGB") -> Image.Image:
    """An upright image of one of the ``MODES``, with 8 bits a channel.

    The EXIF orientation is applied, transparency dropped where the mode has none, and 16-bit gray scaled by 1/257
    (Pillow would clip it).

    Raises:
        ImageError: empty, truncated, not an image, too large or too thin, or samples without a defined range.
    """
    if isinstance(source, Image.Image):
        return _upright(source, mode)
    try:
        content = read_image_bytes(source)
    except FileNotFoundError as error:  # of a table, whose row says nothing of where that is looked for
        raise ImageError(f"cannot be read (there is no file {error.filename or error})") from error
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # a name that no file can have, in a table
        raise ImageError(f"cannot be read ({error})") from error
    if not content:
        raise ImageError("is empty (0 bytes)")
    try:
        with Image.open(BytesIO(content)) as image:
            return _upright(image, mode)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("is not an image that Pillow can read") from error
    except Exception as error:  # decoders meet hostile bytes with any exception there is
        raise ImageError(f"cannot be decoded ({error or type(error).__name__})") from error


def _upright(image: Image.Image, mode: str) -> Image.Image:
    width, height = image.size
    limit = Image.MAX_IMAGE_PIXELS  # Pillow itself only warns up to twice this
    if limit is not None and width * height > limit:
        raise ImageError(f"has {width} x {height} pixels, more than the {limit} allowed (decompression bomb?)")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(f"has {width} x {height} pixels: one side is over {MAX_ASPECT_RATIO} times the other")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        gray = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((gray + 128) // 257).astype(np.uint8)).convert(mode)
    if image.mode in ("I", "F"):
        raise ImageError(
            f"has 32-bit samples (mode {image.mode}), whose range is not defined: convert it to 8 or 16 bits"
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns when it goes to RGB in one step
    return image.convert(mode)
