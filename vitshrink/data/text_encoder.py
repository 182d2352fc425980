"""Texts to token tensors by the checkpoint's own tokenizer."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vitshrink.data.batches import BadSamples, Batch, batched
from vitshrink.data.recipes import Kind
from vitshrink.data.samples import Sample, SampleSet
from vitshrink.errors import CheckpointError

Row = dict[str, list[Any]]
"""Of one sample by input name, and its ``places`` where a head answers for some of its tokens."""

SORTED_BATCHES = 64
"""Texts of so many batches are sorted by length together, which saves most of the padding."""


class TextEncoder:
    """Tokenizes single texts or pairs, cuts them to ``max_length`` tokens, and pads each batch to its longest.

    ``lower_case`` and ``prompt``, which stands before every text, are what a sentence encoder asks for.
    """

    kind: Kind = "text"

    def __init__(self, tokenizer: Any, max_length: int, *, lower_case: bool = False, prompt: str = "") -> None:
        self.processor = tokenizer
        self.max_length = max_length
        self.lower_case = lower_case
        self.prompt = prompt
        self.description: dict[str, Any] = {
            "kind": "text",
            "tokenizer": type(tokenizer).__name__,
            "vocabulary": len(tokenizer),
            "max_length": max_length,
        }
        if lower_case:
            self.description["lower_case"] = True
        if prompt:
            self.description["prompt"] = prompt

    def batches(self, samples: SampleSet, batch_size: int, bad: BadSamples, in_order: bool) -> Iterator[Batch]:
        """Batches of texts of similar length, or in the order of the samples."""
        paired = any(sample.text_pair is not None for sample in samples.samples)
        for window in batched(samples.samples, batch_size * SORTED_BATCHES):
            usable = []
            for sample in window:
                problem = _problem(sample, paired)
                if problem is None:
                    usable.append(sample)
                else:
                    bad.add(sample.key, problem, samples)
            if not usable:
                continue
            tokens, truncated = self._tokenize(usable)
            order = list(range(len(usable)))
            if not in_order:
                order.sort(key=lambda row: _length(tokens[row]))
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                places = padded_places([tokens[row].pop("places", None) for row in rows], self.processor)
                inputs = padded(self.processor, [tokens[row] for row in rows])
                yield Batch(
                    inputs,
                    inputs["attention_mask"].bool(),
                    [usable[row].label for row in rows],
                    [usable[row].key for row in rows],
                    sum(truncated[row] for row in rows),
                    places,
                )

    def _tokenize(self, samples: Sequence[Sample]) -> tuple[list[Row], list[bool]]:
        """The tokens of each sample by input name, and which samples were cut."""
        tokens = self._call(samples, truncation=False)
        truncated = [_length(row) > self.max_length for row in tokens]
        long = [index for index, cut in enumerate(truncated) if cut]
        for index, row in zip(long, self._call([samples[i] for i in long], truncation=True), strict=True):
            tokens[index] = row
        return tokens, truncated

    def _call(self, samples: Sequence[Sample], *, truncation: bool) -> list[Row]:
        return self._encoded(samples, truncation=truncation) if samples else []

    def _encoded(self, samples: Sequence[Sample], *, truncation: bool) -> list[Row]:
        """A row a sample, of which there is one at least."""
        texts = [self._prepared(f"{self.prompt}{sample.text}") for sample in samples]
        pairs = None
        if samples[0].text_pair is not None:
            pairs = [self._prepared(sample.text_pair or "") for sample in samples]
        encoded = self.processor(
            texts,
            pairs,
            truncation=truncation,
            max_length=self.max_length if truncation else None,
            return_attention_mask=True,
            verbose=False,
        )
        return self._rows(encoded, len(samples))

    def _rows(self, encoded: Any, count: int) -> list[Row]:
        return [{name: rows[index] for name, rows in encoded.items()} for index in range(count)]

    def _prepared(self, text: str) -> str:
        return text.lower() if self.lower_case else text


def require_fast(tokenizer: Any, what: str) -> None:
    """Raises CheckpointError for a tokenizer that does not say where its tokens come from."""
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(
            f"the model {what}, and its {type(tokenizer).__name__} does not give token positions: a "
            "tokenizer.json is needed. Save it with a newer transformers."
        )


def padded(tokenizer: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
    """The tokens of samples as tensors (batch, tokens), or (batch, choices, tokens) where they have choices."""
    if not isinstance(rows[0]["input_ids"][0], list):
        return dict(tokenizer.pad(rows, return_tensors="pt"))
    choices = len(rows[0]["input_ids"])
    flat = [{name: row[name][index] for name in row} for row in rows for index in range(choices)]
    return {name: each.unflatten(0, (-1, choices)) for name, each in tokenizer.pad(flat, return_tensors="pt").items()}


def _length(row: Row) -> int:
    """Tokens of a sample, or of its longest choice."""
    return max(len(each) if isinstance(each, list) else len(row["input_ids"]) for each in row["input_ids"])


def padded_places(rows: Sequence[Any], tokenizer: Any) -> Tensor | None:
    """The places of samples (tokens, 2), as one tensor; None where there are none. The head is not asked at padding."""
    if any(row is None for row in rows):
        return None
    tensors = [torch.as_tensor(row, dtype=torch.long).reshape(-1, 2) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=-1, padding_side=tokenizer.padding_side)


def _problem(sample: Sample, paired: bool) -> str | None:
    texts = {"text": sample.text or ""} | ({"second text": sample.text_pair or ""} if paired else {})
    for name, text in texts.items():
        if not text.strip():
            return f"has no {name}"
        if (found := re.search(r"[\ud800-\udfff]", text)) is not None:
            return f"has half a character (\\u{ord(found[0]):04x}) in its {name}"
    return None
