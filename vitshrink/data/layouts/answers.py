"""Questions, contexts, and the answers that stand in these: for extractive question answering."""

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitshrink.data.columns import Columns, named_column
from vitshrink.data.layouts.layout import Layout, text
from vitshrink.data.samples import Answers, Sample
from vitshrink.data.tables import Table
from vitshrink.data.text_files import read_text, text_suffix
from vitshrink.errors import DataError

CONTEXTS = ("context", "passage", "paragraph", "document")


class Questions(Layout):
    """A row a question, as the data set libraries have SQuAD, or the nested JSON that SQuAD is published in."""

    labels_are = "answers"
    first = ("question", "query")
    labels = ("answers", "answer", "answer_text")

    def table(self, path: Path) -> Table | None:
        """The published form: articles of paragraphs of questions; or rows under ``data``."""
        if text_suffix(path) != ".json":
            return None
        try:
            content = json.loads(read_text(path))
        except ValueError:
            return None  # told better where tables are read
        articles = content.get("data") if isinstance(content, dict) else None
        if not isinstance(articles, list) or not all(isinstance(each, dict) for each in articles):
            return None
        if not any("paragraphs" in each for each in articles):
            columns = list(dict.fromkeys(name for each in articles for name in each))
            return Table(columns, [[each.get(name) for name in columns] for each in articles])
        return Table(["question", "context", "answers"], list(_questions(path, articles)))

    def columns(self, source: str, available: Sequence[str], wanted: Columns) -> Columns:
        found = super().columns(source, available, wanted)
        pair = named_column(source, available, wanted.text_pair, CONTEXTS, wanted.flags, "text-pair")
        return replace(found, text_pair=pair)

    def sample(self, key: str, row: Mapping[str, Any], columns: Columns, names: Sequence[str] | None) -> Sample:  # noqa: ARG002
        question, context = text(row, columns.text), text(row, columns.text_pair)
        given = None if columns.label is None else row[columns.label]
        if given is None or given != given:
            return Sample(key, text=question, text_pair=context)
        return Sample(key, text=question, text_pair=context, label=_answers(given, context, columns.label))


QUESTIONS = Questions()


def _questions(path: Path, articles: Sequence[Mapping[str, Any]]) -> Iterator[list[Any]]:
    """Raises DataError, which names the article."""
    for number, article in enumerate(articles, start=1):
        try:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    answers = [] if asked.get("is_impossible") else asked.get("answers")
                    yield [asked["question"], paragraph["context"], answers]
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, article {number}: expected paragraphs with a context and questions, as in SQuAD ({error})."
            ) from error


def _answers(given: Any, context: str, column: str | None) -> Answers:
    """Raises ValueError for what is no answer, or does not stand in the context."""
    if isinstance(given, str) and given.strip().startswith(("{", "[")):
        try:
            given = ast.literal_eval(given.strip())
        except (ValueError, SyntaxError):
            raise ValueError(f"column {column!r} contains {given[:40]!r}, which is not an answer") from None
    if isinstance(given, Mapping) and not isinstance(given.get("text"), str):
        found, starts = (_list(given.get(name)) for name in ("text", "answer_start"))
        if starts and len(starts) != len(found):
            raise ValueError(f"column {column!r} has {len(found)} answers, but {len(starts)} numbers in answer_start")
        places = starts or [None] * len(found)
        given = [{"text": each, "answer_start": start} for each, start in zip(found, places, strict=True)]
    pairs = [_answer(each, column) for each in (given if isinstance(given, list | tuple) else [given])]
    for each, start in pairs:
        if each not in context:
            raise ValueError(f"the answer {each[:60]!r} does not occur in the context: copy it from there")
        if start is not None and (start < 0 or not context.startswith(each, start)):
            raise ValueError(
                f"the answer {each[:60]!r} does not begin at character {start} of the context, but at "
                f"{context.index(each)}: correct answer_start, which counts from 0, or leave it out"
            )
    texts = tuple(each for each, _ in pairs if each)
    if not texts:
        return Answers(context, ())
    first, start = next(pair for pair in pairs if pair[0])
    return Answers(context, texts, context.index(first) if start is None else start)


def _list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [] if given is None else [given]


def _answer(given: Any, column: str | None) -> tuple[str, int | None]:
    found, start = (given.get("text"), given.get("answer_start")) if isinstance(given, Mapping) else (given, None)
    if not isinstance(found, str) or not isinstance(start, int | None):
        raise ValueError(f"column {column!r} contains {str(given)[:40]!r}, which is not an answer")
    return found, start
