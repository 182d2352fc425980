"""Draws which patches of an image mixed tokens read: the picture in docs/techniques.md, of an image made of formulas.

python benchmarks/quadtree.py docs/quadtree.png --tokens 148 100 76
python benchmarks/quadtree.py own.png --image photo.jpg --tokens 100
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import ViTConfig, ViTModel

from vitshrink.models.resolution import mix_tokens
from vitshrink.models.structures.tokens import MixedTokens

SIZE, PATCH, GAP = 224, 16, 8
LINE = (255, 255, 255)


def generated() -> Image.Image:
    """A sky, a sun, a field of grass and a striped house: flat here, and full of detail there."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    noise = np.random.default_rng(0).normal(size=(SIZE, SIZE))
    pixels = np.stack([120 + 90 * y, 170 + 50 * y, 235 - 15 * y], -1)
    sun = (x - 0.78) ** 2 + (y - 0.2) ** 2 < 0.01
    pixels[sun] = (250, 220, 90)
    ground = y > 0.62 + 0.05 * np.sin(7 * x)
    grass = np.stack([60 + 8 * noise, 120 + 11 * noise, 50 + 6 * noise], -1)
    pixels[ground] = grass[ground]
    house = (abs(x - 0.32) < 0.17) & (y > 0.4) & (y < 0.8)
    stripes = np.where((np.floor(y * 75) % 2)[..., None] > 0, (170, 80, 60), (120, 50, 40))
    pixels[house] = stripes[house]
    roof = (y > 0.25) & (y < 0.4) & (abs(x - 0.32) < 0.2 * (y - 0.25) / 0.15)
    pixels[roof] = (70, 60, 70)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def leaves(image: Image.Image, tokens: MixedTokens) -> list[tuple[int, int, int]]:
    """Left, top and side, in pixels, of every patch that is read; the scorer ``blur`` looks at no weight."""
    config = ViTConfig(image_size=SIZE, patch_size=PATCH, hidden_size=16, num_hidden_layers=1, num_attention_heads=1)
    model = ViTModel(config).eval()
    mix_tokens(model, tokens)
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1
    embeddings: Any = model.embeddings
    indices: Tensor = embeddings.leaves(pixels)[0]
    found, start = [], 0
    for level in reversed(range(tokens.levels)):  # numbered from large to small
        side = PATCH << level
        columns = SIZE // side
        own = indices[(indices >= start) & (indices < start + columns**2)] - start
        found += [(int(index) % columns * side, int(index) // columns * side, side) for index in own]
        start += columns**2
    return found


def drawn(image: Image.Image, patches: Sequence[tuple[int, int, int]]) -> Image.Image:
    """The image as the model reads it, each patch in its own resolution, with their borders."""
    shown = image.copy()
    for left, top, side in patches:
        box = (left, top, left + side, top + side)
        shown.paste(image.crop(box).resize((PATCH, PATCH), Image.Resampling.BOX).resize((side, side)), box)
    pen = ImageDraw.Draw(shown)
    for left, top, side in patches:
        pen.rectangle((left, top, left + side, top + side), outline=LINE)
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--image", type=Path, help="in the place of the generated one")
    parser.add_argument("--tokens", type=int, nargs="+", default=[148, 100, 76])
    parser.add_argument("--levels", type=int, default=2)
    given = parser.parse_args(arguments)
    image = generated() if given.image is None else Image.open(given.image).convert("RGB").resize((SIZE, SIZE))
    pictures = [image]
    for budget in given.tokens:
        patches = leaves(image, MixedTokens(budget, given.levels))
        print(f"{budget} tokens: {len(patches)} patches, {sum(side > PATCH for _, _, side in patches)} of them large")
        pictures.append(drawn(image, patches))
    strip = Image.new("RGB", (len(pictures) * (SIZE + GAP) - GAP, SIZE), LINE)
    for place, picture in enumerate(pictures):
        strip.paste(picture, (place * (SIZE + GAP), 0))
    strip.save(given.output, optimize=True)


if __name__ == "__main__":
    main()
