"""Byte-level BPE tokenizers, as RoBERTa's: a word at the beginning of a text is another token than inside it."""

from collections.abc import Callable
from pathlib import Path

import kinds
import pytest
import tiny
import transformers
from heads import evaluated, run, write_lines

from vitshrink.data import Preprocessor, open_samples

Written = Callable[..., Path]

TEXT = "the good film was not so bad"


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """A tiny RoBERTa with the given head, and its tokenizer."""

    def write(head: str, *, add_prefix_space: bool = False, **entries: object) -> Path:
        numbers = {"vocab_size": kinds.BYTES_VOCABULARY, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
        directory = tmp_path / "model"
        kinds.build(f"RobertaFor{head}", **numbers | entries).save_pretrained(directory)
        return kinds.write_bytes_tokenizer(directory, add_prefix_space=add_prefix_space)

    return write


@pytest.mark.parametrize("add_prefix_space", [True, False])
def test_words_are_tagged_at_their_first_token(written: Written, add_prefix_space: bool, tmp_path: Path) -> None:
    model = written("TokenClassification", add_prefix_space=add_prefix_space)
    words = TEXT.split()
    data = write_lines(tmp_path / "a.jsonl", [{"tokens": words, "ner_tags": ["O"] * len(words)}])
    samples = open_samples(str(data), "text", layout="token-classification")
    preprocessor = Preprocessor.from_checkpoint(model, "text", task="token-classification")
    (batch,) = preprocessor.batches(samples, 4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    expected = tokenizer(words, is_split_into_words=True)["input_ids"]
    assert batch.inputs["input_ids"][0].tolist() == expected
    assert batch.places is not None
    starts = [int(place) for place in batch.places[0, :, 0] if place >= 0]
    assert starts == list(range(len(words)))
    running = tokenizer(TEXT)["input_ids"]
    assert (expected == running) is add_prefix_space  # what the checkpoint was trained with is kept


def test_an_answer_is_the_text_of_its_tokens_without_the_blank_before_it(written: Written, tmp_path: Path) -> None:
    model = written("QuestionAnswering")
    rows = [{"question": "so?", "context": TEXT, "answers": {"text": ["good film"], "answer_start": [4]}}]
    samples = open_samples(str(write_lines(tmp_path / "a.jsonl", rows)), "text", layout="question-answering")
    (batch,) = Preprocessor.from_checkpoint(model, "text", task="question-answering").batches(samples, 4)
    assert batch.places is not None
    places = [TEXT[start:end] for start, end in batch.places[0].tolist() if start >= 0 and end > 0]
    assert all(part == part.strip() for part in places)
    assert "".join(places) == TEXT.replace(" ", "")


@pytest.mark.parametrize("head", ["TokenClassification", "MaskedLM"])
def test_a_whole_job_and_its_evaluation(head: str, written: Written, tmp_path: Path) -> None:
    model, data = written(head, add_prefix_space=True), tiny.write_text(tmp_path / "texts.txt", 24)
    flags = ("--samples", 8, "--holdout", 8, "--batch-size", 4, "--keep", 0.8)
    run("compress", model, tmp_path / "small", "--calibration", data, *flags)
    assert 0 <= evaluated(tmp_path / "small", data, "--baseline", model)["fidelity"]["kl"] < 2
