"""Texts with several choices to token tensors (batch, choices, tokens)."""

from collections.abc import Iterator, Sequence

from vitshrink.data.batches import BadSamples, Batch
from vitshrink.data.layouts.choices import require_as_many
from vitshrink.data.samples import Sample, SampleSet
from vitshrink.data.text_encoder import Row, TextEncoder


class ChoiceEncoder(TextEncoder):
    """Each choice is tokenized as the second text of a pair."""

    def batches(self, samples: SampleSet, batch_size: int, bad: BadSamples, in_order: bool) -> Iterator[Batch]:
        require_as_many(samples.samples, samples.source)
        return super().batches(samples, batch_size, bad, in_order)

    def _encoded(self, samples: Sequence[Sample], *, truncation: bool) -> list[Row]:
        pairs = [
            Sample(sample.key, text=sample.text, text_pair=choice)
            for sample in samples
            for choice in sample.choices or ()
        ]
        rows = iter(super()._encoded(pairs, truncation=truncation))
        together = [[next(rows) for _ in sample.choices or ()] for sample in samples]
        return [{name: [row[name] for row in each] for name in each[0]} for each in together]
