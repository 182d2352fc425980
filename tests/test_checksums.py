"""Checksums of a published directory: what was changed, lost or added shows, texts for people may be edited."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vitshrink.runtime import checksums


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    (root / "1_Pooling").mkdir(parents=True)
    foreign = os.fsdecode("ünï code.txt".encode())  # whatever the locale
    for name in ("config.json", "model.safetensors", "1_Pooling/config.json", foreign, "README.md"):
        (root / name).write_bytes(b"content of " + os.fsencode(name))
    checksums.record(root)
    return root


@pytest.mark.parametrize("name", ["new\nline", "back\\slash\\n", "a\rb", "u\u2028v\x85w\x0b", "caf\udce9", " ", "\\"])
def test_a_file_of_any_name_is_recorded_as_sha256sum_does(directory: Path, name: str) -> None:
    (directory / name).write_text("any")
    checksums.record(directory)
    assert checksums.broken_files(directory) == {}
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=directory, check=True)
    (directory / name).unlink()
    assert checksums.broken_files(directory) == {name: "is missing"}


def test_an_untouched_directory_is_whole_and_sha256sum_agrees(directory: Path) -> None:
    assert checksums.broken_files(directory) == {}
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=directory, check=True)


def test_whatever_happens_to_a_file_shows(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"X")
    (directory / "config.json").unlink()
    (directory / "1_Pooling" / "new.bin").touch()
    (directory / "README.md").write_text("my own words")
    assert checksums.broken_files(directory) == {
        "model.safetensors": "was changed",
        "config.json": "is missing",
        "1_Pooling/new.bin": "was added",
    }


@pytest.mark.parametrize("text", ["", "garbage", f"{'0' * 64}  ../outside", f"{'0' * 64}  /etc/passwd", "\xff"])
def test_a_list_that_makes_no_sense_is_a_problem_of_its_own(text: str, directory: Path) -> None:
    (directory / "SHA256SUMS").write_text(text, encoding="latin-1")
    assert list(checksums.broken_files(directory)) == ["SHA256SUMS"]
