"""Multiple choice: texts with several choices, read side by side, in all jobs."""

from pathlib import Path
from typing import Any

import heads
import pytest
import tiny
import torch
import transformers
from heads import (
    assert_a_bound_is_kept,
    assert_training_helps,
    compressed_and_measured,
    evaluated,
    read_alone_and_together,
    refused,
    write_lines,
)

import vitshrink
from vitshrink import load
from vitshrink.errors import DataError
from vitshrink.models.fidelity import SOFTMAX

NAME = "BertForMultipleChoice"
Row = dict[str, Any]


@pytest.fixture(scope="module")
def chooser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return heads.write_varied(NAME, tmp_path_factory.mktemp("chooser") / "model", "classifier")


@pytest.fixture(scope="module")
def rows(chooser: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """48 questions with three choices; the label is what the model chooses, but for every fourth."""
    lines = tiny.write_text(tmp_path_factory.mktemp("texts") / "texts.txt", 192).read_text().splitlines()
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(chooser), load(chooser)
    found = []
    for number in range(48):
        question, *choices = lines[4 * number : 4 * number + 4]
        encoded = tokenizer([question] * 3, choices, padding=True, return_tensors="pt")
        with torch.no_grad():
            chosen = int(model(**{name: tensor[None] for name, tensor in encoded.items()}).logits.argmax())
        found.append({"question": question, "choices": choices, "label": (chosen + (number % 4 == 0)) % 3})
    return found


WAYS: dict[str, Any] = {
    "numbers": lambda row: row,
    "letters": lambda row: row | {"label": "ABC"[row["label"]]},
    "texts": lambda row: row | {"label": row["choices"][row["label"]]},
    "marked": lambda row: {
        "question": row["question"],
        "choices": {"text": row["choices"], "label": ["1", "2", "3"]},
        "answerKey": str(row["label"] + 1),
    },
    "columns": lambda row: {
        "sent1": row["question"],
        **{f"ending{index}": each for index, each in enumerate(row["choices"])},
        "label": row["label"],
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_choices_gives_the_same_accuracy(
    way: str, chooser: Path, rows: list[Row], tmp_path: Path
) -> None:
    data = write_lines(tmp_path / "a.jsonl", [WAYS[way](row) for row in rows])
    found = evaluated(chooser, data)
    assert found["metric"] == "top1"
    assert found["dense"]["correct"] == 36


def test_padding_changes_no_divergence_and_a_functional_is_one_a_sample(
    chooser: Path, rows: list[Row], tmp_path: Path
) -> None:
    data = write_lines(tmp_path / "a.jsonl", rows[:6])
    _, together = read_alone_and_together(chooser, data, SOFTMAX, 6)
    assert together.inputs["input_ids"].shape[:2] == (6, 3)


@pytest.mark.parametrize("options", [("--method", "whitened"), ("--method", "curvature"), ("--allocation", "measured")])
def test_a_whole_job_ends_in_a_model_that_is_measured_the_same(
    options: tuple[str, ...], chooser: Path, rows: list[Row], tmp_path: Path
) -> None:
    data = write_lines(tmp_path / "a.jsonl", rows)
    found = compressed_and_measured(chooser, data, tmp_path / "small", *options)
    assert 0 < found["fidelity"]["kl"] < 3


@pytest.mark.parametrize("bound", [("--max-kl", 0.5), ("--max-accuracy-drop", 40)])
def test_every_bound_is_kept(bound: tuple[str, float], chooser: Path, rows: list[Row], tmp_path: Path) -> None:
    assert_a_bound_is_kept(chooser, write_lines(tmp_path / "a.jsonl", rows), tmp_path / "small", *bound)


@pytest.mark.parametrize("objective", ["distill", "supervised"])
def test_training_makes_the_held_out_loss_smaller(
    objective: str, chooser: Path, rows: list[Row], tmp_path: Path
) -> None:
    assert_training_helps(objective, chooser, write_lines(tmp_path / "a.jsonl", rows * 2), tmp_path)


def test_choices_in_memory_are_as_good_as_those_of_a_file(chooser: Path, rows: list[Row], tmp_path: Path) -> None:
    model, tokenizer = load(chooser), transformers.AutoTokenizer.from_pretrained(chooser)
    pairs = [(row["question"], row["choices"]) for row in rows]
    settings: dict[str, Any] = {"keep": 0.8, "samples": 16, "holdout": 8, "processor": tokenizer}
    small = vitshrink.compress(model, pairs, **settings)
    named = vitshrink.compress(model, str(write_lines(tmp_path / "a.jsonl", rows)), **settings)
    for one, other in zip(small.model.parameters(), named.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(DataError, match=r"item 1 .*not a text with choices"):
        vitshrink.compress(model, [pairs[0], ("so?", "a film")], **settings)


FAULTS: dict[str, tuple[list[Row], str]] = {
    "no such choice": (
        [{"question": "so?", "choices": ["a", "film"], "label": 2}],
        "row 1: the label '2' is not one of the 2 choices",
    ),
    "one choice": ([{"question": "so?", "choices": ["a"], "label": 0}], "row 1: 1 choices: at least two"),
    "others": (
        [
            {"question": "so?", "choices": ["a", "film"], "label": 0},
            {"question": "so?", "choices": ["a", "film", "so"], "label": 0},
        ],
        "row 2: 3 choices, but row 1 has 2: every sample needs",
    ),
    "no choices": ([{"question": "so?", "label": 0}], "no column looks like the text-pair"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named_with_its_row(fault: str, chooser: Path, tmp_path: Path) -> None:
    rows, message = FAULTS[fault]
    assert message in refused(chooser, write_lines(tmp_path / "a.jsonl", rows))
