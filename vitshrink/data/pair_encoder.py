"""Images and texts for a dual encoder, each by the processor of its tower, in batches of one kind."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, zip_longest
from typing import Any

import torch.nn.functional as F

from vitshrink.data.batches import BadSamples, Batch
from vitshrink.data.image_encoder import ImageEncoder
from vitshrink.data.recipes import Kind
from vitshrink.data.samples import SampleSet
from vitshrink.data.text_encoder import TextEncoder


class PairEncoder:
    """Reads the images and the texts of samples apart: a sample that has both is in two batches.

    ``filled`` is the length that texts are filled up to, without a mask, for models that were trained so (SigLIP).
    """

    kind: Kind = "image-text"

    def __init__(self, images: ImageEncoder, texts: TextEncoder, filled: int | None = None) -> None:
        self.processor = texts.processor
        self._images = images
        self._texts = texts
        self._filled = filled
        self.description: dict[str, Any] = texts.description | {"kind": self.kind, "images": images.description}
        if filled is not None:
            self.description["filled_to"] = filled

    def batches(
        self, samples: SampleSet, batch_size: int, bad: BadSamples, workers: int | None, in_order: bool
    ) -> Iterator[Batch]:
        """Batches of images and batches of texts in turn, so that the first few have some of both."""
        images = [sample for sample in samples.samples if sample.image is not None]
        texts = [sample for sample in samples.samples if sample.text is not None]
        sides: list[Iterable[Batch]] = []
        if images:
            sides.append(self._images.batches(replace(samples, samples=images), batch_size, bad, workers))
        if texts:
            sides.append(
                map(self._full, self._texts.batches(replace(samples, samples=texts), batch_size, bad, in_order))
            )
        yield from (batch for batch in chain.from_iterable(zip_longest(*sides)) if batch is not None)

    def _full(self, batch: Batch) -> Batch:
        """Texts as the model was trained on them."""
        if self._filled is None:
            return batch
        tokens = batch.inputs["input_ids"]
        missing = max(0, self._filled - tokens.shape[1])
        return replace(
            batch, inputs={"input_ids": F.pad(tokens, (0, missing), value=self.processor.pad_token_id)}, mask=None
        )
