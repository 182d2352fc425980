"""Questions and contexts to token tensors: every token of a context is a range of its characters."""

from collections.abc import Sequence
from typing import Any

from vitshrink.data.samples import Sample
from vitshrink.data.text_encoder import Row, TextEncoder, require_fast

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
            sequences = encoded.sequence_ids(index)
            places = [
                list(place) if sequence == 1 else NOWHERE
                for place, sequence in zip(offsets[index], sequences, strict=True)
            ]
            places[0] = NO_ANSWER if sequences[0] is None else places[0]
            row["places"] = places
        return rows

    def _short(self, question: str) -> str:
        question = self._prepared(question)
        offsets = self.processor(question, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        most = self.max_length // 2
        return question if len(offsets) <= most else question[: offsets[most - 1][1]]
