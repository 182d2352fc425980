"""A whole sweep on tiny models: every file of its results, gates, the screen, and what a second run reuses."""

import csv
import html.parser
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tiny
import yaml
from click.testing import Result
from typer.testing import CliRunner

from vitshrink.cli.app import app
from vitshrink.config.options import CompressConfig
from vitshrink.jobs.compress import compress
from vitshrink.jobs.sweep import fingerprints
from vitshrink.jobs.sweep.results import FILES
from vitshrink.runtime.checksums import broken_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def sweep(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["sweep", *map(str, arguments)])


@pytest.fixture(scope="module")
def sweep_file(folder: Path, vit_directory: Path, learned_images: Path, flat_images: Path) -> Path:
    vit = {"name": "vit", "model": str(vit_directory), "calibration": str(flat_images), "eval": str(learned_images)}
    entries: dict[str, Any] = {
        "output": str(folder / "results"),
        "defaults": {"samples": 8, "batch_size": 8, "refine": 0},
        "matrix": {"model": [vit], "method": ["svd", "curvature"], "keep": [0.8]},
        "include": [{"name": "lost", "model": "no/such-model", "keep": 0.5, "method": "svd", "eval": "x"}],
        "gates": {"max_drop": 100, "max_size": "80kB"},
    }
    file = folder / "nightly.yaml"
    file.write_text(yaml.safe_dump(entries, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def done(sweep_file: Path) -> Result:
    return sweep(sweep_file)


def test_a_sweep_ends_with_one_table_and_says_what_failed(done: Result, folder: Path) -> None:
    assert done.exit_code == 1, done.stderr
    missed = "--max-size 80000 bytes is missed by"
    assert re.search(rf"^\[1/3\] vit-svd-keep-0.8: gate \([\d.]+ s; .*{missed}", done.stderr, re.M)
    assert re.search(r"^\[3/3\] lost: failed \(.*no such folder: 'no/such-model'", done.stderr, re.M)
    assert re.search(r"^vit-curvature-keep-0\.8 +gate +0\.\d+ +0\.08 +85\.0 ", done.stdout, re.M)
    assert f"error: vit-svd-keep-0.8: {missed}" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Saving and verifying" in (folder / "results" / "vit-svd-keep-0.8" / "log.txt").read_text()


def test_the_results_say_the_same_in_every_form(done: Result, folder: Path) -> None:
    results = folder / "results"
    document = json.loads((results / "results.json").read_text())
    assert document["exit_code"] == done.exit_code
    rows = {row["job"]: row for row in document["jobs"]}
    assert [row["status"] for row in rows.values()] == ["gate", "gate", "failed"]
    report = json.loads((results / "vit-svd-keep-0.8" / "model" / "report.json").read_text())
    row = rows["vit-svd-keep-0.8"]
    assert row["score"] == report["evaluation"]["compressed"]["top1"]
    assert (row["bytes"], row["parameters"]) == (report["bytes"]["compressed"], report["parameters"]["compressed"])
    assert (rows["lost"]["score"], rows["lost"]["directory"]) == (None, None)

    with (results / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(line["job"], line["status"]) for line in table] == [(name, r["status"]) for name, r in rows.items()]
    assert float(table[0]["kl"]) == row["kl"]

    summary = (results / "summary.md").read_text(encoding="utf-8")
    assert summary.startswith("### vitshrink sweep: 3 jobs, 2 gate, 1 failed\n")
    lines = [line for line in summary.splitlines() if line.startswith("|")]
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1
    assert "* **lost**: no such folder" in summary

    class Page(html.parser.HTMLParser):
        cells = 0

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.cells += tag == "td"
            assert tag != "script"
            assert not any(name in ("src", "href") and str(value).startswith("http") for name, value in attrs)

    page = Page()
    page.feed((results / "comparison.html").read_text(encoding="utf-8"))
    assert page.cells > 10


def test_ci_reads_every_job_as_a_test(done: Result, folder: Path) -> None:
    del done
    root = ElementTree.parse(folder / "results" / "junit.xml").getroot()
    assert root.tag == "testsuites"
    (suite,) = root
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "3",
        "failures": "2",
        "errors": "1",
        "skipped": "0",
    }
    cases = {case.get("name"): case for case in suite}
    failure = cases["vit-svd-keep-0.8"].find("failure")
    assert failure is not None
    assert str(failure.get("message")).startswith("--max-size 80000 bytes is missed by ")
    error = cases["lost"].find("error")
    assert error is not None
    assert "no such folder" in str(error.text)


def test_resuming_judges_again_and_runs_only_what_is_missing(done: Result, sweep_file: Path, folder: Path) -> None:
    del done
    entries = yaml.safe_load(sweep_file.read_text())
    del entries["include"]
    again = folder / "again.yaml"
    again.write_text(yaml.safe_dump(entries, sort_keys=False))
    weights = folder / "results" / "vit-svd-keep-0.8" / "model" / "model.safetensors"
    before = (weights.stat().st_mtime_ns, weights.read_bytes())
    refused = sweep(again)
    assert refused.exit_code == 1
    assert "pass --resume" in refused.stderr
    gate = sweep(again, "--resume")
    assert gate.exit_code == 3
    assert gate.stderr.count("found finished") == 2
    passed = sweep(again, "--resume", "--max-size", "1MB", "--json")
    assert (passed.exit_code, passed.stderr) == (0, "")
    assert [row["reused"] for row in json.loads(passed.stdout)["jobs"]] == [True, True]
    assert (weights.stat().st_mtime_ns, weights.read_bytes()) == before
    assert not broken_files(weights.parent)


def test_a_dry_run_lists_the_jobs_and_writes_nothing(sweep_file: Path, folder: Path) -> None:
    listed = sweep(sweep_file, "--dry-run", "--output", folder / "elsewhere", "--max-kl", "2")
    assert listed.exit_code == 0
    assert re.search(
        r"^vit-svd-keep-0\.8 +[0-9a-f]{12} +max_drop 100, max_kl 2, max_size 80000 +vit", listed.stdout, re.M
    )
    assert not (folder / "elsewhere").exists()
    as_json = json.loads(sweep(sweep_file, "--dry-run", "--json").stdout)
    assert [job["job"] for job in as_json] == ["vit-svd-keep-0.8", "vit-curvature-keep-0.8", "lost"]


@pytest.mark.slow
def test_a_terminal_shows_the_running_jobs_and_keeps_to_its_width(done: Result, sweep_file: Path, folder: Path) -> None:
    """40 columns, a real terminal: nothing may be wider, and the table is gone in the end."""
    del done
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "vitshrink", "sweep", str(sweep_file), "--resume"],
        stdout=subprocess.DEVNULL,
        stderr=follower,
        stdin=follower,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": "40", "TERM": "xterm"},
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(leader)
    assert process.wait() == 1
    text = shown.decode()
    assert "of 3 jobs ended" in text
    assert "\x1b[" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    live = [line for line in re.split(r"[\r\n]+", plain) if "jobs ended" in line or " s " in line[:30]]
    assert live
    assert all(len(line.rstrip()) <= 40 for line in live if not line.startswith("error"))


@pytest.mark.slow
def test_jobs_without_a_size_and_of_whole_attentions_have_rows(
    vit_directory: Path, flat_images: Path, tmp_path: Path
) -> None:
    shared = {"model": str(vit_directory), "calibration": str(flat_images)}
    file = tmp_path / "sweep.yaml"
    include = [
        {"name": "joint", **shared, "method": "qk-joint", "keep": 0.95},
        {"name": "maps", **shared, "landmarks": 4},
    ]
    defaults = {"samples": 8, "holdout": 8, "batch_size": 8}
    file.write_text(yaml.safe_dump({"output": str(tmp_path / "out"), "defaults": defaults, "include": include}))
    done = sweep(file, "--jobs", "2")
    assert done.exit_code == 0, done.stderr
    rows = {row["job"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["jobs"]}
    assert {name: row["size"] for name, row in rows.items()} == {"joint": "keep 0.95", "maps": "landmarks 4"}
    assert all((tmp_path / "out" / name).exists() for name in FILES)


def test_whatever_a_job_opens_is_in_its_fingerprint(vit_directory: Path, learned_images: Path, tmp_path: Path) -> None:
    """All files that Python opens below the inputs while a job runs; what is opened elsewhere, the weights, beside."""
    inputs = tmp_path / "inputs"
    model = Path(shutil.copytree(vit_directory, inputs / "model"))
    images = Path(shutil.copytree(learned_images, inputs / "images"))
    flat = tiny.write_images(inputs / "flat", 4, seed=3)
    tiny.write_images(inputs / "train" / tiny.IMAGE_CLASSES[0], 12, seed=4)
    (inputs / "recipe.yaml").write_text("kind: image\npath: train\n")
    truth = [f"{each.name} {tiny.IMAGE_CLASSES[0]}" for each in sorted(flat.iterdir())]
    (inputs / "truth.txt").write_text("\n".join(truth))
    (inputs / "classes.json").write_text(json.dumps({name: index for index, name in enumerate(tiny.IMAGE_CLASSES)}))
    config = CompressConfig.from_mapping(
        {
            "model": str(model),
            "output": str(tmp_path / "out"),
            "keep": 0.8,
            "method": "whitened",
            "calibration": str(inputs / "recipe.yaml"),
            "samples": 8,
            "holdout": 2,
            "eval": str(flat),
            "eval_labels": str(inputs / "truth.txt"),
            "class_map": str(inputs / "classes.json"),
            "finetune": {"objective": "supervised", "data": str(images), "samples": 16, "epochs": 1, "batch_size": 8},
        }
    )
    opened = {model / "model.safetensors"}
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and isinstance(arguments[0], str | Path):
            opened.add(Path(arguments[0]))

    sys.addaudithook(watch)
    compress(config)
    watching = False
    read = sorted(file for file in opened if file.is_file() and file.is_relative_to(inputs))
    beside = {"config.json", "preprocessor_config.json", "recipe.yaml", "truth.txt", "classes.json"}
    assert beside <= {file.name for file in read}
    assert {file.parent.parent for file in read} >= {images, inputs}
    (first,) = fingerprints([config])
    for file in read:
        content = file.read_bytes()
        file.write_bytes(b"x")
        assert fingerprints([config]) != [first], file
        file.write_bytes(content)
    assert fingerprints([config]) == [first]
