"""One batch through models that answer questions by a part of a text, scored by the rules of SQuAD."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitshrink.data.samples import Answers
from vitshrink.errors import DataError
from vitshrink.evaluation.rows import Batch, Columns, LabelOf, Step, finite, forward, mapped
from vitshrink.models.fidelity import SPANS, measured
from vitshrink.models.readings import Ends

MOST_TOKENS = 30
"""Of an answer, as in the examples of transformers."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class _Answered:
    batch: Batch
    answers_of: LabelOf | None

    def outputs(self, role: str, model: nn.Module) -> Tensor:
        return finite(role, Ends().rows(forward(model, self.batch.inputs), self.batch), self.batch.keys)

    def columns(self, outputs: Mapping[str, Tensor]) -> Columns:
        """Of windows: ``whole_contexts`` makes of them what is known of samples."""
        columns: Columns = {"units": torch.ones(len(self.batch.keys), dtype=torch.long)}
        truth = None if self.answers_of is None else self._truth(self.answers_of)
        for role, rows in outputs.items():
            spans = self._spans(rows)
            ranges = [self._range(row, span) for row, span in enumerate(spans)]
            columns[f"{role}.given"] = torch.tensor(ranges)
            columns[f"{role}.score"] = torch.tensor([span.score for span in spans], dtype=torch.float64)
            columns[f"{role}.none"] = torch.tensor([span.none for span in spans], dtype=torch.float64)
            if truth is not None:
                self._require_places()
                texts = [each.context[start:end] for each, (start, end) in zip(truth, ranges, strict=True)]
                columns |= _columns(role, "", map(_scores, texts, truth))
                columns |= _columns(role, "none_", (_scores("", each) for each in truth))
        if len(outputs) == 2:
            dense, compressed = outputs["dense"], outputs["compressed"].to(outputs["dense"].device)
            columns["kl"] = measured(SPANS, dense, compressed)
        return columns

    def _spans(self, rows: Tensor) -> list["Span"]:
        """The best answer in each window."""
        starts, ends = rows.double().cpu().chunk(2, -1)
        first = self._first_asked(starts)
        return [best_span(*each) for each in zip(starts, ends, first, strict=True)]

    def _range(self, row: int, span: "Span") -> tuple[int, int]:
        """The characters of the context that an answer is; its tokens, where nobody knows."""
        places: Tensor | None = getattr(self.batch, "places", None)
        if places is None:
            return span.first, span.last
        return int(places[row, span.first, 0]), int(places[row, span.last, 1])

    def _require_places(self) -> None:
        if getattr(self.batch, "places", None) is None:
            raise DataError(
                "question answering needs the token positions of the context, and the batch does not have them."
            )

    def _first_asked(self, starts: Tensor) -> list[int | None]:
        """The token that stands for no answer, where there is one."""
        places: Tensor | None = getattr(self.batch, "places", None)
        if places is None:
            return [None] * len(starts)
        empty = (places[..., 0] == 0) & (places[..., 1] == 0)
        return [int(row.nonzero()[0]) if row.any() else None for row in empty]

    def _truth(self, answers_of: LabelOf) -> list[Answers]:
        found = mapped(self.batch, answers_of)
        for key, answers in zip(self.batch.keys, found, strict=True):
            if not isinstance(answers, Answers):
                raise DataError(f"{key}: it has no answers, but others have some.")
        return found


def answer_step(answers_of: LabelOf | None) -> Step:
    """For extractive question answering; answers are ``Answers``."""
    return lambda batch: _Answered(batch, answers_of)


class Span(NamedTuple):
    """A part of a text, by its first and last token."""

    first: int
    last: int
    score: float
    """Sum of the logits of both ends."""
    none: float
    """The same of the token that stands for no answer; -inf where there is none."""


def best_span(starts: Tensor, ends: Tensor, nothing: int | None, most: int = MOST_TOKENS) -> Span:
    """The likeliest answer of at most so many tokens, from logits (tokens,) of its beginning and its end.

    ``nothing`` is the token that stands for no answer.
    """
    starts, ends = starts.clone(), ends.clone()
    none = -torch.inf if nothing is None else float(starts[nothing] + ends[nothing])
    if nothing is not None:
        starts[nothing] = ends[nothing] = -torch.inf
    scores = starts[:, None] + ends[None]
    possible = torch.ones_like(scores, dtype=torch.bool).triu().tril(most - 1)
    scores = scores.masked_fill(~possible, -torch.inf)
    best = int(scores.argmax())
    return Span(best // len(starts), best % len(starts), float(scores.max()), none)


def whole_contexts(keys: Sequence[str], columns: Columns, *, unanswerable: bool) -> tuple[list[str], Columns]:
    """From the rows of windows, those of one sample side by side, to the rows of samples.

    The answer is that of the window whose ends are likeliest or, where questions may be ``unanswerable``, none: if that
    is likelier in every window. Divergences are means over the windows.
    """
    samples = list(dict.fromkeys(keys))
    owner = torch.tensor([{key: row for row, key in enumerate(samples)}[key] for key in keys])
    windows = [(owner == row).nonzero()[:, 0] for row in range(len(samples))]
    found: Columns = {"units": torch.ones(len(samples), dtype=torch.long)}
    for role in [role for role in ("dense", "compressed") if f"{role}.score" in columns]:
        score, none = columns[f"{role}.score"], columns[f"{role}.none"]
        best = torch.stack([rows[score[rows].argmax()] for rows in windows])
        refused = torch.stack([none[rows].min() for rows in windows]) > score[best]
        refused &= unanswerable
        found[f"{role}.given"] = columns[f"{role}.given"][best].masked_fill(refused[:, None], 0)
        for name in ("exact", "answer_f1"):
            if f"{role}.{name}" in columns:
                given, nothing = columns[f"{role}.{name}"][best], columns[f"{role}.none_{name}"][best]
                found[f"{role}.{name}"] = torch.where(refused, nothing, given)
    if "kl" in columns:
        found["kl"] = torch.stack([columns["kl"][rows].mean() for rows in windows])
        found["agreement"] = (found["dense.given"] == found["compressed.given"]).all(1)
    return samples, {name: rows for name, rows in found.items() if not name.endswith(".given")}


def _columns(role: str, prefix: str, scores: Iterable[tuple[bool, float]]) -> Columns:
    exact, shared = zip(*scores, strict=True)
    return {
        f"{role}.{prefix}exact": torch.tensor(exact, dtype=torch.bool),
        f"{role}.{prefix}answer_f1": torch.tensor(shared, dtype=torch.float64),
    }


def normalized(answer: str) -> list[str]:
    """The words of an answer as SQuAD compares them: in lower case, without punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", answer.lower().translate(_PUNCTUATION)).split()


def _scores(given: str, truth: Answers) -> tuple[bool, float]:
    """Exact match and F1, by the answer that fits best; no answer is right where there is none."""
    right = [words for words in map(normalized, truth.texts) if words] or [[]]
    found = normalized(given)
    return found in right, max(_f1(found, each) for each in right)


def _f1(found: Sequence[str], right: Sequence[str]) -> float:
    if not found or not right:
        return float(found == right)
    shared = sum((Counter(found) & Counter(right)).values())
    return 2 * shared / (len(found) + len(right))
