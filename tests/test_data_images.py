"""Decoding: every mode that is met in the wild becomes upright 8-bit RGB, and what cannot is refused with a reason."""

import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitshrink.data import ImageError, decode_image


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def photo(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [("RGB", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("1", "PNG"), ("CMYK", "JPEG"),
     ("P", "GIF"), ("RGB", "WEBP"), ("CMYK", "TIFF"), ("YCbCr", "JPEG")],
)  # fmt: skip
def test_every_mode_becomes_rgb(mode: str, file_format: str) -> None:
    given = photo(4, 3).resize((40, 30), Image.Resampling.BICUBIC).convert(mode)
    image = decode_image(encoded(given, file_format))
    assert (image.mode, image.size) == ("RGB", (40, 30))
    difference = np.abs(np.asarray(image, float) - np.asarray(given.convert("RGB"), float))
    assert difference.mean() <= (6 if file_format in ("JPEG", "WEBP") else 0)


def test_palette_with_transparency_decodes_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    palette = photo().convert("P")
    data = encoded(palette, transparency=bytes(range(256)))
    assert decode_image(data).mode == "RGB"
    assert not recwarn.list


def test_transparency_is_dropped_not_blended() -> None:
    image = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert decode_image(encoded(image)).getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bit_gray_is_scaled_not_clipped(file_format: str) -> None:
    values = np.array([[0, 128, 257, 1000, 32768, 65535]], dtype=np.uint16)
    image = decode_image(encoded(Image.fromarray(values), file_format))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 4, 128, 255]


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    assert decode_image(encoded(photo(40, 30), "JPEG", exif=exif)).size == (30, 40)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_a_damaged_exif_block_does_not_matter() -> None:
    exif = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff" + b"\xff" * 20
    assert decode_image(encoded(photo(), "JPEG", exif=exif)).size == (40, 30)


def test_one_pixel() -> None:
    assert decode_image(encoded(Image.new("RGB", (1, 1)))).size == (1, 1)


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    data = encoded(photo())
    file = tmp_path / os.fsdecode("ä photo.png".encode())
    file.write_bytes(data)
    for source in (file, data, photo(), lambda: data):
        assert np.array_equal(np.asarray(decode_image(source)), np.asarray(photo()))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "not an image"),
        (encoded(photo(200, 200), "JPEG")[:2000], "truncated"),
        (encoded(photo(200, 200))[:2000], "truncated"),
        (encoded(photo())[:20], "cannot be decoded"),
        (encoded(Image.new("1", (3, 1000))), "over 200 times"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.int32)), "TIFF"), "range is not defined"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "range is not defined"),
    ],
)
def test_unusable_bytes_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode_image(data)


@pytest.mark.parametrize("factor", [1.5, 4])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("1", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(10_000 / factor))
    with pytest.raises(ImageError, match="bomb"):
        decode_image(data)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    for path in (tmp_path / "missing.png", tmp_path / "link.png", tmp_path):
        with pytest.raises(ImageError, match="cannot be read"):
            decode_image(path)


def test_a_pipe_among_images_is_a_bad_sample_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="is a pipe or a device"):
        decode_image(tmp_path / "pipe.png")
