"""Small images of samples for a page, as ``data:`` addresses."""

import base64
from collections.abc import Collection
from io import BytesIO

from vitshrink.data import ImageError, SampleSet, decode_image

SIDE = 160
"""Pixels of the longer side."""


def thumbnails(samples: SampleSet, keys: Collection[str]) -> dict[str, str]:
    """JPEG thumbnails of the samples with these keys; texts and images that cannot be read have none.

    A page with thumbnails publishes the samples: make one only when the user asks for it.
    """
    wanted, made = set(keys), {}
    for sample in samples.samples:
        if sample.key in wanted and sample.image is not None:
            try:
                image = decode_image(sample.image)
            except ImageError:
                continue
            image.thumbnail((SIDE, SIDE))
            stream = BytesIO()
            image.save(stream, "JPEG", quality=80)
            made[sample.key] = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
    return made
