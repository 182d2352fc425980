"""One job on several machines that share no disk: two launchers, each with a home, scratch and copies of its own."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_processes import free_port

from vitshrink.config.options import CompressConfig
from vitshrink.jobs.compress import compress
from vitshrink.runtime import checksums

pytestmark = pytest.mark.slow


class Node:
    """A machine: a directory in which all lies that its processes see."""

    def __init__(self, number: int, directory: Path, model: Path, images: Path) -> None:
        self.number, self.directory = number, directory
        self.places = {name: directory / name for name in ("home", "scratch", "hub", "work")}
        for place in self.places.values():
            place.mkdir(parents=True)
        shutil.copytree(model, directory / "models" / f"copy-{number}")
        shutil.copytree(images, directory / "images")
        self.model, self.images = directory / "models" / f"copy-{number}", directory / "images"

    def start(self, port: int, *flags: str) -> "subprocess.Popen[str]":
        """The launcher of this node, of two."""
        launch = ["--nnodes", "2", "--node_rank", str(self.number), "--nproc_per_node", "1"]
        launch += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        job = ["compress", str(self.model), "out", "--calibration", str(self.images), "--samples", "12", "--quiet"]
        names = {"HOME": "home", "TMPDIR": "scratch", "HF_HOME": "hub"}
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *launch, "-m", "vitshrink", *job, *flags],
            cwd=self.places["work"],
            env=os.environ | {name: str(self.places[place]) for name, place in names.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def work(self) -> set[str]:
        """What there is in its working directory."""
        return {path.name for path in self.places["work"].iterdir()}


@pytest.fixture
def nodes(tmp_path: Path, vit_directory: Path, flat_images: Path) -> list[Node]:
    return [Node(number, tmp_path / f"node-{number}", vit_directory, flat_images) for number in range(2)]


FLAGS = ("--keep", "0.8", "--holdout", "4", "--batch-size", "3", "--refine", "1")


def run(nodes: list[Node], *flags: Sequence[str]) -> list[tuple[int, str]]:
    """The exit code of each launcher, and what its process said. The second one may have other flags."""
    port = free_port()
    running = [node.start(port, *own) for node, own in zip(nodes, (flags[0], flags[-1]), strict=True)]
    try:
        return [(each.returncode, said) for each in running for _, said in [each.communicate(timeout=300)]]
    finally:
        for each in running:
            each.kill()


def test_the_first_node_writes_and_the_others_need_their_copies_only(nodes: list[Node], tmp_path: Path) -> None:
    """Output, state and cache; what the second node has is read only."""
    second = nodes[1].places["work"]
    done = run(nodes, (*FLAGS, "--cache", "cache", "--save-every", "0"))
    assert [code for code, _ in done] == [0, 0], done
    assert nodes[0].work == {"out", "cache"}
    assert not checksums.broken_files(nodes[0].places["work"] / "out")
    assert list(second.iterdir()) == []
    assert [path for path in nodes[1].places["scratch"].rglob("*") if path.suffix == ".safetensors"] == []
    alone = {"model": str(nodes[0].model), "output": str(tmp_path / "alone"), "keep": 0.8, "samples": 12, "holdout": 4}
    data = {"calibration": str(nodes[0].images), "batch_size": 3, "refine": 1}
    compress(CompressConfig.from_mapping(alone | data))
    together, own = (
        load_file(path / "model.safetensors") for path in (nodes[0].places["work"] / "out", tmp_path / "alone")
    )
    for name, tensor in own.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("other", ["weights", "samples", "flags", "nothing there"])
def test_what_differs_between_nodes_is_named(nodes: list[Node], other: str) -> None:
    flags: list[tuple[str, ...]] = [FLAGS, FLAGS]
    if other == "weights":
        path = nodes[1].model / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        expected = "differ in the model ("
    elif other == "samples":
        file, another, *_ = sorted(nodes[1].images.iterdir())
        shutil.copy(another, file)
        expected = "differ in calibration data ("
    elif other == "flags":
        flags[1] = (*FLAGS, "--seed", "1")
        expected = "--seed (1, 0)"
    else:
        shutil.rmtree(nodes[1].images)
        expected = f"there is no file or folder {nodes[1].images}"
    (code, said), (other_code, _) = run(nodes, *flags)
    assert code != 0
    assert other_code != 0
    assert expected in said
    assert "process 1 on node 1" in said
    assert nodes[0].work == nodes[1].work == set()


def test_where_a_node_is_killed_the_other_ends(nodes: list[Node]) -> None:
    port = free_port()
    first, second = (node.start(port, *FLAGS) for node in nodes)
    try:
        while not list(nodes[0].places["work"].glob(".out.vitshrink-*")):
            assert first.poll() is None
            time.sleep(0.01)
        children = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
        for pid in (second.pid, *map(int, children)):
            os.kill(pid, signal.SIGKILL)
        _, said = first.communicate(timeout=120)
    finally:
        first.kill()
        second.communicate()
    assert first.returncode != 0
    assert "another process of this job has ended" in said
    assert nodes[0].work == set()
