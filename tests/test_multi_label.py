"""Heads whose labels are independent of each other, and regressions of several numbers, from the data to the report."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from heads import run
from PIL import Image

from vitshrink import load
from vitshrink.data import Preprocessor, open_samples

LABELS = ("joy", "anger", "mild surprise")
Rows = Sequence[tuple[str, Sequence[int]]]


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of three labels of which several may apply."""
    return write_head(tmp_path_factory.mktemp("tagger"), "BertForSequenceClassification", "multi_label_classification")


def write_head(directory: Path, name: str, problem_type: str, labels: Sequence[str] = LABELS) -> Path:
    config = tiny.build(name).config
    config.problem_type = problem_type
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.classifier.weight.mul_(5)  # answers that differ from text to text
        model.classifier.bias.sub_(model.eval()(**tiny.inputs(name, batch=64)).logits.median(0).values)
    model.save_pretrained(directory)
    tiny.write_tokenizer(directory) if name in tiny.TEXT_MODELS else tiny.write_processor(directory)
    return directory


@pytest.fixture(scope="module")
def rows(tagger: Path, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """48 texts with the labels that the tagger gives them, but for some."""
    file = tiny.write_text(tmp_path_factory.mktemp("texts") / "texts.txt", 48)
    texts = file.read_text().splitlines()
    preprocessor = Preprocessor.from_checkpoint(tagger, "text")
    (batch,) = preprocessor.batches(open_samples(str(file), "text"), 48)
    with torch.no_grad():
        chosen = (load(tagger)(**batch.inputs).logits > 0).long()
    answers = dict(zip(batch.keys, chosen.tolist(), strict=True))
    found = [(text, answers[f"row {number}"]) for number, text in enumerate(texts, start=1)]
    assert len({tuple(labels) for _, labels in found}) > 3
    return [(text, flipped(labels, number)) for number, (text, labels) in enumerate(found)]


def flipped(labels: Sequence[int], number: int) -> list[int]:
    """One label of every third sample the other way round; twice is as before."""
    return [1 - label if number % 3 == 0 and index == number % 2 else label for index, label in enumerate(labels)]


@pytest.fixture(scope="module")
def shifted(tagger: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with all logits higher, which no softmax can see."""
    directory = tmp_path_factory.mktemp("shifted") / "model"
    model = load(tagger)
    with torch.no_grad():
        model.classifier.bias.add_(1.0)
    model.save_pretrained(directory)
    tiny.write_tokenizer(directory)
    return directory


def names(labels: Sequence[int]) -> list[str]:
    return [name for name, applies in zip(LABELS, labels, strict=True) if applies]


def write_json_lines(path: Path, label_of: Callable[[Sequence[int]], Any], rows: Rows) -> Path:
    lines = (json.dumps({"text": text, "labels": label_of(labels)}) for text, labels in rows)
    path.write_text("\n".join(lines))
    return path


def write_csv(path: Path, head: Sequence[str], cells: Callable[[Sequence[int]], Sequence[object]], rows: Rows) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text", *head], *([text, *cells(labels)] for text, labels in rows)])
    return path


def write_parquet(path: Path, rows: Rows) -> Path:
    import datasets

    label = datasets.Sequence(datasets.ClassLabel(names=list(LABELS)))
    features = datasets.Features({"text": datasets.Value("string"), "labels": label})
    entries = {"text": [text for text, _ in rows], "labels": [names(labels) for _, labels in rows]}
    datasets.Dataset.from_dict(entries, features=features).to_parquet(path)
    return path


def indices(labels: Sequence[int]) -> list[int]:
    return [index for index, applies in enumerate(labels) if applies]


WAYS: dict[str, Callable[[Path, Rows], Path]] = {
    "lists of names": lambda d, rows: write_json_lines(d / "a.jsonl", names, rows),
    "lists of indices": lambda d, rows: write_json_lines(d / "a.jsonl", indices, rows),
    "yes and no": lambda d, rows: write_json_lines(d / "a.jsonl", list, rows),
    "yes and no as floats": lambda d, rows: write_json_lines(d / "a.jsonl", lambda x: [float(i) for i in x], rows),
    "names with bars": lambda d, rows: write_csv(d / "a.csv", ["labels"], lambda x: ["|".join(names(x))], rows),
    "names with commas": lambda d, rows: write_csv(d / "a.csv", ["labels"], lambda x: [", ".join(names(x))], rows),
    "JSON in a cell": lambda d, rows: write_csv(d / "a.csv", ["labels"], lambda x: [json.dumps(names(x))], rows),
    "Python in a cell": lambda d, rows: write_csv(d / "a.csv", ["labels"], lambda x: [str(names(x))], rows),
    "a column a label": lambda d, rows: write_csv(d / "a.csv", LABELS, list, rows),
    "parquet with class names": lambda d, rows: write_parquet(d / "a.parquet", rows),
}


@pytest.mark.parametrize("way", WAYS)
def test_labels_are_read_in_every_usual_form(way: str, tagger: Path, rows: Rows, tmp_path: Path) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    data = WAYS[way](tmp_path, rows)
    found = json.loads(run("eval", tagger, "--data", data, "--json"))["evaluation"]
    assert found["samples"] == 48
    scores = found["dense"]
    truth = np.array([labels for _, labels in rows])
    predicted = np.array([flipped(labels, number) for number, (_, labels) in enumerate(rows)])
    assert scores["f1_micro"] == pytest.approx(metrics.f1_score(truth, predicted, average="micro", zero_division=0))
    assert scores["f1_macro"] == pytest.approx(metrics.f1_score(truth, predicted, average="macro", zero_division=0))
    assert scores["exact_match"] == pytest.approx(metrics.accuracy_score(truth, predicted))
    low, high = scores["interval"]
    assert low < scores["f1_micro"] < high
    assert {entry["class"] for entry in found["classes"]} <= set(LABELS)


def test_columns_of_labels_may_be_named(tagger: Path, rows: Rows, tmp_path: Path) -> None:
    heads = ["a", "b", "c"]
    data = write_csv(tmp_path / "a.csv", heads, list, rows)
    (tmp_path / "map.txt").write_text("a 0\nb 1\nc 2\n")
    flags = ("--label-column", "a,b,c", "--class-map", tmp_path / "map.txt")
    named = json.loads(run("eval", tagger, "--data", data, *flags, "--json"))
    direct = write_csv(tmp_path / "b.csv", LABELS, list, rows)
    guessed = json.loads(run("eval", tagger, "--data", direct, "--json"))
    assert named["evaluation"]["dense"] == guessed["evaluation"]["dense"]


@pytest.mark.parametrize(
    ("label_of", "said"),
    [
        (lambda labels: [*names(labels), "rage"], "rage"),
        (lambda labels: [7, *indices(labels)], "7"),
        (lambda _labels: [0.25] * 3, "0.25"),
        (lambda _labels: {"joy": 1}, "joy"),
    ],
)
def test_labels_that_are_not_the_models_are_refused(
    label_of: Callable[[Sequence[int]], Any], said: str, tagger: Path, rows: Rows, tmp_path: Path
) -> None:
    data = write_json_lines(tmp_path / "a.jsonl", label_of, rows)
    message = run("eval", tagger, "--data", data, code=1)
    assert "error: " in message
    assert said in message


def test_lists_of_labels_are_refused_where_one_class_is_given(
    checkpoint: Callable[[str], Path], rows: Rows, tmp_path: Path
) -> None:
    data = write_json_lines(tmp_path / "a.jsonl", names, rows)
    message = run("eval", checkpoint("BertForSequenceClassification"), "--data", data, code=1)
    assert "problem_type" in message


def test_a_shift_of_all_labels_is_seen(tagger: Path, shifted: Path, rows: Rows, tmp_path: Path) -> None:
    data = write_json_lines(tmp_path / "a.jsonl", names, rows)
    document = json.loads(run("eval", shifted, "--baseline", tagger, "--data", data, "--json"))["evaluation"]
    fidelity, difference = document["fidelity"], document["difference"]
    assert fidelity["kl"] > 0.1
    assert fidelity["agreement"] < fidelity["label_agreement"] < 1
    assert difference["drop"] == pytest.approx(document["dense"]["f1_micro"] - document["compressed"]["f1_micro"])
    assert document["disagreements"]
    table = run("eval", shifted, "--baseline", tagger, "--data", data)
    for words in ("Micro-F1", "Macro-F1", "All labels right", "label by label"):
        assert words in table
    missed = run("eval", shifted, "--baseline", tagger, "--data", data, "--max-kl", "0.1", code=3)
    assert "--max-kl 0.1 is missed" in missed


@pytest.mark.parametrize("bound", [("--max-kl", 0.02), ("--max-changed", 10)])
def test_a_bound_holds_for_labels(bound: tuple[str, float], tagger: Path, rows: Rows, tmp_path: Path) -> None:
    data = write_json_lines(tmp_path / "a.jsonl", names, rows)
    options = ("--calibration", data, "--samples", 24, "--holdout", 24, "--refine", 0)
    run("compress", tagger, tmp_path / "out", *options, *bound)
    fidelity = json.loads((tmp_path / "out" / "report.json").read_text())["evaluation"]["fidelity"]
    figure = fidelity["kl"] if bound[0] == "--max-kl" else 100 * (1 - fidelity["agreement"])
    assert figure <= bound[1]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "label by label" in page


@pytest.mark.parametrize("objective", ["distill", "supervised"])
def test_training_follows_the_labels(objective: str, tagger: Path, rows: Rows, tmp_path: Path) -> None:
    data = write_json_lines(tmp_path / "a.jsonl", names, rows)
    options = ("--keep", 0.7, "--calibration", data, "--samples", 40, "--holdout", 8, "--refine", 0)
    run("compress", tagger, tmp_path / "small", *options)
    trained = ("--data", data, "--objective", objective, "--epochs", 2, "--batch-size", 8)
    run("finetune", tmp_path / "small", tmp_path / "out", "--teacher", tagger, *trained)
    recovery = json.loads((tmp_path / "out" / "report.json").read_text())["recovery"]
    assert recovery["after"] <= recovery["before"]
    before = {"distill": lambda loss: 0 < loss < 1, "supervised": lambda loss: 0.2 < loss < 1}
    assert before[objective](recovery["before"])


def test_images_have_several_labels_too(tmp_path: Path) -> None:
    model = write_head(tmp_path / "model", "ViTForImageClassification", "multi_label_classification")
    folder = tmp_path / "images"
    folder.mkdir()
    lines = []
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        labels = names([number % 2, number % 3 == 0, 1])
        lines.append(json.dumps({"file_name": f"{number}.png", "labels": labels}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    found = json.loads(run("eval", model, "--data", folder, "--json"))["evaluation"]
    assert found["samples"] == 12
    assert 0 <= found["dense"]["f1_micro"] <= 1


@pytest.mark.slow
def test_an_exported_model_is_judged_by_its_head_too(tagger: Path, rows: Rows, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    data = write_json_lines(tmp_path / "a.jsonl", names, rows)
    run("export", tagger, tmp_path / "onnx", "--to", "onnx")
    exported = json.loads(run("eval", tmp_path / "onnx" / "model.onnx", "--data", data, "--json"))["evaluation"]
    plain = json.loads(run("eval", tagger, "--data", data, "--json"))["evaluation"]
    assert exported["dense"] == plain["dense"]


def test_several_numbers_are_a_regression(tmp_path: Path) -> None:
    model = write_head(tmp_path / "model", "BertForSequenceClassification", "regression", ("valence", "arousal"))
    texts = tiny.write_text(tmp_path / "texts.txt", 32).read_text().splitlines()
    numbers = np.random.default_rng(0).normal(size=(32, 2))
    data = tmp_path / "a.jsonl"
    entries = zip(texts, numbers.tolist(), strict=True)
    data.write_text("\n".join(json.dumps({"text": text, "labels": pair}) for text, pair in entries))
    found = json.loads(run("eval", model, "--data", data, "--json"))["evaluation"]
    assert -1 <= found["dense"]["spearman"] <= 1
    options = ("--calibration", data, "--samples", 16, "--holdout", 16, "--refine", 0)
    run("compress", model, tmp_path / "out", *options, "--max-error", 0.05)
    fidelity = json.loads((tmp_path / "out" / "report.json").read_text())["evaluation"]["fidelity"]
    assert fidelity["relative_error"] <= 0.05
    message = run("compress", model, tmp_path / "no", *options, "--max-kl", 0.05, code=2)
    assert "--max-error" in message


@pytest.mark.parametrize(
    ("labels", "scores", "said"),
    [
        (["high", "low"], 1, "names as labels, but the model gives scores"),
        ([[0.5, 1.0], [0.1, 2.0]], 1, "several scores per sample, but the model gives one"),
        ([0.5, 0.25], 2, "one score per sample, but the model gives 2"),
    ],
)
def test_labels_that_are_no_scores_are_refused_before_the_work(
    labels: list[Any], scores: int, said: str, tmp_path: Path
) -> None:
    model = write_head(tmp_path / "model", "BertForSequenceClassification", "regression", LABELS[:scores])
    data = tmp_path / "a.jsonl"
    lines = (json.dumps({"text": f"so good {number}", "label": labels[number % 2]}) for number in range(24))
    data.write_text("\n".join(lines))
    job = ("compress", model, tmp_path / "out", "--method", "svd", "--keep", 0.8, "--calibration", data)
    message = run(*job, "--finetune", "supervised", code=1)
    assert said in message
    assert "Factorizing" not in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "model"]


def test_training_that_fails_leaves_nothing_behind(vit_directory: Path, tmp_path: Path) -> None:
    folder = tiny.write_images(tmp_path / "images", 24)
    for file in sorted(folder.iterdir())[:8]:
        file.write_bytes(b"no image")
    training = ("--finetune", "distill", "--finetune-option", f"data={folder}")
    message = run("compress", vit_directory, tmp_path / "out", "--method", "svd", "--keep", 0.8, *training, code=1)
    assert "cannot be used" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]
