"""Texts to token tensors by the checkpoint's own tokenizer."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from vitshrink.data.batches import BadSamples, Batch, batched
from vitshrink.data.recipes import Kind
from vitshrink.data.samples import Sample, SampleSet

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
                order.sort(key=lambda row: len(tokens[row]["input_ids"]))
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                inputs = dict(self.processor.pad([tokens[row] for row in rows], return_tensors="pt"))
                yield Batch(
                    inputs,
                    inputs["attention_mask"].bool(),
                    [usable[row].label for row in rows],
                    [usable[row].key for row in rows],
                    sum(truncated[row] for row in rows),
                )

    def _tokenize(self, samples: Sequence[Sample]) -> tuple[list[dict[str, list[int]]], list[bool]]:
        """The tokens of each sample by input name, and which samples were cut."""
        tokens = self._call(samples, truncation=False)
        truncated = [len(row["input_ids"]) > self.max_length for row in tokens]
        long = [index for index, cut in enumerate(truncated) if cut]
        for index, row in zip(long, self._call([samples[i] for i in long], truncation=True), strict=True):
            tokens[index] = row
        return tokens, truncated

    def _call(self, samples: Sequence[Sample], *, truncation: bool) -> list[dict[str, list[int]]]:
        if not samples:
            return []
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
        return [{name: rows[index] for name, rows in encoded.items()} for index in range(len(samples))]

    def _prepared(self, text: str) -> str:
        return text.lower() if self.lower_case else text


def _problem(sample: Sample, paired: bool) -> str | None:
    texts = {"text": sample.text or ""} | ({"second text": sample.text_pair or ""} if paired else {})
    for name, text in texts.items():
        if not text.strip():
            return f"has no {name}"
        if (found := re.search(r"[\ud800-\udfff]", text)) is not None:
            return f"has half a character (\\u{ord(found[0]):04x}) in its {name}"
    return None
