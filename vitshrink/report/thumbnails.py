"""Small images of the samples on which two models disagree, as ``data:`` addresses."""

import base64
from collections.abc import Mapping, Sequence, Set
from io import BytesIO
from typing import Any

from vitshrink.data import ImageError, SampleSet, decode_image

SIDE = 160
"""Pixels of the longer side."""

SHOWN = 12
"""So many are shown: about 100 kB."""


def with_thumbnails(
    disagreements: Sequence[Mapping[str, Any]], samples: SampleSet, most: int = SHOWN
) -> list[dict[str, Any]]:
    """The entries of an evaluation, the first ``most`` with an image under ``thumbnail``; texts have none.

    A report with thumbnails publishes the samples: make one only when the user asks for it.
    """
    made = _thumbnails(samples, {entry["sample"] for entry in disagreements[:most]})
    return [
        {**entry, "thumbnail": made[entry["sample"]]} if entry["sample"] in made else dict(entry)
        for entry in disagreements
    ]


def _thumbnails(samples: SampleSet, wanted: Set[str]) -> dict[str, str]:
    made = {}
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
