"""Data sets on the Hub, read from a small stand-in that speaks its protocol on this machine."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from datasets.utils import disable_progress_bars

from vitshrink.data import open_samples
from vitshrink.errors import DataError

pytestmark = pytest.mark.slow

disable_progress_bars()

REVISION = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Serves the repositories below ``root``; ``owner/locked`` is gated, and the shards of ``owner/broken`` fail."""

    protocol_version = "HTTP/1.1"
    root: Path
    requested: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.requested.append(self.path)
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        api = parts[0] == "api"
        kind, owner, name, *rest = [*parts[api:], "", "", ""][: max(3, len(parts) - api)]
        folder = self.root / owner / name
        if kind != "datasets" or not folder.is_dir():
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        if name == "locked":
            return self.answer(401, {"X-Error-Code": "GatedRepo"})
        if api and (not rest or rest[0] == "revision"):
            return self.answer_json({"id": f"{owner}/{name}", "sha": REVISION, "siblings": [], "tags": []})
        path = folder.joinpath(*rest[2:])
        if api and rest[0] == "tree" and path.is_dir():
            found = path.rglob("*") if "recursive=true" in self.path.lower() else path.iterdir()
            return self.answer_json([self.entry(folder, below) for below in sorted(found)])
        if not api and path.is_file():
            return self.answer(503, {}) if name == "broken" else self.answer_file(path)
        return self.answer(404, {"X-Error-Code": "EntryNotFound"})

    def entry(self, folder: Path, path: Path) -> dict[str, Any]:
        name = str(path.relative_to(folder))
        if path.is_dir():
            return {"type": "directory", "oid": REVISION, "size": 0, "path": name}
        return {"type": "file", "oid": content_hash(path.read_bytes()), "size": path.stat().st_size, "path": name}

    def answer_json(self, content: object) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def answer_file(self, path: Path) -> None:
        data = path.read_bytes()
        headers = {"ETag": f'"{content_hash(data)}"', "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is None:
            return self.answer(200, headers, data)
        first, last = wanted.removeprefix("bytes=").split("-")
        start, end = int(first), min(int(last or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        return self.answer(206, headers, data[start : end + 1])

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**headers, "X-Repo-Commit": REVISION, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def content_hash(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


SCRIPT = """
import json, sys, time
time.sleep = lambda seconds: None  # between the attempts to reach a server
import datasets.config
from vitshrink.data import open_samples
from vitshrink.errors import DataError

datasets.config.STREAMING_READ_MAX_RETRIES = 1

def attempt(action):
    try:
        return action()
    except DataError as error:
        return f"DataError: {error}"

def contents(samples):
    return [[s.key, s.text, s.label] for s in samples.samples]

results = {}
exec(sys.stdin.read())
json.dump(results, sys.stdout)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, flat_images: Path) -> Path:
    root = tmp_path_factory.mktemp("hub")
    encoded = [{"bytes": file.read_bytes(), "path": None} for file in sorted(flat_images.iterdir())[:6]]
    pictures = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    reviews = Features({"sentence": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    for split, count in (("train", 6), ("validation", 4)):
        files = (root / "owner" / "pictures" / "data", root / "owner" / "reviews" / "films")
        for folder in files:
            folder.mkdir(parents=True, exist_ok=True)
        labels = [number % 2 for number in range(count)]
        table = Dataset.from_dict({"image": encoded[:count], "label": labels}, features=pictures)
        table.to_parquet(files[0] / f"{split}-00000-of-00001.parquet")
        lines = [f"{split} {number}" for number in range(count)]
        table = Dataset.from_dict({"sentence": lines, "label": labels}, features=reviews)
        table.to_parquet(files[1] / f"{split}-00000-of-00001.parquet")
    (root / "owner" / "reviews" / "README.md").write_text(
        "---\nconfigs:\n- config_name: films\n  data_files:\n  - split: train\n    path: films/train-*\n"
        "  - split: validation\n    path: films/validation-*\n"
        "- config_name: books\n  data_files:\n  - split: train\n    path: films/train-*\n---\n"
    )
    shutil.copytree(root / "owner" / "pictures", root / "owner" / "broken")
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            folder = root / "owner" / "folders" / split / name
            folder.mkdir(parents=True)
            (folder / f"{number}.png").write_bytes(encoded[number]["bytes"])
    (root / "owner" / "locked").mkdir()
    (root / "owner" / "aggregated").mkdir()
    return root


class Answers:
    """Runs code against the stand-in, with ``results`` returned, and notes what was asked of it."""

    def __init__(self, hub: Path, cache: Path, server: ThreadingHTTPServer, handler: type[Hub]) -> None:
        self.hub, self.cache, self.server, self.handler = hub, cache, server, handler

    def __call__(self, code: str, **environment: str) -> Any:
        self.handler.requested.clear()
        settings = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
            "HF_HOME": str(self.cache),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            **environment,
        }
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            input=code,
            env=settings,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)


@pytest.fixture
def ask(hub: Path, tmp_path: Path) -> Iterator[Answers]:
    handler = type("Handler", (Hub,), {"root": hub, "requested": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Answers(hub, tmp_path / "cache", server, handler)
    server.shutdown()
    server.server_close()
    thread.join()


def test_some_samples_are_streamed_and_all_are_downloaded_once(ask: Answers) -> None:
    results = ask("""
samples = open_samples("owner/reviews/films:validation", "text")
results["kind"] = [samples.labels_are, samples.label_names, samples.source]
results["drawn"] = contents(samples.select(3, seed=0))
results["again"] = contents(samples.select(3, seed=0))
results["rest"] = contents(samples.select(3, seed=0, skip=3))
results["all"] = contents(samples)
""")
    assert results["kind"] == ["names", ["bad", "good"], "owner/reviews/films:validation"]
    assert results["drawn"] == results["again"]
    assert results["drawn"][0][0] == "streamed row 1"
    lines = [text for _, text, _ in results["drawn"] + results["rest"]]
    assert sorted(lines) == [f"validation {number}" for number in range(4)]
    expected = [[f"row {n + 1}", f"validation {n}", n % 2] for n in range(4)]
    assert results["all"] == expected
    stored = [file.name for file in ask.cache.rglob("*.arrow")]
    assert any("validation" in name for name in stored)
    assert not any("train" in name for name in stored)

    again = ask("results['all'] = contents(open_samples('owner/reviews/films:validation', 'text', offline=True))")
    assert again["all"] == expected
    assert ask.handler.requested == []


def test_samples_are_held_out_of_a_stream_without_downloading_it(ask: Answers) -> None:
    results = ask("""
from vitshrink.data.opening import hold_out
from vitshrink.runtime.observer import Job, Silent
def held_out(spec, kind, samples, calibrated):
    job = Job(Silent())
    found = hold_out(open_samples(spec, kind), job, samples=samples, calibrated=calibrated, holdout=2, seed=0)
    return [None if found is None else contents(found), job.warnings]
for calibrated in (True, False):
    results[f"some left {calibrated}"] = held_out("owner/reviews/films:validation", "text", 2, calibrated)
    results[f"none left {calibrated}"] = held_out("owner/reviews/films:validation", "text", 4, calibrated)
results["broken"] = attempt(lambda: held_out("owner/broken:train", "image", 1, True))
""")
    assert not list(ask.cache.rglob("*.arrow"))
    assert results["some left True"] == results["some left False"]
    assert len(results["some left True"][0]) == len(results["none left False"][0]) == 2
    assert results["none left True"][0] is None
    assert "all samples were used for calibration" in results["none left True"][1][0]
    assert results["broken"].startswith("DataError: owner/broken:train")


def test_images_of_the_hub_are_decoded_by_vitshrink(ask: Answers, flat_images: Path) -> None:
    results = ask("""
for name in ("pictures:validation", "folders:test"):
    samples = open_samples(f"owner/{name}", "image")
    results[name] = [samples.label_names, *(s.label for s in samples.samples)]
    results[f"all {name}"] = [digest.hex() for digest in samples.digests]
    results[f"some {name}"] = [digest.hex() for digest in samples.select(4, seed=1).digests]
""")
    expected = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(flat_images.iterdir())[:4]]
    assert results["pictures:validation"] == [["cat", "dog"], 0, 1, 0, 1]
    assert results["all pictures:validation"] == expected
    assert sorted(results["some pictures:validation"]) == sorted(expected)
    assert results["folders:test"] == [["cat", "dog"], 0, 1]
    assert results["all folders:test"] == expected[:2]
    assert sorted(results["some folders:test"]) == sorted(expected[:2])


def test_what_is_not_to_be_had_is_explained(ask: Answers) -> None:
    results = ask("""
for spec in ("owner/locked:train", "owner/nothing:train", "owner/aggregatid", "owner/reviews:train",
             "owner/reviews/films", "owner/reviews/films:validate", "owner/reviews/plays:train"):
    results[spec] = attempt(lambda: contents(open_samples(spec, "text")))
results["column"] = attempt(lambda: open_samples("owner/reviews/films:train", "text", label_column="lable"))
results["offline"] = attempt(lambda: open_samples("owner/reviews/films:train", "text", offline=True))
results["broken"] = attempt(lambda: open_samples("owner/broken:train", "image").select(2, 0))
results["offline, no split"] = attempt(lambda: open_samples("owner/reviews/films", "text", offline=True))
""")
    assert "is gated: accept the terms at https://huggingface.co/datasets/owner/locked" in results["owner/locked:train"]
    assert "hf auth login" in results["owner/locked:train"]
    assert "local folder" in results["owner/locked:train"]
    for spec in ("owner/nothing:train", "owner/aggregatid"):
        assert f"there is no data set '{spec.partition(':')[0]}' on the Hub" in results[spec]
        assert "imagenet-1k" in results[spec]
    assert "films" in results["owner/reviews:train"]
    assert "books" in results["owner/reviews:train"]
    assert (
        "has the splits train, validation: choose one, such as owner/reviews/films:validation"
        in results["owner/reviews/films"]
    )
    assert "Did you mean 'validation'" in results["owner/reviews/films:validate"]
    assert "plays" in results["owner/reviews/plays:train"]
    assert "no column 'lable'. Did you mean 'label'" in results["column"]
    assert "the local cache does not contain it" in results["offline"]
    assert "name the split as well" in results["offline, no split"]
    assert results["broken"].startswith("DataError: owner/broken:train")


def test_the_environment_variable_means_offline() -> None:
    with pytest.raises(
        DataError, match="owner/name:train is not a local path, and the local cache does not contain it"
    ):
        open_samples("owner/name:train", "text")  # HF_HUB_OFFLINE=1 holds for all tests


def test_a_hub_out_of_reach_is_explained(ask: Answers) -> None:
    results = ask(
        "results['x'] = attempt(lambda: open_samples('owner/pictures:train', 'image'))",
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HUB_OFFLINE="0",
    )
    assert "cannot reach the Hub for owner/pictures:train" in results["x"]
    assert "pass a local folder" in results["x"]
