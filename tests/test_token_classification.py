"""Token classifiers: words and their tags, entities, and all jobs on them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    write_varied,
)

from vitshrink import load
from vitshrink.evaluation.entities import entities
from vitshrink.models.fidelity import SOFTMAX
from vitshrink.models.readings import reading_of

NAME = "BertForTokenClassification"
Sentences = list[tuple[list[str], list[str]]]


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT whose tags differ from word to word."""
    directory = write_varied(NAME, tmp_path_factory.mktemp("tagger") / "model", "classifier")
    model = load(directory)
    with torch.no_grad():
        model.classifier.bias.sub_(model(**tiny.inputs(NAME, batch=64)).logits.flatten(0, 1).median(0).values)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def sentences(tagger: Path, tmp_path_factory: pytest.TempPathFactory) -> Sentences:
    """48 sentences with the tags that the tagger gives their words, every seventh word another one."""
    file = tiny.write_text(tmp_path_factory.mktemp("texts") / "texts.txt", 48)
    words = [[*line.split()[:-1], f"{line.split()[-1]}xyz"] for line in file.read_text().splitlines()]
    found = predicted(tagger, words)
    for number, (_, tags) in enumerate(found):
        for index in range(number % 7, len(tags), 7):
            tags[index] = tiny.TAGS[(tiny.TAGS.index(tags[index]) + 1) % len(tiny.TAGS)]
    assert len({tag for _, tags in found for tag in tags}) == len(tiny.TAGS)
    return found


def predicted(directory: Path, sentences: Sequence[list[str]]) -> Sentences:
    """By the tokenizer of transformers, a sentence at a time: the tag of the first token of each word."""
    import transformers

    tokenizer, model = transformers.AutoTokenizer.from_pretrained(directory), load(directory)
    found = []
    for words in sentences:
        encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            classes = model(**encoded).logits[0].argmax(-1).tolist()
        places = encoded.word_ids(0)
        found.append((words, [tiny.TAGS[classes[places.index(word)]] for word in range(len(words))]))
    return found


def write_tags(path: Path, sentences: Sentences, words: str = "tokens", tags: str = "ner_tags") -> Path:
    return write_lines(path, ({words: each, tags: marks} for each, marks in sentences))


def write_conll(path: Path, sentences: Sentences) -> Path:
    text = "\n\n".join("\n".join(f"{word} X Y {tag}" for word, tag in zip(*each, strict=True)) for each in sentences)
    path.write_text(f"-DOCSTART- -X- -X- O\n\n{text}\n")
    return path


def write_parquet(path: Path, sentences: Sentences) -> Path:
    import datasets

    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=sorted(tiny.TAGS))),  # not in the model's order
        }
    )
    entries = {"tokens": [words for words, _ in sentences], "ner_tags": [tags for _, tags in sentences]}
    datasets.Dataset.from_dict(entries, features=features).to_parquet(path)
    return path


WAYS: dict[str, Any] = {
    "JSON lines": lambda d, rows: write_tags(d / "a.jsonl", rows),
    "other names": lambda d, rows: write_tags(d / "a.jsonl", rows, "words", "labels"),
    "indices": lambda d, rows: write_tags(d / "a.jsonl", [(w, [tiny.TAGS.index(t) for t in m]) for w, m in rows]),
    "CoNLL": lambda d, rows: write_conll(d / "a.conll", rows),
    "CoNLL as text": lambda d, rows: write_conll(d / "train.txt", rows),
    "parquet": lambda d, rows: write_parquet(d / "a.parquet", rows),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_tags_gives_the_same_scores(
    way: str, tagger: Path, sentences: Sentences, tmp_path: Path
) -> None:
    found = evaluated(tagger, WAYS[way](tmp_path, sentences))
    right = sum(
        t == p
        for (_, m), (_, n) in zip(sentences, predicted(tagger, [w for w, _ in sentences]), strict=True)
        for t, p in zip(m, n, strict=True)
    )
    scores = found["dense"]
    assert found["metric"] == "entity_f1"
    assert scores["tokens"] == sum(len(words) for words, _ in sentences)
    assert scores["token_accuracy"] == pytest.approx(right / scores["tokens"])
    assert 0 < scores["entity_f1"] < 1
    low, high = scores["interval"]
    assert low < scores["entity_f1"] < high
    assert {each["class"] for each in found["classes"]} == {"PER", "LOC"}
    assert sum(each["samples"] for each in found["classes"]) == scores["entities"]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-PER I-PER O", {(1, 3, "PER")}),
        ("B-PER B-PER I-LOC", {(0, 1, "PER"), (1, 2, "PER"), (2, 3, "LOC")}),
        ("I-PER I-PER O I-LOC", {(0, 2, "PER"), (3, 4, "LOC")}),
        ("S-PER I-PER E-PER I-PER", {(0, 1, "PER"), (1, 3, "PER"), (3, 4, "PER")}),
        ("O O", set()),
    ],
)
def test_entities_are_those_of_the_script_of_conll(tags: str, expected: set[tuple[int, int, str]]) -> None:
    assert entities(tags.split()) == expected


def test_a_model_without_entities_is_scored_by_its_tokens(tmp_path: Path) -> None:
    tiny.write(NAME, tmp_path / "model", id2label={0: "NOUN", 1: "VERB"}, label2id={"NOUN": 0, "VERB": 1})
    data = write_tags(tmp_path / "a.jsonl", [(["good", "film"], ["NOUN", "VERB"])] * 8)
    found = evaluated(tmp_path / "model", data)
    assert found["metric"] == "top1"
    assert found["dense"]["tokens"] == 16


def test_padding_changes_no_divergence_and_no_functional(tagger: Path, tmp_path: Path, sentences: Sentences) -> None:
    data = write_tags(tmp_path / "a.jsonl", sentences[:6])
    model, together = read_alone_and_together(tagger, data, SOFTMAX, 6)
    owners = reading_of(model).owners(model(**together.inputs), together)
    assert owners is not None
    assert owners.bincount().tolist() == [len(words) for words, _ in sentences[:6]]


def test_a_whole_job_ends_in_a_model_that_is_measured_the_same(
    tagger: Path, sentences: Sentences, tmp_path: Path
) -> None:
    data = write_conll(tmp_path / "a.conll", sentences)
    small = tmp_path / "small"
    found = compressed_and_measured(tagger, data, small)
    assert 0 < found["fidelity"]["kl"] < 2
    assert 0 < found["fidelity"]["entity_agreement"] <= 1
    assert found["difference"]["test"] == "paired bootstrap"
    assert load(small).config.architectures == [NAME]
    assert "AutoModelForTokenClassification" in (small / "README.md").read_text()


@pytest.mark.parametrize("bound", [("--max-kl", 0.5), ("--max-changed", 60), ("--max-accuracy-drop", 30)])
def test_every_bound_is_kept(bound: tuple[str, float], tagger: Path, sentences: Sentences, tmp_path: Path) -> None:
    assert_a_bound_is_kept(tagger, write_tags(tmp_path / "a.jsonl", sentences), tmp_path / "small", *bound)


@pytest.mark.parametrize("objective", ["distill", "supervised"])
def test_training_makes_the_held_out_loss_smaller(
    objective: str, tagger: Path, sentences: Sentences, tmp_path: Path
) -> None:
    assert_training_helps(objective, tagger, write_tags(tmp_path / "a.jsonl", sentences * 2), tmp_path)


def test_running_text_is_enough_to_calibrate_on(tagger: Path, text_file: Path, tmp_path: Path) -> None:
    run("compress", tagger, tmp_path / "small", "--calibration", text_file, "--samples", 24, "--target-size", "0.05MB")
    found = json.loads((tmp_path / "small" / "report.json").read_text())["evaluation"]
    assert 0 < found["fidelity"]["agreement"] <= 1


FAULTS = {
    "an unknown tag": ([(["good", "film"], ["O", "O"]), (["so"], ["B-ORG"])], "row 2: the tag 'B-ORG' is not one of"),
    "a tag too few": ([(["good", "film"], ["O"])], "row 1: 2 words in the column 'tokens' but 1 tags in 'ner_tags'"),
    "an index too large": ([(["good"], [7])], "row 1 has the label '7', class 7, but the model has the classes 0 to 4"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named_with_its_row(fault: str, tagger: Path, tmp_path: Path) -> None:
    rows, message = FAULTS[fault]
    assert message in refused(tagger, write_tags(tmp_path / "a.jsonl", rows))


def test_wrong_columns_are_named(tagger: Path, tmp_path: Path) -> None:
    data = write_tags(tmp_path / "a.jsonl", [(["good"], ["O"])], words="stuff")
    assert "no column looks like the text. Give --text-column" in refused(tagger, data)
    assert "no column 'stuf'. Did you mean 'stuff'?" in refused(tagger, data, "--text-column", "stuf")
    run("eval", tagger, "--data", data, "--text-column", "stuff")
    spans = write_lines(tmp_path / "spans.jsonl", [{"text": "good film", "entities": [[0, 4, "PER"]]}])
    message = " ".join(run("eval", tagger, "--data", spans, code=2).split())
    assert "Give --label-column, or name it ner_tags. Columns: text, entities." in message
