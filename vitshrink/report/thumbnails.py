"""Small images of the samples on which two models disagree, as ``data:`` addresses."""

import base64
from collections.abc import Sequence, Set
from dataclasses import replace
from io import BytesIO

from vitshrink.data import ImageError, SampleSet, decode_image
from vitshrink.evaluation.quality import Disagreement

SIDE = 160
"""Pixels of the longer side."""

SHOWN = 12
"""So many are shown: about 100 kB."""


def with_thumbnails(
    disagreements: Sequence[Disagreement], samples: SampleSet, most: int = SHOWN
) -> tuple[Disagreement, ...]:
    """The disagreements of an evaluation, the first ``most`` with a thumbnail; texts have none.

    A report with thumbnails publishes the samples: make one only when the user asks for it.
    """
    made = _thumbnails(samples, {each.sample for each in disagreements[:most]})
    return tuple(replace(each, thumbnail=made.get(each.sample)) for each in disagreements)


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
