"""What a sentence encoder is compressed for: its final embeddings, and no hidden state besides."""

import csv
import json
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from typer.testing import CliRunner

from vitshrink.cli.app import app
from vitshrink.data import Preprocessor, open_samples
from vitshrink.models.loading import LoadedModel, load_dense
from vitshrink.models.readings import Sentences, plainly_read, reading_of
from vitshrink.models.views import view_of
from vitshrink.statistics.digests import model_digest
from vitshrink.statistics.functionals import random_functional
from vitshrink.statistics.sensitivity import collect_sensitivity


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(32, 8)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_sentence_encoder(
        tmp_path_factory.mktemp("encoder") / "model",
        ("Pooling", {"word_embedding_dimension": 32, "pooling_mode_cls_token": True}, None),
        ("Dense", {"in_features": 32, "out_features": 8}, Dense()),
        ("Normalize", {}, None),
    )


@pytest.fixture(scope="module")
def loaded(encoder: Path) -> LoadedModel:
    return load_dense(encoder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = tiny.write_text(tmp_path_factory.mktemp("texts") / "texts.txt", 96).read_text().splitlines()
    path = tmp_path_factory.mktemp("pairs") / "sts.tsv"
    with path.open("w", newline="") as file:
        rows = [
            (one, other, number % 6) for number, (one, other) in enumerate(zip(lines[::2], lines[1::2], strict=True))
        ]
        csv.writer(file, delimiter="\t").writerows([("sentence1", "sentence2", "score"), *rows])
    return path


def test_rows_are_the_final_embeddings_whatever_the_padding(
    encoder: Path, loaded: LoadedModel, text_file: Path
) -> None:
    data, preprocessor = open_samples(str(text_file), "text"), Preprocessor.from_checkpoint(encoder, "text")
    reading = reading_of(view_of(loaded.model))
    with torch.no_grad():
        together, alone = (
            torch.cat(
                [
                    reading.rows(loaded.model(**batch.inputs), batch)
                    for batch in preprocessor.batches(data, size, in_order=True)
                ]
            )
            for size in (40, 1)
        )
    assert together.shape == (40, 8)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(40))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_the_functional_sees_the_embedding_and_no_other_token(
    encoder: Path, loaded: LoadedModel, text_file: Path
) -> None:
    (batch,) = Preprocessor.from_checkpoint(encoder, "text").batches(open_samples(str(text_file), "text"), 40)
    outputs = loaded.model(**batch.inputs)
    hidden = outputs.last_hidden_state
    functional = random_functional(loaded.model, outputs, batch, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(functional(outputs).sum(), hidden)
    assert (gradient[:, 0].norm(dim=-1) > 0).all()  # cls pooling
    assert (gradient[:, 1:] == 0).all()
    along = (gradient[:, 0] * hidden[:, 0]).sum(-1)
    bias = loaded.embedding(torch.zeros_like(hidden), batch.mask)
    assert bias.shape == (40, 8)
    assert along.abs().mean() < gradient[:, 0].norm(dim=-1).mean() * hidden[:, 0].norm(dim=-1).mean()


def test_integers_know_an_embedding_from_several_directions(
    encoder: Path, loaded: LoadedModel, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there were if the samples came again; on average nothing changes, and it varies less."""
    (batch,) = Preprocessor.from_checkpoint(encoder, "text").batches(open_samples(str(text_file), "text"), 40)
    name = "encoder.layer.0.output.dense"
    several = [collect_sensitivity(loaded.model, [name], [batch], seed=seed)[name].outputs for seed in range(4)]
    again = [batch] * Sentences.probes
    monkeypatch.setattr(Sentences, "probes", 1)
    torch.testing.assert_close(collect_sensitivity(loaded.model, [name], again)[name].outputs, several[0])
    single = [collect_sensitivity(loaded.model, [name], [batch], seed=seed)[name].outputs for seed in range(4)]
    spreads = [torch.stack(each).log().std(0).mean() for each in (several, single)]
    assert spreads[0] < 0.8 * spreads[1]


def test_statistics_of_other_modules_are_not_taken_for_these(encoder: Path, loaded: LoadedModel) -> None:
    bare = load_dense(encoder).model
    before = model_digest(bare)
    assert before == model_digest(loaded.model)
    plainly_read(bare)
    assert model_digest(bare) != before
    bare(**tiny.inputs("BertModel"))  # and it still runs


def test_the_relative_error_is_that_of_the_embeddings(encoder: Path, pairs: Path, tmp_path: Path) -> None:
    given = ("--calibration", pairs, "--samples", 24, "--eval", pairs, "--method", "curvature", "--keep", 0.7)
    run("compress", encoder, tmp_path / "small", *given)
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    found = report["evaluation"]["fidelity"]
    assert found["relative_error"] == pytest.approx(2 * (1 - found["pooled_cosine"]), rel=1e-4)
    assert report["evaluation"]["task"] == "similarity"
    assert report["calibration"]["samples"] == 24


def test_the_two_sentences_of_a_pair_are_learned_from_apart(pairs: Path) -> None:
    samples = open_samples(str(pairs), "text")
    assert samples.read_apart() is samples
    samples.apart = True
    apart = samples.read_apart()
    assert len(apart) == 2 * len(samples)
    assert [sample.key for sample in apart.samples[:2]] == ["row 1, first", "row 1, second"]
    assert apart.samples[1].text == samples.samples[0].text_pair


def test_training_pulls_the_embeddings_back(encoder: Path, pairs: Path, tmp_path: Path) -> None:
    run("compress", encoder, tmp_path / "small", "--calibration", pairs, "--keep", 0.5, "--method", "svd")
    run("finetune", tmp_path / "small", tmp_path / "better", "--data", pairs, "--teacher", encoder, "--epochs", 6)
    recovery = json.loads((tmp_path / "better" / "report.json").read_text())["recovery"]
    assert recovery["after"] < recovery["before"]
