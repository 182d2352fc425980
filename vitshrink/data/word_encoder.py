"""Words to token tensors: the first token of each word is the one that its tag is read from."""

from collections.abc import Sequence
from typing import Any

from vitshrink.data.samples import Sample
from vitshrink.data.text_encoder import Row, TextEncoder, require_fast


class WordEncoder(TextEncoder):
    """Texts whose words are told apart, or running text, whose words are those that the tokenizer sees."""

    def __init__(self, tokenizer: Any, max_length: int, *, lower_case: bool = False, prompt: str = "") -> None:
        require_fast(tokenizer, "tags words")
        super().__init__(tokenizer, max_length, lower_case=lower_case, prompt=prompt)

    def _encoded(self, samples: Sequence[Sample], *, truncation: bool) -> list[Row]:
        split = samples[0].words is not None
        texts: Sequence[Any] = [
            [self._prepared(word) for word in sample.words or ()] if split else self._prepared(sample.text or "")
            for sample in samples
        ]
        encoded = self.processor(
            texts,
            is_split_into_words=split,
            truncation=truncation,
            max_length=self.max_length if truncation else None,
            return_attention_mask=True,
            verbose=False,
        )
        rows = self._rows(encoded, len(samples))
        for index, row in enumerate(rows):
            row["places"] = [list(place) for place in _firsts(encoded.word_ids(index))]
        return rows


def _firsts(words: Sequence[int | None]) -> list[tuple[int, int]]:
    """The word that starts at each token and the one after it; -1 where none starts."""
    before = [None, *words[:-1]]
    return [
        (-1, -1) if word is None or word == last else (word, word + 1) for word, last in zip(words, before, strict=True)
    ]
