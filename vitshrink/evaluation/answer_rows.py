"""One batch through models that answer questions by a part of a text, scored by the rules of SQuAD."""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    unanswerable: bool
    """Whether some question of the data has no answer: a model may then give none."""

    def outputs(self, role: str, model: nn.Module) -> Tensor:
        return finite(role, Ends().rows(forward(model, self.batch.inputs), self.batch), self.batch.keys)

    def columns(self, outputs: Mapping[str, Tensor]) -> Columns:
        spans = {role: self._spans(rows) for role, rows in outputs.items()}
        columns: Columns = {"units": torch.ones(len(self.batch.keys), dtype=torch.long)}
        if self.answers_of is not None:
            truth = self._truth(self.answers_of)
            for role, found in spans.items():
                scores = [_scores(*each) for each in zip(self._texts(found, truth), truth, strict=True)]
                exact, shared = zip(*scores, strict=True)
                columns[f"{role}.exact"] = torch.tensor(exact, dtype=torch.bool)
                columns[f"{role}.answer_f1"] = torch.tensor(shared, dtype=torch.float64)
        if len(outputs) == 2:
            dense, compressed = outputs["dense"], outputs["compressed"].to(outputs["dense"].device)
            columns["agreement"] = torch.tensor(
                [one == other for one, other in zip(spans["dense"], spans["compressed"], strict=True)]
            )
            columns["kl"] = measured(SPANS, dense, compressed)
        return columns

    def _spans(self, rows: Tensor) -> list[tuple[int, int]]:
        """First and last token of the best answer of each sample; the first token alone is no answer."""
        starts, ends = rows.double().cpu().chunk(2, -1)
        first = self._first_asked(starts)
        pairs = zip(starts, ends, first, strict=True)
        return [best_span(*pair, none_allowed=self.unanswerable) for pair in pairs]

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
                raise DataError(f"{key}: it has no answers, while others have some.")
        return found

    def _texts(self, spans: Sequence[tuple[int, int]], truth: Sequence[Answers]) -> list[str]:
        places: Tensor | None = getattr(self.batch, "places", None)
        if places is None:
            raise DataError("answers are parts of a text, and the batch does not say where its tokens stand in it.")
        ranges = [
            (int(place[first, 0]), int(place[last, 1])) for place, (first, last) in zip(places, spans, strict=True)
        ]
        return [each.context[start:end] for each, (start, end) in zip(truth, ranges, strict=True)]


def answer_step(answers_of: LabelOf | None, *, unanswerable: bool) -> Step:
    """For extractive question answering; answers are ``Answers``."""
    return lambda batch: _Answered(batch, answers_of, unanswerable)


def best_span(
    starts: Tensor, ends: Tensor, nothing: int | None, *, none_allowed: bool, most: int = MOST_TOKENS
) -> tuple[int, int]:
    """The likeliest first and last token, from logits (tokens,) of both, of an answer of at most so many tokens.

    ``nothing`` is the token that stands for no answer, which is given where it is allowed and likelier.
    """
    starts, ends = starts.clone(), ends.clone()
    none = -torch.inf if nothing is None else float(starts[nothing] + ends[nothing])
    if nothing is not None:
        starts[nothing] = ends[nothing] = -torch.inf
    scores = starts[:, None] + ends[None]
    possible = torch.ones_like(scores, dtype=torch.bool).triu().tril(most - 1)
    scores = scores.masked_fill(~possible, -torch.inf)
    best = int(scores.argmax())
    if none_allowed and nothing is not None and none > float(scores.max()):
        return nothing, nothing
    return best // len(starts), best % len(starts)


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
