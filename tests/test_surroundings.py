"""What a job runs in: outputs that are full, closed or read by nobody, folders that cannot be used, odd terminals."""

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

from vitshrink.cli import main
from vitshrink.jobs.compress import CompressionResult
from vitshrink.report import figures
from vitshrink.runtime.checksums import broken_files

Compressed = Callable[..., CompressionResult]
Command = Callable[[Path], tuple[str | Path, ...]]

SMALL = ("--keep", "0.8", "--method", "svd")
FEW = ("--samples", "8", "--holdout", "0", "--points", "3")

COMMANDS: dict[str, Command] = {
    "help": lambda _: ("--help",),
    "version": lambda _: ("--version",),
    "methods": lambda _: ("methods",),
    "inspect": lambda at: ("inspect", at / "model"),
    "inspect --json": lambda at: ("inspect", at / "model", "--json"),
    "frontier": lambda at: ("frontier", at / "model", "--calibration", at / "photos", *FEW),
    "frontier --json": lambda at: ("frontier", at / "model", "--calibration", at / "photos", *FEW, "--json"),
    "compress": lambda at: ("compress", at / "model", at / "out", *SMALL),
    "compress --json": lambda at: ("compress", at / "model", at / "out", *SMALL, "--json"),
    "compress --dry-run": lambda at: ("compress", at / "model", at / "out", *SMALL, "--dry-run"),
    "eval": lambda at: ("eval", at / "small", "--data", at / "photos", "--baseline", at / "model"),
    "eval --json": lambda at: ("eval", at / "small", "--data", at / "photos", "--baseline", at / "model", "--json"),
    "finetune": lambda at: (
        ("finetune", at / "small", at / "out", "--teacher", at / "model", "--data", at / "photos", "--epochs", "1")
    ),
    "quantize": lambda at: ("quantize", at / "model", at / "out"),
    "export": lambda at: ("export", at / "small", at / "out", "--to", "dense"),
    "verify": lambda at: ("verify", at / "small"),
    "verify --json": lambda at: ("verify", at / "small", "--json"),
    "report": lambda at: ("report", at / "small"),
    "sweep": lambda at: ("sweep", at / "sweep.yaml", "--dry-run"),
    "sweep --json": lambda at: ("sweep", at / "sweep.yaml", "--dry-run", "--json"),
}


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "available", lambda: False)


@pytest.fixture
def place(compressed: Compressed, vit_directory: Path, flat_images: Path, tmp_path: Path) -> Path:
    """What the commands name."""
    small = compressed("ViTForImageClassification", method="svd").directory
    assert small is not None
    shutil.copytree(small, tmp_path / "small")
    (tmp_path / "model").symlink_to(vit_directory)
    (tmp_path / "photos").symlink_to(flat_images)
    sweep = {"output": str(tmp_path / "sweep"), "matrix": {"keep": [0.8]}}
    (tmp_path / "sweep.yaml").write_text(
        json.dumps(sweep | {"defaults": {"model": str(vit_directory), "method": "svd"}})
    )
    return tmp_path


@contextlib.contextmanager
def full() -> Iterator[TextIO]:
    with contextlib.suppress(OSError), Path("/dev/full").open("w") as stream:
        yield stream


@contextlib.contextmanager
def unread() -> Iterator[TextIO]:
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(OSError), os.fdopen(writer, "w") as stream:
        yield stream


@contextlib.contextmanager
def closed() -> Iterator[None]:
    """How Python starts behind ``>&-``."""
    yield None


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path, **streams: Any) -> int:
    """The exit code of the command with other standard streams."""
    monkeypatch.setattr(sys, "argv", ["vitshrink", *map(str, arguments)])
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit) as end:
        main()
    for stream in (sys.stdout, sys.stderr):
        if stream.name == os.devnull:  # opened in the place of a closed one until the process ends
            stream.close()
    monkeypatch.undo()
    return int(end.value.code or 0)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("behind", [full, unread, closed])
def test_what_stdout_does_not_take_stops_no_command(
    place: Path, monkeypatch: pytest.MonkeyPatch, command: str, behind: Callable[[], Any]
) -> None:
    monkeypatch.setattr(figures, "available", lambda: False)
    with behind() as output, (place / "stderr").open("w") as errors:
        code = run(monkeypatch, *COMMANDS[command](place), stdout=output, stderr=errors)
    said = (place / "stderr").read_text()
    assert "bug" not in said
    assert code == (1 if behind is full else 0), said
    if behind is full:
        told = "error: the results could not be written to the standard output: No space left on device.\n"
        assert said.endswith(told)
    assert ("/out" in str(COMMANDS[command](place)) and "--dry-run" not in command) == (place / "out").is_dir()


@pytest.mark.parametrize("behind", [full, unread, closed])
def test_a_job_ends_well_where_nobody_can_be_told(
    place: Path, monkeypatch: pytest.MonkeyPatch, behind: Callable[[], Any]
) -> None:
    with behind() as errors, (place / "stdout").open("w") as output:
        code = run(monkeypatch, *COMMANDS["compress"](place), stdout=output, stderr=errors)
    assert code == 0
    assert "Parameters" in (place / "stdout").read_text()
    with behind() as errors:
        assert run(monkeypatch, *COMMANDS["compress"](place), stderr=errors) == 1  # the output exists


def test_a_bound_that_is_missed_keeps_its_code(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with full() as output, (place / "stderr").open("w") as errors:
        gate = (*COMMANDS["eval"](place), "--max-size", "1kB")
        assert run(monkeypatch, *gate, stdout=output, stderr=errors) == 3


@pytest.mark.slow
def test_real_processes_end_well_behind_closed_descriptors_and_pipes(place: Path) -> None:
    """With nothing of Python's own at the end either, such as an exception that is ignored, or the code 120."""
    full_disk = "error: the results could not be written to the standard output: No space left on device.\n"
    for line, code, said in (
        ("set -o pipefail; vitshrink methods | head -1", 0, ""),
        ("vitshrink methods > /dev/full", 1, full_disk),
        (f"vitshrink compress {place}/model {place}/out --keep 0.8 --method svd <&- >&- 2>&-", 0, ""),
    ):
        done = subprocess.run(
            ["bash", "-c", f'vitshrink() {{ "{sys.executable}" -m vitshrink "$@"; }}; {line}'],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
            check=False,
        )
        assert (done.returncode, done.stderr) == (code, said)
    assert not broken_files(place / "out")


def test_a_disk_that_is_full_is_named_and_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the size of files is met like the end of a disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (place / "stderr").open("w") as errors:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            code = run(monkeypatch, *COMMANDS["compress"](place), stderr=errors)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = (place / "stderr").read_text()
    assert code == 1
    assert "bug" not in said
    assert "error: cannot write" in said
    assert not list(place.glob("*out*"))


@pytest.mark.parametrize("odd", ["file", "null"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_any_work(
    place: Path, monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    (place / "file").write_text("")
    (place / "null").symlink_to("/dev/null")
    folder = place / odd / "below"
    calibration = ("--calibration", place / "photos")
    commands: dict[str, tuple[str | Path, ...]] = {
        "--cache": ("compress", place / "model", place / "out", "--keep", "0.8", *calibration),
        "--checkpoints": (*COMMANDS["finetune"](place),),
        "--csv": (*COMMANDS["eval"](place),),
        "--figures": ("inspect", place / "model", *calibration),
        "--output": ("sweep", place / "sweep.yaml"),
    }
    for flag, command in commands.items():
        with (place / "stderr").open("w") as errors:
            assert run(monkeypatch, *command, flag, folder, stderr=errors) == 1
        said = (place / "stderr").read_text()
        assert re.search("^error: .*below", said, re.MULTILINE)
        assert not re.search("bug|Reading|Evaluating|Calibrating", said)
    assert not (place / "out").exists()


def test_a_home_in_which_no_data_can_be_kept_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes only small files."""
    import datasets

    (place / "home").mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "home")
    images = [{"bytes": file.read_bytes(), "path": None} for file in sorted((place / "photos").iterdir())[:3]]
    datasets.Dataset.from_dict({"image": images}).to_parquet(place / "photos.parquet")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (place / "stderr").open("w") as errors:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, before[1]))
        try:
            data = ("--data", place / "photos.parquet", "--baseline", place / "model")
            code = run(monkeypatch, "eval", place / "small", *data, stderr=errors)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    assert "set HF_HOME" in (place / "stderr").read_text()


@pytest.mark.parametrize("columns", ["0", "1", "-5", "many", "99999"])
def test_an_odd_terminal_is_no_reason_to_fail(place: Path, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    for command in ("help", "methods", "inspect", "compress --dry-run", "verify", "sweep"):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setenv("TERM", "dumb")
        with (place / "stdout").open("w") as output, (place / "stderr").open("w") as errors:
            assert run(monkeypatch, *COMMANDS[command](place), stdout=output, stderr=errors) == 0
        assert (place / "stdout").read_text()
