"""Sentence embeddings: pooled, projected and compared as the checkpoint says, and named; never as it does not say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor, nn
from typer.testing import CliRunner

from vitshrink.cli.app import app
from vitshrink.config.options import DataConfig
from vitshrink.data import Preprocessor, samples_in_memory
from vitshrink.data.columns import Columns
from vitshrink.errors import CheckpointError
from vitshrink.jobs.evaluate import Assessment, evaluate_checkpoint
from vitshrink.models.loading import load_dense
from vitshrink.report import Report

TEXTS = ["This film is good", "not so good and that is that", "bad", "a good film it was, and the good of it is so so"]
OLD_KEYS = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


class Dense(nn.Module):
    def __init__(self, width: int, out: int, *, residual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.linear = nn.Linear(width, out)
        if residual:
            self.residual = nn.Linear(width, out, bias=False)


class LayerNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        with torch.no_grad():
            self.norm.weight.add_(torch.linspace(0, 1, width))
            self.norm.bias.add_(torch.linspace(1, 0, width))


def tokens_of(directory: Path, texts: list[str] = TEXTS) -> tuple[Tensor, Tensor]:
    """Last hidden states and mask of texts, padded on the right."""
    loaded = load_dense(directory)
    preprocessor = Preprocessor.from_checkpoint(directory, "text")
    (batch,) = preprocessor.batches(samples_in_memory(texts, "text", len(texts), Columns()), len(texts), in_order=True)
    assert batch.mask is not None
    with torch.no_grad():
        return loaded.model(**batch.inputs).last_hidden_state, batch.mask


def by_hand(mode: str, states: Tensor, mask: Tensor) -> Tensor:
    """A sentence at a time, from its real tokens alone."""
    rows = [row[real] for row, real in zip(states, mask, strict=True)]
    pools: dict[str, Callable[[Tensor], Tensor]] = {
        "cls": lambda row: row[0],
        "lasttoken": lambda row: row[-1],
        "max": lambda row: row.max(0).values,
        "mean": lambda row: row.mean(0),
        "mean_sqrt_len_tokens": lambda row: row.sum(0) / len(row) ** 0.5,
        "weightedmean": lambda row: torch.arange(1.0, len(row) + 1) @ row / torch.arange(1.0, len(row) + 1).sum(),
    }
    return torch.stack([pools[mode](row) for row in rows])


def embedded(directory: Path) -> Tensor:
    return load_dense(directory).embedding(*tokens_of(directory)).float()


POOLINGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "old cls": ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
    "old mean": ({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}, ("mean",)),
    "old, all of them": (
        {f"pooling_mode_{key}": True for key in reversed(OLD_KEYS)},
        ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"),
    ),
    "cls": ({"pooling_mode": "cls", "embedding_dimension": 32}, ("cls",)),
    "max": ({"pooling_mode": "max"}, ("max",)),
    "mean": ({"pooling_mode": "mean"}, ("mean",)),
    "root": ({"pooling_mode": "mean_sqrt_len_tokens"}, ("mean_sqrt_len_tokens",)),
    "weighted": ({"pooling_mode": "weightedmean"}, ("weightedmean",)),
    "last": ({"pooling_mode": "lasttoken"}, ("lasttoken",)),
    "side by side": ({"pooling_mode": ["max", "cls"]}, ("max", "cls")),
    "both kinds of keys": ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, ("cls",)),
}


@pytest.mark.parametrize("kind", POOLINGS)
def test_pooling_is_the_checkpoints_own(kind: str, tmp_path: Path) -> None:
    settings, modes = POOLINGS[kind]
    directory = tiny.write_sentence_encoder(tmp_path / "model", ("Pooling", settings, None))
    states, mask = tokens_of(directory)
    assert not mask.all()
    expected = torch.cat([by_hand(mode, states, mask) for mode in modes], dim=-1)
    torch.testing.assert_close(embedded(directory), expected)
    assert load_dense(directory).embedding.pooling == " + ".join(modes)


def test_padding_on_the_left_makes_no_difference(tmp_path: Path) -> None:
    settings = {"pooling_mode": list(by_hand_modes())}
    directory = tiny.write_sentence_encoder(tmp_path / "model", ("Pooling", settings, None))
    embedding = load_dense(directory).embedding
    states, mask = tokens_of(directory)
    turned = torch.stack([row.roll(int((~real).sum()), 0) for row, real in zip(states, mask, strict=True)])
    torch.testing.assert_close(embedding(turned, mask.flip(1)), embedding(states, mask))


def by_hand_modes() -> tuple[str, ...]:
    return POOLINGS["old, all of them"][1]


def test_what_comes_after_the_pooling_is_applied(tmp_path: Path) -> None:
    first, second, norm = Dense(64, 16), Dense(16, 8, residual=True), LayerNorm(16)
    gelu = {"in_features": 64, "out_features": 16, "activation_function": "torch.nn.modules.activation.GELU"}
    directory = tiny.write_sentence_encoder(
        tmp_path / "model",
        ("Pooling", {"pooling_mode": ["cls", "mean"]}, None),
        ("sentence_transformers.base.modules.dense.Dense", gelu, first),
        ("LayerNorm", {"dimension": 16}, norm),
        ("Dropout", {"dropout": 0.5}, None),
        ("Dense", {"in_features": 16, "out_features": 8, "use_residual": True}, second),
        ("sentence_transformers.base.modules.normalize.Normalize", {}, None),
    )
    states, mask = tokens_of(directory)
    with torch.no_grad():
        pooled = torch.cat([by_hand(mode, states, mask) for mode in ("cls", "mean")], dim=-1)
        given = norm.norm(nn.functional.gelu(first.linear(pooled)))
        expected = torch.tanh(second.linear(given)) + second.residual(given)
        expected = expected / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(embedded(directory), expected, rtol=1e-5, atol=1e-6)
    assert load_dense(directory).embedding.pooling == (
        "cls + mean, dense to 16 (GELU), layer norm, dense to 8 (Tanh, residual), normalized"
    )


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.tsv"
    lines = tiny.write_text(tmp_path / "texts.txt", 48).read_text().splitlines()
    rows = [f"{(7 * index) % 24}\t{lines[index]}\t{lines[index + 24]}" for index in range(24)]
    file.write_text("score\tsentence1\tsentence2\n" + "\n".join(rows) + "\n")
    return file


def scored(directory: Path, pairs: Path, **more: Any) -> Assessment:
    return evaluate_checkpoint(str(directory), DataConfig(str(pairs)), device="cpu", offline=True, **more)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
def test_pairs_are_scored_by_the_checkpoints_own_embedding_and_similarity(
    similarity: str, tmp_path: Path, pairs: Path
) -> None:
    directory = tiny.write_sentence_encoder(
        tmp_path / "model", ("Pooling", {"pooling_mode_cls_token": True}, None), ("Dense", {}, Dense(32, 8))
    )
    (directory / "config_sentence_transformers.json").write_text(json.dumps({"similarity_fn_name": similarity}))
    rows = [line.split("\t") for line in pairs.read_text().splitlines()[1:]]
    embedding = load_dense(directory).embedding
    one, other = (embedding(*tokens_of(directory, [row[column] for row in rows])) for column in (1, 2))
    expected = {
        "cosine": nn.functional.cosine_similarity(one, other),
        "dot": (one * other).sum(1),
        "euclidean": -nn.functional.pairwise_distance(one, other, eps=0),
        "manhattan": -nn.functional.pairwise_distance(one, other, p=1, eps=0),
    }[similarity]
    found = scored(directory, pairs).to_dict()
    rank = spearmanr(expected.numpy(), [float(row[0]) for row in rows]).statistic
    assert found["evaluation"]["dense"]["spearman"] == pytest.approx(rank, abs=1e-6)
    assert (found["pooling"], found["similarity"]) == ("cls, dense to 8 (Tanh)", similarity)


def test_a_directory_without_modules_is_pooled_by_the_mean_and_says_so(
    checkpoint: Callable[[str], Path], pairs: Path
) -> None:
    found = scored(checkpoint("BertModel"), pairs).to_dict()
    assert found["pooling"] == "mean (the default: there is no modules.json)"
    assert found["similarity"] == "cosine"


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def test_terminal_report_and_table_name_the_pooling(tmp_path: Path, pairs: Path) -> None:
    pooling = ("Pooling", {"pooling_mode_cls_token": True}, None)
    directory = tiny.write_sentence_encoder(tmp_path / "model", pooling, ("Normalize", {}, None))
    quiet = ("--offline", "--device", "cpu")
    table = tmp_path / "rows.csv"
    found = run("eval", directory, "--data", pairs, "--csv", table, *quiet)
    assert "pooling: cls, normalized; similarity: cosine" in found.stdout
    assert '"cls, normalized",cosine,' in table.read_text()
    out = tmp_path / "out"
    found = run("compress", directory, out, "--method", "svd", "--keep", 0.8, "--eval", pairs, *quiet)
    assert "pooling: cls, normalized; similarity: cosine" in found.stdout
    evaluation = Report.read(out).evaluation
    assert evaluation is not None
    assert (evaluation.pooling, evaluation.similarity) == ("cls, normalized", "cosine")
    for name in ("report.md", "report.html"):
        assert "cls, normalized" in (out / name).read_text()
    assert scored(out, pairs, baseline=str(directory)).to_dict()["pooling"] == "cls, normalized"


UNKNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "module of one's own": ("my_package.Whitening", {}),
    "module that is not computed": ("sentence_transformers.models.CNN", {}),
    "activation": ("Dense", {"activation_function": "my_package.Swish"}),
    "activation that is none": ("Dense", {"activation_function": "torch.nn.Linear"}),
    "input": ("Normalize", {"module_input_name": "something"}),
    "pooling": ("Pooling", {"pooling_mode": "median"}),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_cannot_be_computed_is_named_and_never_replaced_by_the_mean(
    kind: str, tmp_path: Path, pairs: Path, text_file: Path
) -> None:
    name, settings = UNKNOWN[kind]
    directory = tiny.write_sentence_encoder(
        tmp_path / "model", ("Pooling", {"pooling_mode": "cls"}, None), (name, settings, Dense(32, 8))
    )
    shrink = ("compress", directory, tmp_path / "out", "--method", "svd", "--keep", 0.8, "--offline", "--device", "cpu")
    refused = run(*shrink, "--eval", pairs)
    told = name if "." in name else str(next(iter(settings.values())))
    assert refused.exit_code == 1
    assert told in refused.stderr
    assert "cannot compute the sentence similarity of this model" in refused.stderr
    assert "Factoriz" not in refused.stderr  # before the work
    done = run(*shrink, "--calibration", text_file, "--samples", 8)
    assert done.exit_code == 0, done.stderr
    report = Report.read(tmp_path / "out")
    assert report.evaluation is not None
    assert report.evaluation.pooling == "unknown"
    assert report.evaluation.fidelity.pooled_cosine is None
    assert any(told in warning and "were not compared" in warning for warning in report.warnings)


def test_an_encoder_that_makes_no_sentence_vector_is_unknown(tmp_path: Path) -> None:
    directory = tiny.write_sentence_encoder(tmp_path / "model", ("Dropout", {}, None))
    assert "has no Pooling" in str(load_dense(directory).embedding.problem)


def test_other_states_than_the_last_are_unknown(tmp_path: Path) -> None:
    directory = tiny.write_sentence_encoder(tmp_path / "model", ("Pooling", {"pooling_mode": "cls"}, None))
    text = {"method": "forward", "method_output_name": "pooler_output"}
    settings = {"modality_config": {"text": text}, "module_output_name": "sentence_embedding"}
    (directory / "sentence_bert_config.json").write_text(json.dumps(settings))
    assert "uses the output 'pooler_output'" in str(load_dense(directory).embedding.problem)


def test_a_baseline_that_pools_otherwise_is_said(
    tmp_path: Path, pairs: Path, checkpoint: Callable[[str], Path]
) -> None:
    directory = tiny.write_sentence_encoder(tmp_path / "model", ("Pooling", {"pooling_mode": "cls"}, None))
    found = scored(directory, pairs, baseline=str(checkpoint("BertModel")))
    alone = [scored(each, pairs).measurement.evaluation for each in (checkpoint("BertModel"), directory)]
    assert [alone[0].dense, alone[1].dense] == [
        found.measurement.evaluation.dense,
        found.measurement.evaluation.compressed,
    ]
    assert any("compute sentence embeddings in different ways" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "2_Dense, which has no model.safetensors: copy"),
        (lambda folder: (folder / "config.json").unlink(), "2_Dense, which has no config.json: copy"),
        (lambda folder: (folder / "config.json").write_text("[]"), "contains no settings"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "not a readable safetensors file"),
        (
            lambda folder: save_file(Dense(31, 8).state_dict(), folder / "model.safetensors"),
            r"\[8, 31\], but its input",
        ),
        (
            lambda folder: save_file(
                {name: tensor / 0 for name, tensor in load_file(folder / "model.safetensors").items()},
                folder / "model.safetensors",
            ),
            "NaN or infinite",
        ),
    ],
)
def test_a_damaged_module_is_named_before_any_work(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    directory = tiny.write_sentence_encoder(
        tmp_path / "model", ("Pooling", {"pooling_mode": "cls"}, None), ("Dense", {}, Dense(32, 8))
    )
    damage(directory / "2_Dense")
    with pytest.raises(CheckpointError, match=message):
        load_dense(directory)


def test_texts_become_tokens_as_the_encoder_does_it(tmp_path: Path) -> None:
    directory = tiny.write_sentence_encoder(tmp_path / "model", ("Pooling", {"pooling_mode": "cls"}, None))
    plain = Preprocessor.from_checkpoint(directory, "text")
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None  # one that tells capitals from small letters
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 9, "do_lower_case": true}')
    prompts = {"prompts": {"query": "that is ", "document": "so "}, "default_prompt_name": "query"}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    own = Preprocessor.from_checkpoint(directory, "text")

    def tokens(preprocessor: Preprocessor, text: str) -> list[int]:
        (batch,) = preprocessor.batches(samples_in_memory([text], "text", 1, Columns()), 1)
        return list(batch.inputs["input_ids"][0].tolist())

    assert tokens(own, "THE Good") == tokens(plain, "that is the good")
    assert len(tokens(own, "good " * 40)) == 9
    assert own.description["max_length"] == 9
    assert (own.description["lower_case"], own.description["prompt"]) == (True, "that is ")
    assert Preprocessor.from_checkpoint(directory, "text", max_length=12).description["max_length"] == 12
    assert load_dense(directory).embedding.remarks == ("only the default prompt is used, not document",)


@pytest.mark.parametrize("settings", [{"max_seq_length": "long"}, {"max_seq_length": 0}, {"do_lower_case": "yes"}])
def test_settings_that_make_no_sense_are_named(settings: dict[str, Any], tmp_path: Path) -> None:
    directory = tiny.write_sentence_encoder(tmp_path / "model", ("Pooling", {"pooling_mode": "cls"}, None))
    (directory / "sentence_bert_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=f"sentence_bert_config.json: {next(iter(settings))}"):
        load_dense(directory)


def test_sentence_transformers_opens_the_result_and_says_the_same(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    directory = tiny.write_sentence_encoder(
        tmp_path / "model",
        ("Pooling", {"word_embedding_dimension": 32, "pooling_mode_cls_token": True}, None),
        ("Dense", {"in_features": 32, "out_features": 8}, Dense(32, 8)),
        ("Normalize", {}, None),
    )
    done = run("compress", directory, tmp_path / "out", "--method", "svd", "--keep", 0.8, "--offline")
    assert done.exit_code == 0, done.stderr
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    expected = torch.tensor(encoder.encode(TEXTS))
    torch.testing.assert_close(embedded(tmp_path / "out"), expected, rtol=1e-5, atol=1e-6)
