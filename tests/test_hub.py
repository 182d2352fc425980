"""Publishing on the Hub, against a server on this machine that answers as the Hub does."""

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from click.testing import Result
from huggingface_hub import constants
from typer.testing import CliRunner

from vitshrink.cli.app import app
from vitshrink.report import figures

TOKEN = "hf_test"


@dataclass
class StandIn:
    """What was asked of the server, and the files of the commits that it accepted."""

    address: str = ""
    repositories: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0
    refuse_commits: bool = False


def handler(state: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, document: Any) -> None:
            content = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_GET(self) -> None:
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if self.path == "/api/whoami-v2":
                self.answer(*((200, {"name": "me", "type": "user"}) if known else (401, {"error": "Invalid token"})))
            else:
                self.answer(404, {"error": "not found"})

        def do_PUT(self) -> None:
            content = self.body()
            state.objects[hashlib.sha256(content).hexdigest()] = content
            self.answer(200, {})

        def do_POST(self) -> None:
            content = self.body()
            if self.path == "/api/repos/create":
                state.repositories.append(json.loads(content))
                self.answer(200, {"url": f"{state.address}/me/{state.repositories[-1]['name']}"})
            elif self.path == "/api/validate-yaml":  # the model card's front matter
                self.answer(200, {"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                modes = [
                    {
                        "path": entry["path"],
                        "uploadMode": "lfs" if entry["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for entry in json.loads(content)["files"]
                ]
                self.answer(200, {"files": modes})
            elif self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {**entry, "actions": {"upload": {"href": f"{state.address}/upload/{entry['oid']}"}}}
                    for entry in json.loads(content)["objects"]
                ]
                self.answer(200, {"transfer": "basic", "objects": objects})
            elif "/commit/" in self.path and not state.refuse_commits:
                state.commits += 1
                for line in content.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        state.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                    elif entry["key"] == "lfsFile":
                        state.files[entry["value"]["path"]] = state.objects[entry["value"]["oid"]]
                self.answer(200, {"commitUrl": f"{state.address}/me/small/commit/1", "commitOid": "1", "success": True})
            else:
                self.answer(403, {"error": f"you may not write to {self.path}"})

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    state = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(state))
    state.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", state.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(figures, "available", lambda: False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield state
    server.shutdown()
    server.server_close()


def shrink(model: Path, output: Path, *flags: str) -> Result:
    arguments = ["compress", str(model), str(output), "--method", "svd", "--keep", "0.8", *flags]
    return CliRunner().invoke(app, arguments)


def test_the_finished_directory_is_pushed_in_one_commit(hub: StandIn, vit_directory: Path, tmp_path: Path) -> None:
    result = shrink(vit_directory, tmp_path / "out", "--push-to-hub", "me/small", "--private")
    assert result.exit_code == 0, result.output
    assert hub.commits == 1
    assert hub.repositories[0]["name"] == "small"
    assert hub.repositories[0].get("private") or hub.repositories[0].get("visibility") == "private"
    here = {file.relative_to(tmp_path / "out").as_posix(): file for file in (tmp_path / "out").rglob("*")}
    assert hub.files.keys() == here.keys() >= {"model.safetensors", "recipe.yaml", "report.json", "README.md"}
    assert all(content == here[name].read_bytes() for name, content in hub.files.items() if name != "README.md")
    assert b'from_pretrained("me/small")' in hub.files["README.md"]
    assert f"{hub.address}/me/small" in result.output


def test_a_push_that_fails_keeps_the_result(hub: StandIn, vit_directory: Path, tmp_path: Path) -> None:
    hub.refuse_commits = True
    result = shrink(vit_directory, tmp_path / "out", "--push-to-hub", "me/small", "--json")
    assert result.exit_code == 1
    assert f"hf upload me/small {tmp_path / 'out'}" in result.stderr
    assert json.loads(result.stdout)["parameters"]["kept"] <= 0.8
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not hub.files


@pytest.mark.parametrize(
    ("flags", "token", "message"),
    [
        (("me/small",), "", "needs a token"),
        (("me/small",), "hf_wrong", "rejects the token"),
        (("not an id",), TOKEN, "give the id of a Hub model"),
        (("me/small", "--offline"), TOKEN, "needs the network"),
        (("me/small", "--keep", "0.7"), TOKEN, "give one size"),
        (("me/small", "--dry-run"), TOKEN, "remove --dry-run"),
    ],
)
def test_what_cannot_be_pushed_stops_before_the_work(
    hub: StandIn,
    vit_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    token: str,
    message: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("vitshrink.models.hub.get_token", lambda: token or None)
    result = shrink(vit_directory, tmp_path / "out", "--push-to-hub", *flags)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not hub.repositories
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_asked_of_the_hub_without_the_flag(hub: StandIn, vit_directory: Path, tmp_path: Path) -> None:
    assert shrink(vit_directory, tmp_path / "out").exit_code == 0
    assert not hub.repositories
