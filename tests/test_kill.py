"""Real processes that are killed at every step of a job, that share a cache, and that want the same output."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vitshrink.cli.app import app
from vitshrink.runtime.checksums import broken_files

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
STAGING = ".out.vitshrink-*"


class Job:
    """``vitshrink compress`` on the tiny ViT into ``folder / "out"``."""

    def __init__(self, folder: Path, model: Path, images: Path, *flags: str) -> None:
        self.folder = folder
        data = ("--calibration", str(images), "--samples", "16", "--holdout", "8", "--batch-size", "4")
        self.words = ["compress", str(model), str(folder / "out"), "--keep", "0.7", *data, *flags]

    def start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "vitshrink", *self.words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )

    def run_again(self) -> None:
        """The same command, to its end; in this process, which has everything imported."""
        result = CliRunner().invoke(app, self.words)
        assert result.exit_code == 0, result.output

    def staged(self) -> list[Path]:
        return list(self.folder.glob(STAGING))


def until_line(process: "subprocess.Popen[str]", beginning: str) -> None:
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith(beginning):
            return
    pytest.fail(f"the job never said {beginning!r}: {said}")


def until_file(process: "subprocess.Popen[str]", job: Job, name: str) -> None:
    while not any((staging / name).exists() for staging in job.staged()):
        if process.poll() is not None:
            return  # the last files are there for a moment only: then it is a kill after the end
        time.sleep(0.0005)


def digests(directory: Path) -> dict[str, tuple[str, int]]:
    """SHA-256 and time of change of every file."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(f): (hashlib.sha256(f.read_bytes()).hexdigest(), f.stat().st_mtime_ns) for f in files}


MOMENTS = {
    "while importing": lambda _process, _job: time.sleep(1),
    "when the output is claimed": lambda process, job: until_file(process, job, ""),
    "a moment later": lambda process, job: (until_file(process, job, ""), time.sleep(0.2)),
    "while calibrating": lambda process, _job: until_line(process, "Calibrating"),
    "when the weights appear": lambda process, job: until_file(process, job, "model.safetensors"),
    "while evaluating": lambda process, _job: until_line(process, "Evaluating"),
    "while publishing": lambda process, job: until_file(process, job, "SHA256SUMS"),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, vit_directory: Path, flat_images: Path) -> Path:
    """What the job writes when nobody disturbs it."""
    job = Job(tmp_path_factory.mktemp("reference"), vit_directory, flat_images)
    job.run_again()
    return job.folder / "out"


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_leaves_no_half_output_and_runs_again(
    moment: str, vit_directory: Path, flat_images: Path, reference: Path, tmp_path: Path
) -> None:
    """With an older output in its place, or, for every other moment, with none."""
    cache = tmp_path / "cache"
    job = Job(tmp_path, vit_directory, flat_images, "--overwrite", "--cache", str(cache))
    output = tmp_path / "out"
    replaces = list(MOMENTS).index(moment) % 2 == 1
    if replaces:
        shutil.copytree(reference, output)
        (output / "README.md").write_text("of an earlier day")
    before, source, images = digests(output), digests(vit_directory), digests(flat_images)

    process = job.start()
    try:
        MOMENTS[moment](process, job)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL or moment == "while publishing"

    assert (digests(vit_directory), digests(flat_images)) == (source, images)
    if moment != "while publishing":
        assert (output.exists(), digests(output)) == (replaces, before)
    elif output.exists() and digests(output) != before:
        assert not broken_files(output)
        assert weights(output) == weights(reference)

    job.run_again()
    assert not broken_files(output)
    assert weights(output) == weights(reference)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "cache"}
    assert (digests(vit_directory), digests(flat_images)) == (source, images)


def test_two_processes_share_a_cache(vit_directory: Path, flat_images: Path, reference: Path, tmp_path: Path) -> None:
    jobs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        jobs.append(Job(tmp_path / name, vit_directory, flat_images, "--cache", str(tmp_path / "cache")))
    processes = [job.start() for job in jobs]
    for process in processes:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        assert "cannot be used" not in stderr
        assert "could not be written" not in stderr
    assert [weights(job.folder / "out") == weights(reference) for job in jobs] == [True, True]
    assert all(file.suffix == ".safetensors" for file in (tmp_path / "cache").iterdir())


def test_of_two_processes_on_one_output_the_second_stops_at_once(
    vit_directory: Path, flat_images: Path, reference: Path, tmp_path: Path
) -> None:
    job = Job(tmp_path, vit_directory, flat_images)
    first = job.start()
    try:
        until_line(first, "Reading")  # the output is claimed before any data are read
        first.send_signal(signal.SIGSTOP)
        second = job.start()
        _, stderr = second.communicate(timeout=300)
        assert second.returncode == 1
        assert f"another vitshrink run writes to {tmp_path / 'out'}" in stderr
        assert "Reading" not in stderr
        assert len(job.staged()) == 1
        first.send_signal(signal.SIGCONT)
        _, stderr = first.communicate(timeout=300)
        assert first.returncode == 0, stderr
    finally:
        first.kill()
        first.communicate()
    assert weights(tmp_path / "out") == weights(reference)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
