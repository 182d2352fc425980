"""Every family that vitshrink is tested with: what is found in its models, and that jobs on them end well."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kinds
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from typer.testing import CliRunner

from vitshrink.cli.app import app
from vitshrink.compression.attentions import attentions_of
from vitshrink.config.options import CompressConfig
from vitshrink.errors import CheckpointError, UsageError
from vitshrink.jobs.compress import compress
from vitshrink.models.checkpoint import load
from vitshrink.models.families import FAMILIES, family_named, family_of
from vitshrink.models.loading import load_dense
from vitshrink.models.reading import chain_problem, groups_of
from vitshrink.models.targets import blocks_of, find_outside, find_targets
from vitshrink.report import figures

each_architecture = pytest.mark.parametrize("name", kinds.ARCHITECTURES)
each_family = pytest.mark.parametrize("name", kinds.ONE_OF_EACH)


def outputs(model: PreTrainedModel, name: str) -> Tensor:
    with torch.no_grad():
        inputs = {
            name: value.to(model.dtype) if value.is_floating_point() else value
            for name, value in kinds.inputs(name).items()
        }
        output: Tensor = model(**inputs)[0]
    return output


def assert_close(one: Tensor, other: Tensor) -> None:
    """Equal up to the order of summation, which depends on how files are mapped to memory."""
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@each_architecture
def test_blocks_layers_and_what_reads_the_same_are_found(name: str) -> None:
    model = kinds.build(name)
    family, targets = family_of(model), find_targets(model)
    linear = {
        path
        for path, module in model.named_modules()
        if type(module) is nn.Linear and any(module is each for block in blocks_of(model) for each in block.modules())
    }
    assert {target.name for target in targets} == {
        path for path in linear if not any(part in path for part in family.left)
    }
    assert set(family.modules) <= {target.role for target in targets}
    for target in targets:
        assert model.get_submodule(target.name).weight.shape == target.shape
    read, together = groups_of(model, [target.name for target in targets]), {}
    for target in targets:
        together.setdefault(target.input_group, set()).add(read[target.name])
    assert all(len(firsts) == 1 for firsts in together.values())  # layers of a group read the same tensors
    assert family.modality == ("text" if kinds.is_text(name) else "image")


@pytest.mark.parametrize("name", ["RobertaModel", "ModernBertModel", "SwinModel", "AlbertModel", "DINOv3ViTModel"])
def test_a_family_without_an_entry_is_found_as_well(name: str) -> None:
    model = kinds.build(name)
    known = find_targets(model)
    with _nothing_known():
        found = find_targets(model)
        assert {target.name for target in found} == {target.name for target in known}
        assert {target.role for target in found} == {"other"}
        groups = [{t.input_group for t in each if t.block == 0} for each in (found, known)]
        assert len(groups[0]) == len(groups[1])
        with pytest.raises(UsageError, match=r"--layers mlp: vitshrink does not know which layers of .* are mlp"):
            find_targets(model, layers="mlp")


@pytest.mark.parametrize("method", ["curvature", "svd"])
def test_a_family_without_an_entry_is_compressed(method: str, tmp_path: Path, text_file: Path) -> None:
    with _nothing_known():
        shrunk = job("RobertaForSequenceClassification", tmp_path, text_file, method=method, keep=(0.8,))
    assert outputs(shrunk, "RobertaForSequenceClassification").isfinite().all()


@contextmanager
def _nothing_known() -> Iterator[None]:
    """Inside, the table of families is empty."""
    family_named.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitshrink.models.families.FAMILIES", ())
        yield
    family_named.cache_clear()


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time of a job on a tiny model; they have tests of their own."""
    monkeypatch.setattr(figures, "available", lambda: False)


def job(name: str, folder: Path, data: Path, **entries: Any) -> PreTrainedModel:
    """Compress a tiny checkpoint and load the result as anybody does."""
    source, output = kinds.write(name, folder / "model"), folder / "out"
    entries = {"calibration": str(data), "samples": 8, "holdout": 4, "batch_size": 4} | entries
    if kinds.stem_of(name) == "Deberta":  # the only one that does not run in half precision
        entries = {"dtype": "float32"} | entries
    compress(CompressConfig(str(source), str(output), **entries))
    return plain(name, output)


def plain(name: str, directory: Path) -> PreTrainedModel:
    model: PreTrainedModel = getattr(transformers, name).from_pretrained(directory)
    return kinds.whole(model).eval()


@each_family
def test_a_compressed_model_reloads_and_is_saved_again(name: str, tmp_path: Path) -> None:
    shrunk = job(name, tmp_path, kinds.write_samples(name, tmp_path), keep=(0.8,))
    numbers = sum(parameter.numel() for parameter in shrunk.parameters())
    assert numbers < sum(parameter.numel() for parameter in plain(name, tmp_path / "model").parameters())
    assert_close(outputs(shrunk, name), outputs(kinds.whole(load(tmp_path / "out")), name))
    shrunk.save_pretrained(tmp_path / "again")
    assert_close(outputs(plain(name, tmp_path / "again"), name), outputs(shrunk, name))
    halved = outputs(shrunk.to(torch.bfloat16), name)
    assert halved.isfinite().all()


METHODS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd", "compensation": "none", "calibration": None, "keep": (0.8,)},
    "asvd": {"method": "asvd", "keep": (0.8,)},
    "whitened-int8": {"method": "whitened", "keep": (0.8,), "quantize": "int8"},
    "residual": {"method": "mixed-rank", "keep": (0.8,), "compensation": "residual"},
    "measured": {"method": "curvature", "keep": (0.8,), "allocation": "measured", "refine": 1},
    "bits": {"bits": 5.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@each_family
def test_every_method_for_linear_layers_works_on_every_family(name: str, method: str, tmp_path: Path) -> None:
    shrunk = job(name, tmp_path, kinds.write_samples(name, tmp_path), **METHODS[method])
    assert_close(outputs(shrunk, name), outputs(kinds.whole(load(tmp_path / "out")), name))


@pytest.mark.slow
@each_family
def test_layers_get_narrower_wherever_it_is_known_what_they_are_for(
    name: str, tmp_path: Path, flat_images: Path, text_file: Path
) -> None:
    data = text_file if kinds.is_text(name) else flat_images
    if not {"fc1", "fc2"} <= set(family_of(kinds.build(name)).modules) and not family_of(kinds.build(name)).plain:
        with pytest.raises(UsageError, match=r"--forms narrow .*none of them complete in any block"):
            job(name, tmp_path, data, forms="narrow", keep=(0.9,))
        return
    shrunk = job(name, tmp_path, data, forms="narrow", keep=(0.9,))
    assert_close(outputs(shrunk, name), outputs(kinds.whole(load(tmp_path / "out")), name))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["measured", "bits"])
@pytest.mark.parametrize("name", [name for name in kinds.ARCHITECTURES if name not in kinds.ONE_OF_EACH])
def test_every_other_head_is_compressed_as_well(name: str, method: str, tmp_path: Path) -> None:
    shrunk = job(name, tmp_path, kinds.write_samples(name, tmp_path), **METHODS[method])
    assert outputs(shrunk, name).isfinite().all()


def test_methods_that_make_attentions_anew_are_for_plain_attentions_only() -> None:
    for name in kinds.ONE_OF_EACH:
        model = kinds.build(name)
        if family_of(model).plain:
            assert len(attentions_of(model, find_targets(model))) == len(blocks_of(model))
        else:
            with pytest.raises(UsageError, match=f"{name} .*softmax.*choose a method for linear layers"):
                attentions_of(model, find_targets(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in kinds.ONE_OF_EACH if kinds.is_plain(name)])
def test_attentions_made_anew_are_those_of_the_family(name: str, tmp_path: Path) -> None:
    shrunk = job(name, tmp_path, kinds.write_samples(name, tmp_path), method="qk-joint", keep=(0.95,))
    dense = outputs(plain(name, tmp_path / "model"), name)
    assert (outputs(shrunk, name) - dense).norm() < 0.1 * dense.norm()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("RobertaModel", None),
        ("MPNetModel", None),
        ("DebertaV2Model", None),
        ("CLIPVisionModel", None),
        ("AlbertModel", "its blocks are shared"),
        ("ModernBertModel", "its blocks get different arguments"),
        ("SwinModel", "other operations run between its blocks"),
    ],
)
def test_what_keeps_blocks_from_being_run_one_after_another_is_said(name: str, problem: str | None) -> None:
    found = chain_problem(kinds.build(name))
    assert found is None if problem is None else found is not None and found.startswith(problem)


def test_a_model_that_does_not_run_in_half_precision_is_refused_before_any_work(tmp_path: Path) -> None:
    """The samples are not even looked for."""
    with pytest.raises(CheckpointError, match=r"DebertaModel does not run in half precision.*--dtype float32"):
        job("DebertaModel", tmp_path, tmp_path / "nothing.txt", keep=(0.8,), dtype="float16")


def test_a_table_that_is_read_but_not_called_is_left_alone() -> None:
    model = kinds.build("DebertaV2Model", hidden_size=64, position_buckets=64)
    assert model.encoder.rel_embeddings.weight.numel() >= 4096
    assert "encoder.rel_embeddings" not in find_outside(model)
    assert "embeddings.word_embeddings" in find_outside(model)


def test_an_encoder_that_hides_patches_reads_them_all(tmp_path: Path) -> None:
    loaded = load_dense(kinds.write("ViTMAEModel", tmp_path))
    inputs = kinds.inputs("ViTMAEModel")
    with torch.no_grad():
        first, second = (loaded.model(**inputs).last_hidden_state for _ in range(2))
    assert first.shape[1] == 17
    assert torch.equal(first, second)
    assert "hides patches at random" in loaded.notes[-1]


@pytest.mark.parametrize(
    ("model_type", "architecture", "said"),
    [
        ("gpt2", "GPT2Model", "it is a decoder.*encoders such as BERT"),
        ("llama", "LlamaForCausalLM", "it is a decoder"),
        ("vit_mae", "ViTMAEForPreTraining", "Supported are ViTMAEModel: load it as one of these"),
        ("bert", "BertForPreTraining", "Supported are BertForSequenceClassification, .*BertForMaskedLM"),
        ("align", "AlignModel", "a pair of encoders.*AlignVisionModel or AlignTextModel"),
        ("wav2vec2", "Wav2Vec2Model", "it reads input_values"),
        ("nomic_bert", "SomebodysModel", "transformers .* has no model SomebodysModel.*never run"),
        ("vit", "RobertaModel", "a model of type 'roberta'"),
    ],
)
def test_what_cannot_be_handled_is_refused_with_the_reason(model_type: str, architecture: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: .*{architecture}.*{said}"):
        family_named(model_type, architecture, "config.json")


T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 99}


@pytest.mark.parametrize(
    ("name", "entries", "said"),
    [
        ("ResNetModel", {"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8}, "no list of blocks"),
        ("T5Model", T5, "describes an encoder with a decoder.*T5EncoderModel"),
        ("BartModel", BART, "describes an encoder with a decoder"),
        ("GPT2Model", {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 99}, "it is a decoder"),
    ],
)
def test_a_whole_checkpoint_of_another_kind_is_refused(
    name: str, entries: dict[str, Any], said: str, tmp_path: Path
) -> None:
    config = getattr(transformers, f"{name.removesuffix('Model')}Config")(**entries)
    getattr(transformers, name)(config).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=said):
        compress(CompressConfig(str(tmp_path / "model"), str(tmp_path / "out"), keep=(0.8,), method="svd"))


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    kinds.write("RobertaModel", tmp_path / "model")
    (tmp_path / "model" / "modeling_own.py").write_text("raise SystemExit('it was run')")
    config = tmp_path / "model" / "config.json"
    entries = json.loads(config.read_text()) | {"model_type": "own", "architectures": ["OwnModel"]}
    job = CompressConfig(str(tmp_path / "model"), str(tmp_path / "out"), keep=(0.8,), method="svd")
    for more, said in (
        ({"auto_map": {"AutoModel": "modeling_own.OwnModel"}}, "auto_map.*vitshrink never does.*remove the entry"),
        ({}, "has no model OwnModel. vitshrink never runs code from a checkpoint"),
    ):
        config.write_text(json.dumps(entries | more))
        with pytest.raises(CheckpointError, match=said):
            compress(job)


def test_the_encoder_of_a_model_with_a_decoder_is_compressed(tmp_path: Path, text_file: Path) -> None:
    model = transformers.T5EncoderModel(transformers.T5Config(**T5, vocab_size=len(kinds.tiny.VOCABULARY)))
    model.save_pretrained(tmp_path / "model")
    kinds.write_tokenizer("T5EncoderModel", tmp_path / "model")
    settings: dict[str, Any] = {"calibration": str(text_file), "samples": 8, "holdout": 4, "keep": (0.9,)}
    (result,) = compress(CompressConfig(str(tmp_path / "model"), str(tmp_path / "out"), **settings))
    assert result.report.parameters.kept < 0.9
    transformers.T5EncoderModel.from_pretrained(tmp_path / "out")


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
@each_family
def test_every_command_works_on_every_family(name: str, tmp_path: Path) -> None:
    data = kinds.write_samples(name, tmp_path)
    model, small = kinds.write(name, tmp_path / "model"), tmp_path / "small"
    calibration = ("--calibration", data, "--samples", "8", "--batch-size", "4")
    assert name in run("inspect", model)
    run("compress", model, small, *calibration, "--keep", "0.8", "--eval", data)
    run("verify", small)
    run("report", small)
    run("eval", small, "--baseline", model, "--data", data, "--batch-size", "4")
    run("finetune", small, tmp_path / "tuned", "--teacher", model, "--data", data, "--epochs", "1")
    run("quantize", model, tmp_path / "int8")
    run("quantize", model, tmp_path / "coded", *calibration, "--bits", "5", "--dtype", "float32")
    for form in ("dense", "torch"):
        run("export", small, tmp_path / form, "--to", form)
    plain(name, tmp_path / "tuned")


@pytest.mark.slow
@each_family
def test_every_family_becomes_an_onnx_file(name: str, tmp_path: Path) -> None:
    data = kinds.write_samples(name, tmp_path)
    model, small = kinds.write(name, tmp_path / "model"), tmp_path / "small"
    run("compress", model, small, "--method", "svd", "--keep", "0.8", "--compensation", "none")
    run("export", small, tmp_path / "onnx", "--to", "onnx")
    run("eval", tmp_path / "onnx" / "model.onnx", "--baseline", model, "--data", data, "--batch-size", "4")


def test_the_docs_name_every_family_of_the_table() -> None:
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
    assert [family.model_type for family in FAMILIES if f"`{family.model_type}`" not in page] == []
