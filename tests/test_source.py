"""Foreign checkpoint directories: whatever is wrong with a file is said, with its name, before anything is run."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from vitshrink.errors import CheckpointError, UsageError
from vitshrink.models import loading as models
from vitshrink.models import source

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def directory(vit_directory: Path, tmp_path: Path) -> Path:
    """A checkpoint of its own, to be damaged."""
    return shutil.copytree(vit_directory, tmp_path / "model")


@pytest.fixture
def sharded(directory: Path) -> Path:
    """The same in two shards with an index."""
    split(directory, save_file, "model", "safetensors")
    return directory


def split(directory: Path, save: Callable[..., Any], stem: str, suffix: str) -> None:
    weights = load_file(directory / WEIGHTS)
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[:10], names[10:]), start=1):
        shard = f"{stem}-{number:05d}-of-00002.{suffix}"
        save({name: weights[name] for name in part}, directory / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    (directory / WEIGHTS).unlink()


def edit_index(directory: Path, **entries: str) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] |= entries
    (directory / INDEX).write_text(json.dumps(index))


def archive(header: Any, body: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), offsets: tuple[int, int] = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def refused(directory: Path, *parts: str) -> str:
    """The message with which a directory is refused; it contains all of the parts."""
    with pytest.raises(CheckpointError) as caught:
        models.load_dense(directory)
    message = str(caught.value)
    for part in parts:
        assert part in message
    assert "\n" not in message
    return message


def test_a_sound_directory_is_described(bert_directory: Path) -> None:
    described = source.examine(bert_directory)
    assert described.weights == (bert_directory / WEIGHTS,)
    assert described.safetensors
    assert described.dtype == torch.float32
    assert {name: tensor.shape for name, tensor in described.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in load_file(bert_directory / WEIGHTS).items()
    }


def test_the_type_is_that_of_most_weights(directory: Path) -> None:
    weights = {name: tensor.half() for name, tensor in load_file(directory / WEIGHTS).items()}
    weights["vit.layernorm.weight"] = weights["vit.layernorm.weight"].float()
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    assert source.examine(directory).dtype == torch.float16


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "is empty"),
    "garbage": (lambda _: os.urandom(1000), "not a readable safetensors file"),
    "a few bytes": (lambda _: b"abc", "not a readable safetensors file"),
    "truncated body": (lambda data: data[:-100], "not a readable safetensors file"),
    "truncated header": (lambda data: data[:100], "not a readable safetensors file"),
    "trailing bytes": (lambda data: data + b"more", "not a readable safetensors file"),
    "web page": (lambda _: b"\n<!DOCTYPE html><html><body>Log in</body></html>", "is a web page"),
    "git-lfs pointer": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "header bomb": (lambda _: struct.pack("<Q", 2**62) + b"{}", "not a readable safetensors file"),
    "header not JSON": (lambda _: struct.pack("<Q", 4) + b"{{{{", "not a readable safetensors file"),
    "offsets outside": (lambda _: archive({"a": entry(offsets=(0, 800))}, bytes(8)), "not a readable"),
    "offsets reversed": (lambda _: archive({"a": entry(offsets=(8, 0))}, bytes(8)), "not a readable"),
    "overlapping": (lambda _: archive({"a": entry(), "b": entry()}, bytes(8)), "not a readable"),
    "shape overflow": (lambda _: archive({"a": entry(shape=(2**40, 2**40))}, bytes(8)), "not a readable"),
    "unknown dtype": (lambda _: archive({"a": entry("F32000")}, bytes(8)), "not a readable"),
    "quantized": (lambda _: archive({"a": entry("F8_E4M3", (8,))}, bytes(8)), "'a' has type F8_E4M3"),
    "no tensor": (lambda _: archive({}), "no floating-point tensor"),
    "integers only": (lambda _: archive({"a": entry("I32")}, bytes(8)), "no floating-point tensor"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_safetensors_are_named(kind: str, directory: Path) -> None:
    damage, message = DAMAGE[kind]
    path = directory / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    refused(directory, str(path), message)


def test_shards_are_read(sharded: Path) -> None:
    described = source.examine(sharded)
    assert [file.name for file in described.weights] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    model = models.load_dense(sharded).model
    inputs = tiny.inputs("ViTForImageClassification")
    assert torch.equal(model(**inputs)[0], tiny.build("ViTForImageClassification")(**inputs)[0])


@pytest.mark.parametrize("kind", ["parent", "absolute", "subfolder", "backslash", "other class", "empty"])
def test_an_index_that_points_elsewhere_is_refused(kind: str, sharded: Path) -> None:
    outside = sharded.parent / "outside.safetensors"
    shutil.copy(sharded / "model-00001-of-00002.safetensors", outside)
    (sharded / "sub").mkdir()
    shutil.copy(outside, sharded / "sub" / "outside.safetensors")
    shard = {
        "parent": "../outside.safetensors",
        "absolute": str(outside),
        "subfolder": "sub/outside.safetensors",
        "backslash": "..\\outside.safetensors",
        "other class": "config.json",
        "empty": "",
    }[kind]
    edit_index(sharded, **{"classifier.bias": shard})
    refused(sharded, INDEX, "'classifier.bias'", repr(shard), "refused")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, str(sharded / "model-00002-of-00002.safetensors"), "is missing")


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = (sharded / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    save_file(load_file(first) | {"classifier.bias": torch.ones(4)}, first)
    save_file(load_file(second) | {"classifier.bias": torch.zeros(4)}, second)
    refused(sharded, "'classifier.bias' is in two shards", first.name, second.name)


def test_an_index_that_names_the_wrong_shard_is_refused(sharded: Path) -> None:
    edit_index(sharded, **{"classifier.bias": "model-00002-of-00002.safetensors"})
    refused(sharded, INDEX, "'classifier.bias'", "model-00002-of-00002.safetensors, but it is not")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not json", "not valid JSON"),
        ("", "not valid JSON"),
        ("[]", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "'a' in 3"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' occurs twice"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_indexes_are_named(text: str, message: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, str(sharded / INDEX), message)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "preprocessor_config.json"])
def test_links_out_of_the_directory_are_refused(name: str, directory: Path) -> None:
    outside = directory.parent / "outside"
    (directory / name).rename(outside)
    (directory / name).symlink_to(outside)
    refused(directory, str(directory / name), "a link out of the checkpoint")


def test_a_linked_shard_is_refused(sharded: Path) -> None:
    outside = sharded.parent / "outside.safetensors"
    shard = sharded / "model-00001-of-00002.safetensors"
    shard.rename(outside)
    shard.symlink_to("../outside.safetensors")
    refused(sharded, str(shard), "a link out of the checkpoint")


def test_links_within_the_directory_are_followed(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "weights.bin")
    (directory / WEIGHTS).symlink_to("weights.bin")
    models.load_dense(directory)


def test_a_link_to_the_directory_is_followed(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(directory)
    models.load_dense(tmp_path / "link")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_links_to_nothing_or_themselves_are_refused(name: str, directory: Path) -> None:
    (directory / name).unlink()
    for target in (name, "nothing"):
        (directory / name).symlink_to(target)
        refused(directory, str(directory), "link" if name == "config.json" else "no readable weights")
        (directory / name).unlink()


def test_snapshots_of_the_hub_cache_link_to_blobs(directory: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--model" / "snapshots" / "0123abc"
    blobs = tmp_path / "models--someone--model" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    models.load_dense(snapshot)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(directory / "config.json")
    refused(snapshot, "a link out of the checkpoint")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no config.json"),
        ("", "not valid JSON"),
        ("{'single': 'quotes'}", "not valid JSON"),
        ("\xff\xfe", "not valid JSON"),
        ("[1]", "names no model_type"),
        ("{}", "names no model_type"),
        ('{"model_type": 3}', "names no model_type"),
        ('{"model_type": "vit", "model_type": "bert"}', "'model_type' occurs twice"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_configs_are_named(text: str | None, message: str, directory: Path) -> None:
    path = directory / "config.json"
    path.unlink()
    if text is not None:
        path.write_text(text, encoding="latin-1")
    refused(directory, str(directory), message)


def test_a_huge_config_is_not_read(directory: Path) -> None:
    with (directory / "config.json").open("r+b") as file:
        file.truncate(2**30)  # sparse
    refused(directory, "config.json", "not a configuration file")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_code_of_a_checkpoint_is_never_run(
    name: str, directory: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the user"))
    path = directory / name
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(config | {"auto_map": {"AutoModelForImageClassification": "evil.Model"}}))
    (directory / "evil.py").write_text(f"open({str(directory / 'ran')!r}, 'w')")
    refused(directory, str(path), "'auto_map'")
    assert not (directory / "ran").exists()
    assert capfd.readouterr() == ("", "")


def test_weights_chosen_by_the_config_are_refused(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    refused(directory, "'transformers_weights'")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take rights away from itself and get them back")
@pytest.mark.parametrize("name", [".", "config.json", WEIGHTS, "preprocessor_config.json"])
def test_unreadable_files_are_named(name: str, directory: Path) -> None:
    for parent in (directory.parent, *directory.parent.parents[:2]):
        parent.chmod(0o755)
    (directory / name).chmod(0)
    try:
        os.seteuid(65534)
        refused(directory, str(directory), "Permission denied")
    finally:
        os.seteuid(0)


def test_adapters_are_refused(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("{}")
    refused(directory, "PEFT adapter")


def to_bin(directory: Path, content: Any) -> Path:
    (directory / WEIGHTS).unlink()
    torch.save(content, directory / "pytorch_model.bin")
    return directory / "pytorch_model.bin"


def test_pickled_state_dicts_load(directory: Path) -> None:
    to_bin(directory, load_file(directory / WEIGHTS))
    described = source.examine(directory)
    assert not described.safetensors
    model = models.load_dense(directory).model
    inputs = tiny.inputs("ViTForImageClassification")
    assert torch.equal(model(**inputs)[0], tiny.build("ViTForImageClassification")(**inputs)[0])


def test_pickled_shards_load(directory: Path) -> None:
    split(directory, torch.save, "pytorch_model", "bin")
    assert len(source.examine(directory).weights) == 2
    models.load_dense(directory)


@pytest.mark.parametrize("entry", ["state_dict", "model_state_dict", "model"])
def test_the_state_dict_of_a_training_checkpoint_is_read(entry: str, directory: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in load_file(directory / WEIGHTS).items()}
    path = to_bin(directory, {entry: state, "epoch": 3, "optimizer": {"state": {0: torch.ones(3)}}})
    notes: list[str] = []
    model = models.load_dense(directory, warn=notes.append).model
    inputs = tiny.inputs("ViTForImageClassification")
    assert torch.equal(model(**inputs)[0], tiny.build("ViTForImageClassification")(**inputs)[0])
    assert any("'module.'" in note for note in notes)
    assert any(f"{path} is a training checkpoint" in note for note in notes)


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("plain", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(plain: bool, directory: Path) -> None:
    ran = directory / "ran"
    payload = {"classifier.bias": Malicious(f"touch {ran}")}
    path = to_bin(directory, payload)
    if plain:
        path.write_bytes(pickle.dumps(payload, protocol=2))
    message = refused(directory, str(path), "refused, nothing was run")
    assert "weights_only" not in message
    assert not ran.exists()


def test_a_whole_pickled_module_is_refused(directory: Path) -> None:
    path = to_bin(directory, tiny.build("ViTForImageClassification"))
    message = refused(directory, str(path), "refused, nothing was run")
    assert "weights_only" not in message


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"epoch": 3},
        {"net": {"classifier.bias": torch.ones(4)}},
        {entry: {"classifier.bias": torch.ones(4)} for entry in ("model", "state_dict")},
    ],
    ids=["list", "number", "unknown", "two"],
)
def test_a_training_checkpoint_is_not_a_state_dict(content: Any, directory: Path) -> None:
    refused(directory, str(to_bin(directory, content)), "not a state dict")


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 broken", b"\x80\x02", b"<html>login</html>"])
def test_damaged_pickles_are_named(data: bytes, directory: Path) -> None:
    path = to_bin(directory, {})
    path.write_bytes(data)
    message = refused(directory, str(path))
    assert "weights_only" not in message


def test_safetensors_are_preferred_to_pickles(directory: Path) -> None:
    ran = directory / "ran"
    torch.save(Malicious(f"touch {ran}"), directory / "pytorch_model.bin")
    models.load_dense(directory)
    assert not ran.exists()


def test_weights_of_other_frameworks_are_listed(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "tf_model.h5")
    refused(directory, "no readable weights", "tf_model.h5", "Convert")


def test_an_empty_directory_is_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), "has no config.json", "contains nothing")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "../x", "a/b/c", "~/no-such-model", "C:\\models\\x"])
def test_a_wrong_path_is_not_taken_for_a_hub_model(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        source.resolve(name)


def test_a_name_that_is_neither_folder_nor_model() -> None:
    with pytest.raises(CheckpointError, match=r"no such folder: 'no/such-model', and the local Hub cache has"):
        source.resolve("no/such-model", offline=True)
    with pytest.raises(CheckpointError, match=r"no such folder: 'my model', and it is not a Hub model id"):
        source.resolve("my model")


def test_a_file_is_not_a_directory(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file: give the directory"):
        source.resolve(directory / WEIGHTS)


def test_a_revision_of_a_local_folder_makes_no_sense(directory: Path) -> None:
    with pytest.raises(UsageError, match="'main'"):
        source.resolve(directory, revision="main")


@pytest.mark.slow
def test_the_hub_answers(directory: Path, tmp_path: Path) -> None:
    """Against a server on this machine: download without code, gated, unknown, wrong revision, unreachable, cached."""
    program = textwrap.dedent(
        """
        import hashlib, http.server, json, os, re, sys, threading, time
        from pathlib import Path

        files = {p.name: p.read_bytes() for p in Path(sys.argv[1]).iterdir()}
        files |= {"evil.py": b"1/0", "pytorch_model.bin": b"x", "sub/model.safetensors": b"y", "README.md": b"z"}
        commit = "a" * 40

        class Hub(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_): pass
            def answer(self, status, body=b"", **headers):
                self.send_response(status)
                for name, value in headers.items(): self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET": self.wfile.write(body)
            def do_HEAD(self): self.do_GET()
            def do_GET(self):
                path = self.path.partition("?")[0]
                if "/gated" in path: return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="gated")
                if "/unknown" in path: return self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="none")
                if "/broken" in path: return self.answer(400)
                if "revision/v9" in path or "tree/v9" in path:
                    return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="none")
                if path.startswith("/api/models/") and "/tree/" in path:
                    tree = [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                            for n, b in files.items()]
                    return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
                if path.startswith("/api/models/"):
                    info = {"id": "me/model", "sha": commit, "siblings": [{"rfilename": n} for n in files]}
                    return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
                name = re.sub("^/me/model/resolve/[^/]+/", "", path)
                if name not in files: return self.answer(404, X_Error_Code="EntryNotFound")
                etag = '"' + hashlib.sha1(files[name]).hexdigest() + '"'
                self.answer(200, files[name], ETag=etag, X_Repo_Commit=commit)

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        time.sleep = lambda _: None  # between retries
        os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

        from vitshrink.models import loading as models, source
        from vitshrink.errors import CheckpointError

        def attempt(name, **options):
            try: source.resolve(name, **options)
            except CheckpointError as error: print(error)

        attempt("me/gated")
        attempt("me/unknown")
        attempt("me/broken")
        attempt("me/model", revision="v9")
        loaded = models.load_dense("me/model")
        print(sorted(p.name for p in loaded.directory.iterdir()))
        server.shutdown()
        server.server_close()
        print(source.resolve("me/model", offline=True) == loaded.directory)
        attempt("me/model")
        attempt("me/other", offline=True)
        """
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    environment["PYTHONPATH"] = str(Path(source.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", program, str(directory)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    gated, unknown, broken, revision, listing, cached, unreachable, offline = result.stdout.splitlines()
    assert "'me/gated' is gated: accept its terms at" in gated
    assert "hf auth login" in gated
    assert "no such folder: 'me/unknown', and no such model on the Hub" in unknown
    assert "no such folder: 'me/broken', and the Hub cannot be reached" in broken
    assert "'me/model' has no revision 'v9'" in revision
    assert listing == "['config.json', 'model.safetensors', 'preprocessor_config.json']"
    assert cached == "True"
    assert "the Hub cannot be reached" in unreachable
    assert "use the copy in the local cache" in unreachable
    assert "the local Hub cache has no such model, and offline mode is on" in offline
