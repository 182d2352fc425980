"""A sweep on a Ray cluster of two nodes, one of which is killed in the middle: the results are those of one machine."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

pytest.importorskip("ray", reason='ray is not installed: pip install "vitshrink[ray]"')
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
print(cluster.address, second.all_processes["raylet"][0].process.pid, flush=True)
for line in sys.stdin:
    cluster.remove_node(second, allow_graceful=False)
cluster.shutdown()
"""


@pytest.fixture
def cluster() -> Iterator["subprocess.Popen[str]"]:
    """Two nodes with a processor each; a line on stdin kills the second. It says its address, and a process there."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_health_check_timeout_ms": "3000"},
    )
    yield process
    process.communicate(timeout=120)


def start(*arguments: str | Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "vitshrink", "sweep", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def sweep_file(tmp_path: Path, vit_directory: Path, flat_images: Path) -> Path:
    entries: dict[str, Any] = {
        "defaults": {
            "model": str(vit_directory),
            "calibration": str(flat_images),
            "samples": 8,
            "holdout": 4,
            "save_every": 0,
            "cache": None,
            "refine": 20,
        },
        "matrix": {"method": ["whitened", "curvature"], "keep": [0.8]},
        "gates": {"max_size": "1MB"},
        "resources": {"cpus": 1, "memory": "100MB"},
    }
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(entries, sort_keys=False))
    return file


def jobs_of(node: int, output: str) -> list[tuple[str, int]]:
    """The jobs whose processes a node has started, with these."""
    found = []
    for process in psutil.Process(node).children(recursive=True):
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if "--config" in line:
            model = str(yaml.safe_load(Path(line[-1]).read_text())["output"])
            assert model.startswith(output)
            found.append((model.split("/")[-2], process.pid))
    return found


def until(condition: Any, seconds: float = 300) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def rows(folder: Path, output: str) -> list[dict[str, Any]]:
    with (folder / "results.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    varying = ("seconds", "latency_ratio")
    return [{name: value.replace(output, "") for name, value in row.items() if name not in varying} for row in found]


@pytest.mark.parametrize("scheme", ["", "file://"], ids=["path", "url"])
def test_a_job_whose_node_is_killed_goes_on_elsewhere_and_ends_in_the_same_bytes(
    scheme: str, cluster: "subprocess.Popen[str]", sweep_file: Path, tmp_path: Path
) -> None:
    """Into a directory that both nodes see, and into a store, through which alone they know of each other."""
    assert cluster.stdin is not None
    assert cluster.stdout is not None
    address, node = cluster.stdout.readline().split()
    far, near = tmp_path / "far", tmp_path / "near"
    on_ray = start(sweep_file, "--output", f"{scheme}{far}", "--engine", "ray", "--address", address)
    [(job, process)] = until(lambda: jobs_of(int(node), f"{scheme}{far}"))
    until(lambda: list((far / job).glob(".model.vitshrink-state/*.safetensors")))
    cluster.stdin.write("kill\n")
    cluster.stdin.flush()
    output, said = on_ray.communicate(timeout=600)
    assert on_ray.returncode == 0, said
    assert not psutil.pid_exists(process), "what the lost node ran is gone"
    assert f"{job}: running (its machine was lost, so it runs again: " in said
    assert "raylet" not in output + said, "Ray has nothing to say here"
    log = (far / job / "log.txt").read_text()
    assert "The machine was lost; it is run again on" in log
    assert "Continuing from the saved state" in log
    on_this = start(sweep_file, "--output", near)
    on_this.communicate(timeout=600)
    assert on_this.returncode == 0
    assert rows(far, f"{scheme}{far}") == rows(near, str(near))
    assert (far / "summary.md").exists()
    for name in (row["job"] for row in rows(near, str(near))):
        weights = Path(name) / "model" / "model.safetensors"
        assert (far / weights).read_bytes() == (near / weights).read_bytes(), name


def test_limits_and_interruptions_end_the_jobs_of_a_cluster_and_the_sweep_goes_on(
    sweep_file: Path, tmp_path: Path
) -> None:
    """On a cluster that the sweep starts itself, on this machine."""
    output = tmp_path / "out"
    late = start(sweep_file, "--output", output, "--engine", "ray", "--time-limit", "1s", "--jobs", "1", "--fail-fast")
    said = late.communicate(timeout=600)[1]
    assert late.returncode == 1, said
    assert "took longer than 1 s" in said
    again = start(sweep_file, "--output", output, "--engine", "ray", "--resume", "--jobs", "1")
    until(lambda: list(output.glob("*/.model.vitshrink-state/*.safetensors")))
    again.send_signal(signal.SIGINT)
    again.communicate(timeout=120)
    assert again.returncode == 130
    assert str(output) not in " ".join(
        " ".join(each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])
    )
    last = start(sweep_file, "--output", output, "--engine", "ray", "--resume", "--json", "--max-size", "1")
    told = last.communicate(timeout=600)
    assert last.returncode == 3, told
    assert [row["status"] for row in json.loads(told[0])["jobs"]] == ["gate", "gate"]
    assert "Continuing from" in "".join(log.read_text() for log in output.glob("*/log.txt"))


def test_what_the_cluster_lacks_is_refused_before_any_job(sweep_file: Path, tmp_path: Path) -> None:
    entries = yaml.safe_load(sweep_file.read_text())
    sweep_file.write_text(yaml.safe_dump({**entries, "resources": {"gpus": 64}}))
    refused = start(sweep_file, "--output", tmp_path / "out", "--engine", "ray")
    said = refused.communicate(timeout=300)[1]
    assert refused.returncode == 2, said
    assert "a job needs 1 CPU, 64 GPU, and this machine has less: lower 'resources'" in said
