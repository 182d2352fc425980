"""Questions and contexts to token tensors: every token of a context is a range of its characters."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from vitshrink.data.samples import Sample, SampleSet
from vitshrink.data.text_encoder import Row, TextEncoder, require_fast

OVERLAP = 128
"""Tokens of a context that two windows of it share, as in the examples of transformers; half of a window at most."""

NOWHERE = [-1, -1]
NO_ANSWER = [0, 0]
"""The place of the first token, which stands for no answer at all."""


class QuestionEncoder(TextEncoder):
    """Contexts are cut where the two are too long, and questions only to half of the tokens."""

    def __init__(self, tokenizer: Any, max_length: int, *, lower_case: bool = False, prompt: str = "") -> None:
        require_fast(tokenizer, "answers by a part of the text")
        super().__init__(tokenizer, max_length, lower_case=lower_case, prompt=prompt)

    def _encoded(self, samples: Sequence[Sample], *, truncation: bool) -> list[Row]:
        encoded = self.processor(
            [self._short(sample.text or "") if truncation else self._prepared(sample.text or "") for sample in samples],
            [self._prepared(sample.text_pair or "") for sample in samples],
            truncation="only_second" if truncation else False,
            max_length=self.max_length if truncation else None,
            return_attention_mask=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        offsets = encoded.pop("offset_mapping")
        rows = self._rows(encoded, len(samples))
        for index, row in enumerate(rows):
            sequences, before = encoded.sequence_ids(index), samples[index].skipped
            places = [
                [before + edge for edge in place] if sequence == 1 else NOWHERE
                for place, sequence in zip(offsets[index], sequences, strict=True)
            ]
            places[0] = NO_ANSWER if sequences[0] is None else places[0]
            row["places"] = places
        return rows

    def windows(self, samples: SampleSet) -> SampleSet:
        """Where a context is too long for one reading, as many samples of the same key as it takes to read it all."""
        found = [window for sample in samples.samples for window in self._windows(sample)]
        return samples if len(found) == len(samples) else replace(samples, samples=found)

    def _windows(self, sample: Sample) -> Iterator[Sample]:
        context = sample.text_pair or ""
        question = self._alone(self._short(sample.text or ""))["offset_mapping"]
        room = self.max_length - len(question) - int(self.processor.num_special_tokens_to_add(pair=True))
        encoded = self._alone(self._prepared(context))
        offsets, words = encoded["offset_mapping"], encoded.word_ids(0)
        start = 0
        while len(offsets) - start > room:
            end = _word_start(words, start + room, above=start)
            before = offsets[start - 1][1] if start else 0  # with the blank before the first word
            yield replace(sample, text_pair=context[before : offsets[end - 1][1]], skipped=before)
            start = _word_start(words, end - min(OVERLAP, room // 2), above=start)
        before = offsets[start - 1][1] if start else 0
        yield replace(sample, text_pair=context[before:], skipped=before)

    def _alone(self, text: str) -> Any:
        return self.processor(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)

    def _short(self, question: str) -> str:
        question = self._prepared(question)
        offsets = self._alone(question)["offset_mapping"]
        most = self.max_length // 2
        return question if len(offsets) <= most else question[: offsets[most - 1][1]]


def _word_start(words: Sequence[int | None], token: int, *, above: int) -> int:
    """The first token of the word that ``token`` is in; ``token`` itself where that would not be ``above``."""
    first = token
    while first > above and words[first] == words[first - 1]:
        first -= 1
    return first if first > above else token
