"""Outputs, caches, states, models and data by URL: whole or not at all, from whichever process or machine."""

import csv
import functools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import Result
from killing import compress_until
from typer.testing import CliRunner

from vitshrink.cli.app import app
from vitshrink.config.options import CompressConfig
from vitshrink.data import ImageError, decode_image, open_samples
from vitshrink.data.images import read_image_bytes
from vitshrink.errors import CheckpointError, DataError, DependencyError, OutputError, UsageError
from vitshrink.jobs.compress import compress
from vitshrink.jobs.sweep import fingerprints
from vitshrink.models.source import resolve
from vitshrink.runtime import checksums
from vitshrink.runtime.observer import Silent
from vitshrink.runtime.storage import MARKER, Place

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """What is to be published."""
    folder = tmp_path / "made"
    (folder / "sub").mkdir(parents=True)
    (folder / "report.json").write_text("{}")
    (folder / "sub" / "weights").write_bytes(os.urandom(100))
    checksums.record(folder)
    return folder


@pytest.fixture(params=["memory", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    stores = {"memory": f"memory://bucket/{time.time_ns()}", "file": f"file://{tmp_path}/there"}
    return Place.of(f"{stores[request.param]}/model")


# A place


def test_what_is_published_is_there_whole_and_replaces_what_was(place: Place, published: Path, tmp_path: Path) -> None:
    assert "SHA256SUMS is missing" in str(place.missing())
    (published / "old").write_text("of an earlier run")
    checksums.record(published)
    place.publish(published, "report.json")
    (published / "old").unlink()
    checksums.record(published)
    place.publish(published, "report.json")
    assert place.missing() is None
    assert set(place.names()) == {"report.json", "sub/weights", MARKER}
    place.download(tmp_path / "copy")
    assert not checksums.broken_files(tmp_path / "copy")
    siblings = Place(place.url, place.files, place.path.rpartition("/")[0])
    assert {name.partition("/")[0] for name in siblings.names()} == {"model"}, "the temporary name is gone"


def test_what_has_no_marker_or_misses_a_file_is_not_there(place: Place, published: Path, tmp_path: Path) -> None:
    place.publish(published, "report.json")
    place.remove("sub/weights")
    assert str(place.missing()).endswith("/model/sub/weights is missing.")
    place.publish(published, "report.json")
    place.put(published / "report.json", "sub/weights")
    with pytest.raises(OutputError, match="sub/weights was changed"):
        place.download(tmp_path / "changed")
    place.remove(MARKER)
    with pytest.raises(OutputError, match="contains nothing complete"):
        place.download(tmp_path / "none")


def test_a_failure_while_it_is_written_leaves_what_was(place: Place, published: Path, tmp_path: Path) -> None:
    place.publish(published, "report.json")
    before = place.read("sub/weights")
    (published / "sub" / "weights").write_bytes(b"new")
    checksums.record(published)
    (published / "sub" / "secret").symlink_to(tmp_path)  # which no store can hold
    (published / "z").write_text("x")
    os.chmod(published / "z", 0)
    if os.geteuid() == 0:
        (published / "z").unlink()
        (published / "z").symlink_to("/proc/self/mem")  # a file that cannot be read, also by the superuser
    with pytest.raises(OutputError):
        place.publish(published, "report.json")
    assert place.missing() is None
    assert place.read("sub/weights") == before


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("sftpx://host/folder", UsageError, "sftpx"),
        ("file:///tmp/a*", UsageError, "means several files"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Place.of(url)


def test_a_url_that_needs_a_package_names_it() -> None:
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(DependencyError, match="s3fs"):
            Place.of("s3://bucket/folder")


# A job


@pytest.fixture
def entries(tmp_path: Path, vit_directory: Path, flat_images: Path) -> dict[str, Any]:
    return {
        "model": str(vit_directory),
        "output": f"file://{tmp_path}/store/model",
        "cache": f"file://{tmp_path}/store/cache",
        "calibration": str(flat_images),
        "samples": 8,
        "holdout": 4,
        "method": "whitened",
        "keep": 0.8,
        "save_every": 0,
    }


class Log(Silent):
    """What a job says that it does."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    @contextmanager
    def stage(self, title: str, _total: int | None = None) -> Iterator[Callable[[int], None]]:
        self.titles.append(title)
        yield lambda _steps: None


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_an_output_by_url_is_that_of_a_path_and_can_be_loaded_and_verified(
    entries: dict[str, Any], tmp_path: Path
) -> None:
    compress(CompressConfig.from_mapping(entries))
    compress(CompressConfig.from_mapping({**entries, "output": str(tmp_path / "plain"), "cache": None}))
    store = tmp_path / "store"
    assert weights(store / "model") == weights(tmp_path / "plain")
    assert sorted(each.name for each in store.iterdir()) == ["cache", "model"]
    assert {each.suffix for each in (store / "cache").iterdir()} == {".safetensors"}
    assert weights(resolve(entries["output"])) == weights(tmp_path / "plain")
    assert run("verify", entries["output"]).exit_code == 0
    refused = run("compress", entries["model"], entries["output"], "--keep", "0.8", "--method", "svd")
    assert "exists and is not empty: choose another output, or pass --overwrite" in refused.stderr
    (config,) = [CompressConfig.from_mapping({**entries, "model": entries["output"]})]
    known = fingerprints([config])
    assert fingerprints([config]) == known
    (store / "model" / MARKER).unlink()
    assert fingerprints([config]) != known


@pytest.mark.slow
def test_a_job_killed_while_it_publishes_is_as_it_was_or_not_there_and_is_done_again(
    entries: dict[str, Any], tmp_path: Path
) -> None:
    entries |= {"cache": None, "save_every": 1000, "overwrite": True}
    compress(CompressConfig.from_mapping({**entries, "output": str(tmp_path / "plain")}))
    files = sum(1 for _ in (tmp_path / "plain").iterdir())
    place = Place.of(entries["output"])
    kill = functools.partial(compress_until, entries, "vitshrink.runtime.storage", "Place._move")
    kill(files - 1)  # all but one are there under their temporary name
    assert not place.exists()
    kill(2 * files - 1)  # all but the marker are at their place
    assert set(place.names()) == {each.name for each in (tmp_path / "plain").iterdir()} - {MARKER}
    with pytest.raises(CheckpointError, match="contains no complete model"):
        resolve(entries["output"])
    compress(CompressConfig.from_mapping({**entries, "keep": 0.7}))
    before = weights(tmp_path / "store" / "model")
    kill(files - 1)
    assert place.missing() is None
    assert weights(tmp_path / "store" / "model") == before
    compress(CompressConfig.from_mapping(entries))
    assert weights(tmp_path / "store" / "model") == weights(tmp_path / "plain")


@pytest.mark.slow
def test_a_job_goes_on_in_a_process_that_shares_no_disk(entries: dict[str, Any], tmp_path: Path) -> None:
    entries["cache"] = None  # which would keep the same for other jobs
    compress_until(entries, "vitshrink.jobs.compress", "write_result", 0)
    store = tmp_path / "store"
    assert list((store / ".model.vitshrink-state").glob("*.safetensors"))
    assert not (store / "model").exists()
    log = Log()
    compress(CompressConfig.from_mapping(entries), log)
    assert any(title.startswith("Continuing from") for title in log.titles)
    assert not [each for each in store.rglob("*") if each.is_file() and "state" in str(each)]
    compress(CompressConfig.from_mapping({**entries, "output": str(tmp_path / "plain"), "cache": None}))
    assert weights(store / "model") == weights(tmp_path / "plain")


# A sweep


@pytest.fixture
def sweep_file(tmp_path: Path, vit_directory: Path, flat_images: Path) -> Path:
    return tiny.write_sweep(tmp_path / "sweep.yaml", vit_directory, flat_images, "whitened")


VARYING = ("seconds", "reused", "latency_ratio")


def rows(results: str, output: str | Path) -> list[dict[str, str]]:
    found = list(csv.DictReader(results.splitlines()))
    return [{k: v.replace(str(output), "") for k, v in row.items() if k not in VARYING} for row in found]


def read(place: Place, name: str) -> str:
    content = place.read(name)
    assert content is not None, name
    return content.decode()


def check_sweep(file: Path, url: str, near: Path) -> None:
    """A sweep into a store is that into a folder; it goes on, and what shards wrote is gathered, by other processes."""
    assert run("sweep", file, "--output", near).exit_code == 1
    expected = rows((near / "results.csv").read_text(), near)
    store = Place.of(f"{url}/whole")
    assert run("sweep", file, "--output", store.url).exit_code == 1
    assert rows(read(store, "results.csv"), store.url) == expected
    assert read(store, "summary.md").count("gate") == (near / "summary.md").read_text().count("gate")
    for job in ("whitened-keep-0.9", "whitened-keep-0.7"):
        assert (store / job / "model").read("model.safetensors") == (
            near / job / "model" / "model.safetensors"
        ).read_bytes()
        assert "Saving and verifying" in read(store / job, "log.txt")
    refused = run("sweep", file, "--output", store.url)
    assert f"{store.url} is not empty: pass --resume" in refused.stderr
    again = subprocess.run(
        [sys.executable, "-m", "vitshrink", "sweep", str(file), "--output", store.url, "--resume"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert (again.returncode, again.stderr.count("found finished")) == (1, 2), again.stderr
    (store / "whitened-keep-0.7" / "model").remove(MARKER)
    gathered = run("sweep", file, "--output", store.url, "--collect", "--json")
    assert "1 of 3 jobs are missing" in gathered.stderr
    assert [row["status"] for row in json.loads(gathered.stdout)["jobs"]] == ["gate", "waiting", "failed"]
    assert run("sweep", file, "--output", store.url, "--shard", "2/3", "--resume").exit_code == 0
    assert run("sweep", file, "--output", store.url, "--collect").exit_code == 1
    assert rows(read(store, "results.csv"), store.url) == expected


@pytest.mark.slow
def test_a_sweep_into_a_store_is_that_into_a_folder(sweep_file: Path, tmp_path: Path) -> None:
    check_sweep(sweep_file, f"file://{tmp_path}/store", tmp_path / "near")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An object store that speaks S3, in a process of its own."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    pytest.importorskip("moto.server", reason='moto is not installed: pip install "moto[server]"')
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for name, value in {
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "FSSPEC_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    import s3fs

    store = s3fs.S3FileSystem(endpoint_url=f"http://127.0.0.1:{port}")
    for _ in range(300):
        try:
            store.mkdir("results")
            break
        except Exception:
            time.sleep(0.2)
    yield "s3://results/nightly"
    server.terminate()
    server.wait()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_sweep_into_an_object_store_is_that_into_a_folder(bucket: str, sweep_file: Path, tmp_path: Path) -> None:
    check_sweep(sweep_file, bucket, tmp_path / "near")


# Data


@pytest.mark.parametrize("place", ["memory", "file"], indirect=True)
def test_data_by_url_are_the_samples_of_a_path(
    place: Place, class_images: Path, text_file: Path, tmp_path: Path
) -> None:
    for file in (each for each in class_images.rglob("*") if each.is_file()):
        place.put(file, f"pets/val/{file.relative_to(class_images).as_posix()}")
    place.put(text_file, "texts/all.txt")
    (tmp_path / "table.csv").write_text(f"file_name,label\nval/{file.relative_to(class_images)},{file.parent.name}\n")
    place.put(tmp_path / "table.csv", "pets/table.csv")
    (tmp_path / "recipe.yaml").write_text(f"kind: text\npath: {place.url}/texts/all.txt\n")

    found = open_samples(f"{place.url}/pets:val", "image", flags="--eval-")
    assert found.source == f"{place.url}/pets:val"
    assert found.identity() == open_samples(class_images, "image").identity()
    (row,) = open_samples(f"{place.url}/pets/table.csv", "image").samples
    assert row.image is not None
    assert read_image_bytes(row.image) == file.read_bytes()
    for texts in (f"{place.url}/texts/all.txt", tmp_path / "recipe.yaml"):
        assert open_samples(texts, "text").identity() == open_samples(text_file, "text").identity()


def test_an_image_at_a_url_is_fetched_when_it_is_read(place: Place, flat_images: Path) -> None:
    for file in flat_images.iterdir():
        place.put(file, file.name)
    first, second, *_ = open_samples(place.url, "image").samples
    assert first.image is not None
    assert read_image_bytes(first.image)
    for file in flat_images.iterdir():
        place.remove(file.name)
    assert read_image_bytes(first.image), "once"
    assert second.image is not None
    with pytest.raises(ImageError, match=f"there is no file {place.url}/{second.key}"):
        decode_image(second.image)


@pytest.mark.parametrize(
    ("below", "kind", "error", "message"),
    [
        ("none", "text", DataError, "there is no file or folder {url}. Check the URL"),
        ("some.xyz", "text", DataError, "{url} is not a data file that vitshrink can read"),
        ("some.txt:val", "text", UsageError, "{file} is one file and has no splits"),
        ("some.txt", "image", DataError, "{url}"),
        ("recipe.yaml", "text", UsageError, "{url}: a recipe must be a file on this machine"),
    ],
)
def test_errors_of_data_by_url_name_the_url(
    place: Place, text_file: Path, below: str, kind: Any, error: type[Exception], message: str
) -> None:
    for name in ("some.txt", "some.xyz"):
        place.put(text_file, name)
    url = f"{place.url}/{below}"
    with pytest.raises(error) as raised:
        open_samples(url, kind)
    assert message.format(url=url, file=url.removesuffix(":val")) in str(raised.value)
    assert "vitshrink-data-" not in str(raised.value)


def test_a_job_on_data_by_url_is_that_on_a_path(entries: dict[str, Any], flat_images: Path, tmp_path: Path) -> None:
    store = Place.of(f"file://{tmp_path}/store/data")
    for file in flat_images.iterdir():
        store.put(file, file.name)
    there = {**entries, "calibration": store.url, "cache": None}
    compress(CompressConfig.from_mapping({**entries, "output": str(tmp_path / "plain"), "cache": None}))
    compress(CompressConfig.from_mapping(there))
    assert weights(tmp_path / "store" / "model") == weights(tmp_path / "plain")
    config = CompressConfig.from_mapping(there)
    known = fingerprints([config])
    assert fingerprints([config]) == known
    store.put(file, "another.png")
    assert fingerprints([config]) != known


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_shards_and_images_in_an_object_store_are_read(
    bucket: str, class_images: Path, text_file: Path, tmp_path: Path
) -> None:
    from datasets import Dataset

    Dataset.from_dict({"text": text_file.read_text().splitlines()}).to_parquet(tmp_path / "texts.parquet")
    store = Place.of(bucket)
    store.put(tmp_path / "texts.parquet", "texts/train-0.parquet")
    for file in (each for each in class_images.rglob("*") if each.is_file()):
        store.put(file, f"images/{file.relative_to(class_images).as_posix()}")
    assert open_samples(f"{bucket}/images", "image").identity() == open_samples(class_images, "image").identity()
    for name in ("texts", "texts/train-0.parquet"):
        shards = open_samples(f"{bucket}/{name}", "text")
        assert shards.fingerprint() == open_samples(text_file, "text").fingerprint()
    with pytest.raises(DataError, match="there is no file or folder s3://results/nightly/none"):
        open_samples(f"{bucket}/none", "text")
