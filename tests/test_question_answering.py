"""Extractive question answering: data as SQuAD has them, its rules, and all jobs."""

import json
from pathlib import Path
from typing import Any

import heads
import pytest
import tiny
import torch
from heads import (
    assert_a_bound_is_kept,
    assert_training_helps,
    compressed_and_measured,
    evaluated,
    read_alone_and_together,
    refused,
    run,
    write_lines,
)
from torch import Tensor

from vitshrink import load
from vitshrink.data import Preprocessor, open_samples
from vitshrink.data.samples import Answers
from vitshrink.evaluation.answer_rows import _scores, best_span, normalized, whole_contexts
from vitshrink.models.fidelity import OUTSIDE, SPANS, measured
from vitshrink.models.readings import reading_of
from vitshrink.recovery.training_set import _ends

NAME = "BertForQuestionAnswering"
Row = dict[str, Any]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT that answers, and differently from question to question."""
    return heads.write_varied(NAME, tmp_path_factory.mktemp("reader") / "model", "qa_outputs")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """48 questions, whose answers are the second and third word of their contexts."""
    lines = tiny.write_text(tmp_path_factory.mktemp("texts") / "texts.txt", 96).read_text().splitlines()
    found = []
    for question, context in zip(lines[::2], lines[1::2], strict=True):
        words = context.split()
        answer = " ".join(words[1:3])
        found.append(
            {
                "question": f"{question}?",
                "context": context,
                "answers": {"text": [answer], "answer_start": [len(words[0]) + 1]},
            }
        )
    return found


def write_squad(path: Path, rows: list[Row]) -> Path:
    """As SQuAD is published: each context with its question."""
    paragraphs = []
    for number, row in enumerate(rows):
        given = row["answers"]
        pairs = zip(given["text"], given["answer_start"], strict=True)
        answers = [{"text": text, "answer_start": start} for text, start in pairs]
        asked = {"id": str(number), "question": row["question"], "answers": answers, "is_impossible": not answers}
        paragraphs.append({"context": row["context"], "qas": [asked]})
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "A", "paragraphs": paragraphs}]}))
    return path


def write_parquet(path: Path, rows: list[Row]) -> Path:
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


WAYS: dict[str, Any] = {
    "JSON lines": lambda d, rows: write_lines(d / "a.jsonl", rows),
    "published": lambda d, rows: write_squad(d / "dev-v1.1.json", rows),
    "parquet": lambda d, rows: write_parquet(d / "a.parquet", rows),
    "one answer": lambda d, rows: write_lines(
        d / "a.jsonl",
        [row | {"answers": {name: each[0] for name, each in row["answers"].items()}} for row in rows],
    ),
    "texts alone": lambda d, rows: write_lines(
        d / "a.jsonl", [row | {"answers": row["answers"]["text"][0]} for row in rows]
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_answers_gives_the_same_scores(
    way: str, reader: Path, rows: list[Row], tmp_path: Path
) -> None:
    found = evaluated(reader, WAYS[way](tmp_path, rows))
    assert found["metric"] == "answer_f1"
    exact, shared = by_hand(reader, rows)
    assert found["dense"]["answer_exact"] == pytest.approx(exact)
    assert found["dense"]["answer_f1"] == pytest.approx(shared)
    assert 0 < shared < 1
    low, high = found["dense"]["interval"]
    assert low <= shared <= high


def by_hand(directory: Path, rows: list[Row]) -> tuple[float, float]:
    """Exact match and F1 of answers found by going through all spans."""
    import transformers

    tokenizer, model = transformers.AutoTokenizer.from_pretrained(directory), load(directory)
    exact, shared = [], []
    for row in rows:
        encoded = tokenizer(row["question"], row["context"], return_tensors="pt", return_offsets_mapping=True)
        offsets = encoded.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            outputs = model(**encoded)
        context = [index for index, part in enumerate(encoded.sequence_ids(0)) if part == 1]
        spans = [(i, j) for i in context for j in context if i <= j < i + 30]
        first, last = max(
            spans, key=lambda span: float(outputs.start_logits[0, span[0]] + outputs.end_logits[0, span[1]])
        )
        text = row["context"][offsets[first][0] : offsets[last][1]]
        words, right = normalized(text), normalized(row["answers"]["text"][0])
        both = sum(min(words.count(word), right.count(word)) for word in set(words))
        exact.append(words == right)
        shared.append(2 * both / (len(words) + len(right)) if words and right else float(words == right))
    return sum(exact) / len(exact), sum(shared) / len(shared)


@pytest.mark.parametrize(
    ("given", "right", "exact", "f1"),
    [
        ("The Eiffel Tower!", ("eiffel tower",), True, 1.0),
        ("in the city of Paris", ("Paris", "the city of Paris"), False, 6 / 7),
        ("a cat", ("dog",), False, 0.0),
        ("", (), True, 1.0),
        ("Paris", (), False, 0.0),
        ("to be or not", ("to be to be",), False, 0.5),
    ],
)
def test_answers_are_compared_by_the_rules_of_squad(given: str, right: tuple[str, ...], exact: bool, f1: float) -> None:
    found = _scores(given, Answers("", right))
    assert found == (exact, pytest.approx(f1))


def test_the_best_span_is_the_likeliest_that_is_possible() -> None:
    starts, ends = torch.tensor([9.0, 0, 5, 1, 0]), torch.tensor([9.0, 6, 0, 2, 1])
    assert best_span(starts, ends, 0) == (2, 3, 7.0, 18.0)  # 5 + 2, and 6 stands before 5
    assert best_span(starts, ends, 0, most=1) == (1, 1, 6.0, 18.0)
    assert best_span(starts, ends, None)[:2] == (0, 0)


def test_an_answer_is_that_of_the_likeliest_window_or_none_that_all_windows_prefer() -> None:
    columns = {
        "dense.given": torch.tensor([[0, 3], [9, 12], [4, 8]]),
        "dense.score": torch.tensor([1.0, 3.0, 2.0]),
        "dense.none": torch.tensor([9.0, 2.0, 5.0]),
        "dense.exact": torch.tensor([False, True, False]),
        "dense.answer_f1": torch.tensor([0.0, 1.0, 0.5]),
        "dense.none_exact": torch.tensor([False, False, True]),
        "dense.none_answer_f1": torch.tensor([0.0, 0.0, 1.0]),
    }
    keys, found = whole_contexts(["a", "a", "b"], columns, unanswerable=False)
    assert (keys, found["dense.answer_f1"].tolist()) == (["a", "b"], [1.0, 0.5])
    assert whole_contexts(["a", "a", "b"], columns, unanswerable=True)[1]["dense.answer_f1"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("place", [0, 60, 118])
def test_a_long_context_is_read_in_windows(place: int, reader: Path, tmp_path: Path) -> None:
    """Each window is read as if it were alone, and one of them has the answer."""
    words = ["film"] * 120
    words[place : place + 2] = ["so", "bad"]
    context = " ".join(words)
    row = {"question": "is it so?", "context": context, "answers": {"text": ["so bad"], "answer_start": [5 * place]}}
    samples = open_samples(str(write_lines(tmp_path / "a.jsonl", [row])), "text", layout="question-answering")
    preprocessor = Preprocessor.from_checkpoint(reader, "text", task="question-answering")
    windows = preprocessor.windows(samples)
    assert len(windows) > 2
    assert {sample.key for sample in windows.samples} == {"row 1"}
    assert any("so bad" in (sample.text_pair or "") for sample in windows.samples)
    covered = set()
    for batch in preprocessor.batches(windows, 4):
        assert not batch.truncated
        assert batch.places is not None
        for places in batch.places.tolist():
            covered |= {(start, end) for start, end in places if end > 0}
            assert all(context[start:end].strip() == context[start:end] for start, end in places if end > 0)
    assert "".join(context[start:end] for start, end in sorted(covered)) == context.replace(" ", "")
    assert evaluated(reader, tmp_path / "a.jsonl")["samples"] == 1


def spread(count: int, tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 2 * tokens, generator=generator, dtype=torch.float64)
    rows[:, [0, tokens - 1, tokens]] = OUTSIDE
    return rows


def test_the_probe_is_the_second_derivative_where_answers_may_be_and_nothing_elsewhere() -> None:
    dense = spread(1, 4, 0)[0]
    hessian = torch.func.hessian(lambda other: SPANS.divergence(dense[None], other[None])[0])(dense)
    v = SPANS.probe(dense.expand(60_000, 8), torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(v.T @ v / len(v), hessian, rtol=0, atol=0.02)
    assert (v[:, dense == OUTSIDE] == 0).all()
    other = spread(1, 4, 1)
    assert measured(SPANS, dense[None], other) > 0
    assert measured(SPANS, dense[None], dense[None]) == 0
    assert 0 < float(SPANS.spread(dense[None])) < 3


def test_padding_and_questions_change_no_divergence(reader: Path, rows: list[Row], tmp_path: Path) -> None:
    model, together = read_alone_and_together(reader, write_lines(tmp_path / "a.jsonl", rows[:6]), SPANS, 6)
    found = reading_of(model).rows(model(**together.inputs), together)
    words = [len(row["context"].split()) for row in rows[:6]]
    assert (found > OUTSIDE).sum(1).tolist() == [2 * (count + 1) for count in words]


def test_the_ends_that_are_learned_are_those_of_the_answer(reader: Path, rows: list[Row], tmp_path: Path) -> None:
    data = open_samples(str(write_lines(tmp_path / "a.jsonl", rows)), "text", layout="question-answering")
    preprocessor = Preprocessor.from_checkpoint(reader, "text", task="question-answering")
    for batch in preprocessor.batches(data, 8):
        assert batch.places is not None
        for answers, places in zip(batch.labels, batch.places, strict=True):
            assert isinstance(answers, Answers)
            first, last = _ends(answers, places)
            assert answers.context[int(places[first, 0]) : int(places[last, 1])] == answers.texts[0]
            assert _ends(Answers(answers.context, ()), places) == (0, 0)


def test_a_question_without_an_answer_may_be_left_open(reader: Path, rows: list[Row], tmp_path: Path) -> None:
    nothing = {"text": [], "answer_start": []}
    data = write_squad(tmp_path / "dev-v2.0.json", [*rows[:24], *(row | {"answers": nothing} for row in rows[24:])])
    found = json.loads(run("eval", reader, "--data", data, "--json"))["evaluation"]
    assert 0 < found["dense"]["answer_exact"] < 1


def test_long_contexts_are_cut_and_long_questions_too(reader: Path, tmp_path: Path) -> None:
    row = {"question": "good film " * 50, "context": "so the film was good " * 20, "answers": "film was"}
    text = run("eval", reader, "--data", write_lines(tmp_path / "a.jsonl", [row, row]))
    assert "F1" in text


@pytest.mark.parametrize("method", ["svd", "whitened", "curvature"])
def test_a_whole_job_ends_in_a_model_that_is_measured_the_same(
    method: str, reader: Path, rows: list[Row], tmp_path: Path
) -> None:
    small = tmp_path / "small"
    found = compressed_and_measured(reader, write_lines(tmp_path / "a.jsonl", rows), small, "--method", method)
    assert found["difference"]["test"] == "sign flips, sample by sample"
    assert "AutoModelForQuestionAnswering" in (small / "README.md").read_text()


@pytest.mark.parametrize("bound", [("--max-kl", 1), ("--max-changed", 60), ("--max-accuracy-drop", 20)])
def test_every_bound_is_kept(bound: tuple[str, float], reader: Path, rows: list[Row], tmp_path: Path) -> None:
    assert_a_bound_is_kept(reader, write_lines(tmp_path / "a.jsonl", rows), tmp_path / "small", *bound)


@pytest.mark.parametrize("objective", ["distill", "supervised"])
def test_training_makes_the_held_out_loss_smaller(
    objective: str, reader: Path, rows: list[Row], tmp_path: Path
) -> None:
    assert_training_helps(objective, reader, write_lines(tmp_path / "a.jsonl", rows * 2), tmp_path)


@pytest.mark.slow
def test_the_exported_model_is_scored_as_the_checkpoint_is(reader: Path, rows: list[Row], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    data = write_lines(tmp_path / "a.jsonl", rows)
    run("compress", reader, tmp_path / "small", "--keep", 0.8, "--method", "svd")
    run("export", tmp_path / "small", tmp_path / "onnx", "--to", "onnx")
    command = ("eval", tmp_path / "onnx" / "model.onnx", "--baseline", tmp_path / "small", "--data", data, "--json")
    found = json.loads(run(*command))["evaluation"]
    assert found["fidelity"]["agreement"] == 1
    assert found["fidelity"]["kl"] < 1e-6


FAULTS: dict[str, tuple[Row, str]] = {
    "another answer": (
        {"question": "so?", "context": "the film", "answers": "the cat"},
        "row 1: the answer 'the cat' does not occur in the context",
    ),
    "another place": (
        {"question": "so?", "context": "the film", "answers": {"text": ["film"], "answer_start": [1]}},
        "row 1: the answer 'film' does not begin at character 1 of the context, but at 4: correct answer_start",
    ),
    "before the context": (
        {"question": "so?", "context": "the film", "answers": {"text": "film", "answer_start": -4}},
        "row 1: the answer 'film' does not begin at character -4 of the context, but at 4",
    ),
    "places of others": (
        {"question": "so?", "context": "the film", "answers": {"text": ["film"], "answer_start": [4, 0]}},
        "row 1: column 'answers' has 1 answers, but 2 numbers in answer_start",
    ),
    "no context": (
        {"question": "so?", "answers": "film"},
        "no column looks like the text-pair. Give --text-pair-column",
    ),
    "a number": (
        {"question": "so?", "context": "the film", "answers": 3},
        "row 1: column 'answers' contains '3', which is not an answer",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named_with_its_row(fault: str, reader: Path, tmp_path: Path) -> None:
    row, message = FAULTS[fault]
    assert message in refused(reader, write_lines(tmp_path / "a.jsonl", [row]))
