"""Two real processes, and one that runs alone."""

import json
import os
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch

from vitshrink.errors import VitshrinkError
from vitshrink.runtime import processes

PROGRAM = """
import json, sys, torch
from vitshrink.runtime import processes
processes.join("cpu")
processes.wait()
found = {
    "rank": processes.rank(),
    "count": processes.count(),
    "main": processes.is_main(),
    "share": list(processes.share(range(5))),
    "owners": processes.owners([1, 5, 2, 3]),
    "gathered": processes.gather({"mine": processes.rank()}),
    "from_main": processes.from_main(f"said by {processes.rank()}"),
    "total": processes.total(torch.tensor([1.0, processes.rank()], dtype=torch.float64)).tolist(),
}
processes.leave()
print(json.dumps(found | {"left": not processes.started()}))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_together(*arguments: str, count: int = 2) -> list["subprocess.Popen[str]"]:
    """``count`` processes that know of each other, in the order of their ranks."""
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def run_together(*arguments: str, count: int = 2, timeout: float = 300) -> list[subprocess.CompletedProcess[str]]:
    """What ``count`` processes that know of each other print, in the order of their ranks."""
    running = start_together(*arguments, count=count)
    try:
        return [
            subprocess.CompletedProcess(process.args, process.returncode, *streams)
            for process in running
            for streams in [process.communicate(timeout=timeout)]
        ]
    finally:
        for process in running:
            process.kill()


@pytest.mark.slow
def test_two_processes_share_and_learn_the_results() -> None:
    done = run_together("-c", PROGRAM)
    assert [process.returncode for process in done] == [0, 0], done
    found: list[dict[str, Any]] = [json.loads(process.stdout) for process in done]
    assert [each["rank"] for each in found] == [0, 1]
    assert [each["main"] for each in found] == [True, False]
    assert [each["share"] for each in found] == [[0, 2, 4], [1, 3]]
    for each in found:
        assert each["count"] == 2
        assert each["owners"] == [0, 0, 1, 1]
        assert each["gathered"] == [{"mine": 0}, {"mine": 1}]
        assert each["from_main"] == "said by 0"
        assert each["total"] == [2, 1]
        assert each["left"]


def test_alone_everything_is_the_own_share() -> None:
    processes.join()
    assert (processes.rank(), processes.count(), processes.is_main(), processes.started()) == (0, 1, True, False)
    assert list(processes.share([1, 2, 3])) == [1, 2, 3]
    assert processes.owners([3, 1]) == [0, 0]
    assert processes.gather("mine") == ["mine"]
    processes.require_same({"the model": "mine"})
    assert processes.from_main("mine") == "mine"
    assert torch.equal(processes.total(torch.ones(2)), torch.ones(2))
    processes.wait()
    processes.leave()


def test_processes_that_cannot_meet_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(VitshrinkError, match=r"cannot connect to the other processes of this job .* unset WORLD_SIZE"):
        processes.join("cpu")
    assert not processes.started()
