"""Passages of queries: ranked by cross-encoders and by embeddings, and scored by nDCG@10."""

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from typer.testing import CliRunner

from vitshrink.cli.app import app
from vitshrink.evaluation.ranking import ndcg


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(
    ("scores", "relevance", "expected"),
    [
        ([3, 2, 1], [1, 0, 0], 1.0),
        ([1, 2, 3], [1, 0, 0], 1 / 2),
        ([3, 2, 1], [0, 1, 1], (1 / math.log2(3) + 1 / 2) / (1 + 1 / math.log2(3))),
        ([1, 2], [2, 1], (1 + 2 / math.log2(3)) / (2 + 1 / math.log2(3))),
        ([0, 0], [1, 0], (1 + 1 / math.log2(3)) / 2),
        ([2, 1], [0, 0], 0.0),
        (list(range(12, 0, -1)), [0] * 10 + [1, 1], 0.0),
    ],
)
def test_the_gain_is_that_of_known_rankings(scores: list[float], relevance: list[float], expected: float) -> None:
    assert ndcg(torch.tensor(scores), torch.tensor(relevance)) == pytest.approx(expected)


@pytest.fixture(scope="module")
def passages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight queries of six passages each, one of them relevant."""
    lines = tiny.write_text(tmp_path_factory.mktemp("texts") / "texts.txt", 56).read_text().splitlines()
    path = tmp_path_factory.mktemp("passages") / "rerank.jsonl"
    rows = [
        {"query_id": f"q{q}", "query": lines[q], "passage": lines[8 + 6 * q + p], "label": int(p == q % 6)}
        for q in range(8)
        for p in range(6)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


MODELS = {
    "a cross-encoder": ("BertForSequenceClassification", {"id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}}),
    "embeddings": ("BertModel", {}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_passages_are_ranked_within_their_queries(kind: str, passages: Path, tmp_path: Path) -> None:
    name, entries = MODELS[kind]
    dense = tiny.write(name, tmp_path / "model", **entries)
    given = ("--calibration", passages, "--samples", 24, "--eval", passages, "--keep", 0.7)
    run("compress", dense, tmp_path / "small", *given)
    found = json.loads((tmp_path / "small" / "report.json").read_text())["evaluation"]
    assert found["metric"] == "ndcg_at_10"
    assert found["dense"]["queries"] == 8
    assert 0.2 < found["dense"]["ndcg_at_10"] < 1
    assert found["difference"]["test"] == "sign flips, query by query"
    assert found["difference"]["drop"] == pytest.approx(
        found["dense"]["ndcg_at_10"] - found["compressed"]["ndcg_at_10"]
    )
    assert "prediction_spearman" in found["fidelity"]
    assert "nDCG@10" in (tmp_path / "small" / "report.md").read_text()
