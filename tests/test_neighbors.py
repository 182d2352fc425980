"""Neighbors of samples, by two models."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vitshrink.cli.app import app
from vitshrink.evaluation.neighbors import neighbors_kept


def test_the_same_features_have_the_same_neighbors_and_others_have_others() -> None:
    vectors = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    assert neighbors_kept(vectors, 3 * vectors, 0) == (1.0, 1.0)
    other = torch.randn(60, 8, generator=torch.Generator().manual_seed(1))
    shared, found = neighbors_kept(vectors, other, 0) or (1, 1)
    assert shared == pytest.approx(10 / 59, abs=0.1)
    assert found < 0.5
    assert neighbors_kept(vectors[:20], other[:20], 0) is None


def test_neighbors_are_those_of_all_pairs() -> None:
    dense, other = (torch.randn(40, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    other = dense + 0.3 * other
    nearest = []
    for vectors in (dense, other):
        likeness = torch.cosine_similarity(vectors[:, None], vectors[None], dim=-1).fill_diagonal_(-2)
        nearest.append([row.argsort(descending=True)[:10].tolist() for row in likeness])
    shared = sum(len(set(one) & set(two)) / 10 for one, two in zip(*nearest, strict=True)) / 40
    found = sum(one[0] in two for one, two in zip(*nearest, strict=True)) / 40
    assert neighbors_kept(dense, other, 0) == (pytest.approx(shared), pytest.approx(found))


def test_features_of_images_are_compared_by_their_neighbors(
    checkpoint: object, flat_images: Path, tmp_path: Path
) -> None:
    assert callable(checkpoint)
    dense, small = checkpoint("ViTModel"), tmp_path / "small"
    for command in (
        ("compress", dense, small, "--calibration", flat_images, "--samples", 8, "--keep", 0.9, "--holdout", 0),
        ("eval", small, "--baseline", dense, "--data", flat_images, "--json"),
    ):
        result = CliRunner().invoke(app, [str(argument) for argument in command])
        assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["evaluation"]["fidelity"]
    assert 0 < found["neighbor_agreement"] <= 1
    assert 0 < found["nearest_kept"] <= 1
