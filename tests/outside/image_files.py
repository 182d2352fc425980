"""Files of images that are unusual."""

import numpy as np
from PIL import Image

from .images import Images, Picture, encoded
from .oddity import oddity


def _first(images: Images, image: Image.Image, name: bytes = b"odd.png", **options: object) -> Picture:
    """One picture more; what the model says to it is left open."""
    images.right = False
    picture = Picture(image, name, options=dict(options))
    images.pictures.append(picture)
    return picture


def _noise(*shape: int, dtype: type = np.uint8, most: int = 256) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, most, size=shape).astype(dtype))


@oddity(Images, outcome="works")
def gray_image(images: Images) -> None:
    _first(images, _noise(32, 40))


@oddity(Images, outcome="works")
def image_with_transparency(images: Images) -> None:
    _first(images, _noise(32, 40, 4))


@oddity(Images, outcome="works")
def image_of_16_bits(images: Images) -> None:
    _first(images, _noise(32, 40, dtype=np.uint16, most=2**16))


@oddity(Images)
def image_of_32_bits(images: Images) -> None:
    picture = _first(images, _noise(32, 40, dtype=np.float32), b"odd.tiff", format="TIFF")
    picture.good = False


@oddity(Images, outcome="works")
def image_of_one_bit(images: Images) -> None:
    _first(images, _noise(32, 40).convert("1"))


@oddity(Images, outcome="works")
def image_with_a_palette(images: Images) -> None:
    _first(images, _noise(32, 40, 3).convert("P"), transparency=3)


@oddity(Images, outcome="works")
def image_for_print(images: Images) -> None:
    _first(images, _noise(32, 40, 4).convert("CMYK"), b"odd.jpg", format="JPEG")


@oddity(Images, outcome="works")
def animated_image(images: Images) -> None:
    frames = [_noise(32, 40, 3) for _ in range(3)]
    _first(images, frames[0], b"odd.gif", format="GIF", save_all=True, append_images=frames[1:])


@oddity(Images, outcome="works")
def rotated_by_its_header(images: Images) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    _first(images, _noise(32, 40, 3), b"odd.jpg", format="JPEG", exif=exif)


@oddity(Images, outcome="works")
def image_of_one_pixel(images: Images) -> None:
    _first(images, _noise(1, 1, 3))


@oddity(Images)
def image_of_one_row(images: Images) -> None:
    _first(images, _noise(1, 5000, 3)).good = False


@oddity(Images, outcome="works")
def large_image(images: Images) -> None:
    _first(images, _noise(900, 1200, 3), b"odd.jpg", format="JPEG")


@oddity(Images)
def far_too_large_image(images: Images) -> None:
    _first(images, Image.new("1", (30_000, 20_000))).good = False


@oddity(Images)
def broken_image(images: Images) -> None:
    _bad(images, b"\x89PNG\r\n\x1a\nnothing more")


@oddity(Images)
def cut_image(images: Images) -> None:
    picture = Picture(_noise(40, 40, 3), b"x")
    _bad(images, encoded(picture)[:700])


@oddity(Images)
def empty_image(images: Images) -> None:
    _bad(images, b"")


@oddity(Images)
def web_page_in_place_of_an_image(images: Images) -> None:
    _bad(images, b"<!doctype html><p>404")


def _bad(images: Images, content: bytes) -> None:
    picture = _first(images, _noise(8, 8, 3), b"bad.png")
    picture.content, picture.good = content, False


@oddity(Images)
def all_broken(images: Images) -> None:
    for picture in images.pictures:
        picture.content, picture.good = b"no image", False


def _named(images: Images, name: bytes) -> None:
    images.pictures[0].name = name


@oddity(Images, slot="name", outcome="works")
def name_not_in_utf8(images: Images) -> None:
    _named(images, b"caf\xe9.png")


@oddity(Images, slot="name", outcome="works")
def name_with_a_line_break(images: Images) -> None:
    _named(images, b"two\nlines.png")


@oddity(Images, slot="name", outcome="works")
def name_with_markup(images: Images) -> None:
    _named(images, b"[bold red]<b>x&[red].png")


@oddity(Images, slot="name", outcome="works")
def name_with_escapes(images: Images) -> None:
    _named(images, b"\x1b[31mred\x07.png")


@oddity(Images, slot="name", outcome="works")
def name_with_blanks(images: Images) -> None:
    _named(images, b" a b , c.png")


@oddity(Images, slot="name", outcome="works")
def name_with_a_dash(images: Images) -> None:
    _named(images, b"--keep.png")


@oddity(Images, slot="name", outcome="works")
def name_of_250_letters(images: Images) -> None:
    _named(images, b"x" * 246 + b".png")


@oddity(Images, slot="suffix", outcome="works")
def capital_suffixes(images: Images) -> None:
    for picture in images.pictures:
        picture.name = picture.name.replace(b".png", b".PNG")


@oddity(Images, slot="suffix", outcome="works")
def suffix_of_another_form(images: Images) -> None:
    images.pictures[1].name = b"001.jpg"


@oddity(Images, slot="suffix")
def suffix_jfif(images: Images) -> None:
    images.sure = False
    for picture in images.pictures:
        picture.name, picture.options = picture.name.replace(b".png", b".jfif"), {"format": "JPEG", "quality": 100}


@oddity(Images, slot="suffix")
def no_suffixes(images: Images) -> None:
    images.sure = False
    for picture in images.pictures:
        picture.name = picture.name.replace(b".png", b"")


@oddity(Images, outcome="works")
def copies_of_an_image(images: Images) -> None:
    images.pictures += [Picture(images.pictures[0].image, f"copy{number}.png".encode()) for number in range(4)]


@oddity(Images)
def one_image(images: Images) -> None:
    del images.pictures[1:]
