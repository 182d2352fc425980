"""What a result takes from its source directory, what it leaves, and that it says so."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_processes import run_together
from torch import nn
from typer.testing import CliRunner

import vitshrink
from vitshrink.cli.app import app
from vitshrink.errors import CheckpointError
from vitshrink.models import loading as models
from vitshrink.models.companions import companions_of
from vitshrink.report import Report

QUIET = ("--offline", "--device", "cpu")


class Dense(nn.Module):
    """Named as sentence-transformers names the weights of one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(32, 8)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A whole sentence encoder, with a few files that are no part of it."""
    directory = tiny.write_sentence_encoder(
        tmp_path / "encoder",
        ("Pooling", {"pooling_mode": "cls"}, None),
        ("Dense", {"in_features": 32, "out_features": 8, "bias": True}, Dense()),
        ("Normalize", {}, None),
    )
    (directory / "config_sentence_transformers.json").write_text('{"similarity_fn_name": "dot"}')
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 32, "do_lower_case": false}')
    (directory / "LICENSE").write_text("free")
    (directory / "README.md").write_text("of the source")
    (directory / "notes.txt").write_text("mine")
    (directory / "2_Dense" / "evil.py").write_text("raise SystemExit")
    (directory / "onnx").mkdir()
    (directory / "checkpoint-500").mkdir()
    (directory / ".gitattributes").write_text("")
    return directory


TAKEN = (
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "3_Normalize/config.json",
    "LICENSE",
    "config_sentence_transformers.json",
    "modules.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
LEFT = {
    ".gitattributes": "hidden: it belongs to a tool",
    "2_Dense/evil.py": "code, which vitshrink does not run or copy",
    "README.md": "it describes the source",
    "checkpoint-500/": "the state of a training",
    "notes.txt": "not known to belong to a model",
    "onnx/": "weights of the source",
}


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr
    return result.stderr


def test_the_folders_of_all_modules_belong_to_the_checkpoint_and_the_rest_is_named(encoder: Path) -> None:
    found = companions_of(encoder, [encoder / "model.safetensors"])
    assert [name.as_posix() for name in found.files] == list(TAKEN)
    assert found.left == LEFT


@pytest.mark.parametrize(
    "job", ["compress", "quantize", "finetune", "dense", pytest.param("onnx", marks=pytest.mark.slow), "torch"]
)
def test_every_job_takes_them_along_and_says_what_it_left(
    job: str, encoder: Path, text_file: Path, tmp_path: Path
) -> None:
    small, out = tmp_path / "small", tmp_path / "out"
    shrink = ("compress", encoder, small, "--method", "svd", "--keep", 0.8, *QUIET)
    if job == "onnx":
        pytest.importorskip("onnxscript")
    if job == "compress":
        out, told = small, run(*shrink)
    elif job == "quantize":
        told = run("quantize", encoder, out, "--offline")
    elif job in ("onnx", "torch"):
        told = run("export", encoder, out, "--to", job, "--offline")
    else:
        run(*shrink)
        (small / "notes.txt").write_text("again")
        (small / "2_Dense" / "evil.py").write_text("raise SystemExit")
        if job == "dense":
            told = run("export", small, out, "--to", "dense", "--offline")
        else:
            rest = ("--epochs", 1, "--batch-size", 8, "--learning-rate", 1e-3)
            told = run("finetune", small, out, "--teacher", encoder, "--data", text_file, *rest, *QUIET)
    for name in TAKEN:
        assert (out / name).read_bytes() == (encoder / name).read_bytes(), name
    assert not {"evil.py", "notes.txt"} & {file.name for file in out.rglob("*")}
    for words in ("not copied from", "2_Dense/evil.py (code", "notes.txt (not known"):
        assert words in told
    if (out / "report.json").exists():
        report = Report.read(out)
        assert report.left_out["notes.txt"] == LEFT["notes.txt"]
        assert "- notes.txt: not known" in (out / "report.md").read_text()
    else:
        assert json.loads((out / "export.json").read_text())["left_out"]["notes.txt"] == LEFT["notes.txt"]


def test_a_plain_directory_has_nothing_to_say(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    told = run("compress", checkpoint("BertModel"), tmp_path / "out", "--method", "svd", "--keep", 0.8, *QUIET)
    assert "not copied" not in told
    assert Report.read(tmp_path / "out").left_out == {}


def test_the_state_dict_of_a_module_becomes_safetensors(encoder: Path, tmp_path: Path) -> None:
    weights = encoder / "2_Dense" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    before = load_file(weights)
    weights.unlink()
    run("compress", encoder, tmp_path / "out", "--method", "svd", "--keep", 0.8, *QUIET)
    after = load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not (tmp_path / "out" / "2_Dense" / "pytorch_model.bin").exists()
    left = Report.read(tmp_path / "out").left_out
    assert left["2_Dense/pytorch_model.bin"] == "its tensors are written as model.safetensors"


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("made-by-a-pickle",)


def test_a_pickle_in_a_module_is_refused_before_the_work_and_never_run(encoder: Path) -> None:
    (encoder / "2_Dense" / "model.safetensors").unlink()
    torch.save(Evil(), encoder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"2_Dense/pytorch_model.bin contains more than tensors"):
        companions_of(encoder)
    assert not Path("made-by-a-pickle").exists()


@pytest.mark.parametrize("kind", ["file", "folder", "inner folder"])
def test_no_link_is_followed_out_of_the_directory(kind: str, encoder: Path, tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir()
    (private / "model.safetensors").write_bytes((encoder / "2_Dense" / "model.safetensors").read_bytes())
    (private / "config.json").write_text("{}")
    if kind == "inner folder":
        (encoder / "2_Dense" / "more").symlink_to(private)
        found = companions_of(encoder)
        assert found.left["2_Dense/more"] == "a link to a folder, which is not followed"
        assert not any("more" in name.parts for name in found.files)
        return
    if kind == "file":
        (encoder / "2_Dense" / "model.safetensors").unlink()
        (encoder / "2_Dense" / "model.safetensors").symlink_to(private / "model.safetensors")
    else:
        (encoder / "2_Dense").rename(tmp_path / "moved")
        (encoder / "2_Dense").symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"2_Dense.* is a link out of the checkpoint"):
        models.load_dense(encoder)


@pytest.mark.parametrize("place", ["../private", "/etc", "1_Pooling/../../private", "a\\b", "C:x"])
def test_a_module_outside_the_directory_is_refused(place: str, encoder: Path) -> None:
    entries = json.loads((encoder / "modules.json").read_text())
    entries[2]["path"] = place
    (encoder / "modules.json").write_text(json.dumps(entries))
    with pytest.raises(CheckpointError, match="not a folder of this directory: refused"):
        models.load_dense(encoder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "not a list of modules"),
        ("[]", "not a list"),
        ("[1]", "without path or type"),
        ('[{"path": ""}]', "without"),
    ],
)
def test_a_damaged_list_of_modules_is_named(text: str, message: str, encoder: Path) -> None:
    (encoder / "modules.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"modules.json .*{message}"):
        models.load_dense(encoder)


def test_a_model_in_memory_is_saved_with_the_modules_of_its_directory(encoder: Path, tmp_path: Path) -> None:
    model = models.load_dense(encoder).model
    small = vitshrink.compress(model, ["this film is good", "that was bad"] * 6, keep=0.8, method="svd", samples=8)
    assert small.report.evaluation is not None
    assert small.report.evaluation.pooling == "cls, dense to 8 (Tanh), normalized"
    assert small.report.evaluation.preprocessing["max_length"] == 32
    small.save(tmp_path / "out")
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "sentence_bert_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (encoder / name).read_bytes()


PROGRAM = """
import sys
from pathlib import Path
from vitshrink.runtime import processes
from vitshrink.runtime.processes import copy_from_main
processes.join("cpu")
copy_from_main(Path(sys.argv[1]) / str(processes.rank()))
processes.leave()
"""


@pytest.mark.slow
def test_other_processes_get_the_folders_as_well(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    encoder.rename(tmp_path / "0")
    (tmp_path / "1").mkdir()
    done = run_together("-c", PROGRAM, str(tmp_path))
    assert [process.returncode for process in done] == [0, 0], done
    for name in TAKEN:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "0" / name).read_bytes()
