"""Processes of a sweep: how many at once, time limits, kills, what is found finished, and what the exit code tells.

The processes are real and small: a shell script that copies a finished model, or does what its name says.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from vitshrink.errors import DependencyError, OutputError, UsageError
from vitshrink.jobs.sweep import (
    JobPlan,
    Outcome,
    Status,
    SweepPlan,
    exit_code,
    read_sweep,
    run_sweep,
    runner,
    write_results,
)
from vitshrink.jobs.sweep.output import locked
from vitshrink.runtime import checksums, child

SCRIPT = """
job=$1; ready=$2; directory=$(dirname "$job"); name=$(basename "$directory")
echo "$name begin" >> "$(dirname "$directory")/../order"
case "$name" in
  *slow*) sleep 60;;
  *stubborn*) trap '' TERM; sleep 60 & wait; wait;;
  *broken*) echo "working"; echo "error: the model is missing."; exit 1;;
  *unreachable*) echo "error: no size keeps --max-kl 0."; exit 3;;
  *crash*) kill -9 $$;;
  *orphan*) sleep 2;;
  *) sleep 0.2;;
esac
cp -r "$ready" "$directory/.new" && mv "$directory/.new" "$directory/model"
echo "$name end" >> "$(dirname "$directory")/../order"
"""


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """A directory as compress leaves it, as far as a sweep looks at it."""
    directory = tmp_path / "ready"
    directory.mkdir()
    half = {"dense": 100, "compressed": 50, "kept": 0.5}
    timing = dict.fromkeys(("lower_quartile", "upper_quartile", "throughput", "batch_size", "repeats", "threads"), 1)
    report = {
        **dict.fromkeys(("vitshrink", "model", "task", "method", "allocation", "compensation"), "x"),
        **dict.fromkeys(("parameters", "layers_parameters", "bytes"), half),
        "layers": [],
        "evaluation": {"task": "x", "metric": None, "fidelity": {"kl": 0.25}, "samples": 8},
        "latency": {"dense": timing | {"median": 2.0}, "compressed": timing | {"median": 1.0}},
    }
    (directory / "report.json").write_text(json.dumps(report))
    checksums.record(directory)
    return directory


@pytest.fixture(autouse=True)
def script(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "job.sh"
    file.write_text(SCRIPT)
    monkeypatch.setattr(child, "command", lambda recipe: ["sh", str(file), str(recipe), str(ready)])
    return file


class Log:
    """What a sweep tells its observer."""

    def __init__(self) -> None:
        self.said: list[tuple[str, Status, str]] = []
        self.interrupt_after: int | None = None

    def changed(self, job: JobPlan, outcome: Outcome) -> None:
        self.said.append((job.name, outcome.status, outcome.message))

    def tick(self) -> None:
        if self.interrupt_after is not None and len(self.said) >= self.interrupt_after:
            raise KeyboardInterrupt


Sweep = Callable[..., dict[str, Outcome]]


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    def run(
        *names: str, gates: dict[str, Any] | None = None, time_limit: str | None = None, **options: Any
    ) -> dict[str, Outcome]:
        file = tmp_path / "sweep.yaml"
        include = [{"name": name, "model": "m", "keep": 0.5, "method": "svd", "calibration": "c"} for name in names]
        file.write_text(yaml.safe_dump({"output": str(tmp_path / "out"), "include": include, "gates": gates}))
        plan = read_sweep(file, time_limit=time_limit)
        options.setdefault("observer", Log())
        return dict(zip(names, run_sweep(plan, **options), strict=True))

    return run


def order(tmp_path: Path) -> list[str]:
    file = tmp_path / "order"
    return file.read_text().splitlines() if file.exists() else []


def test_jobs_run_beside_each_other_as_many_as_asked(sweep: Sweep, tmp_path: Path) -> None:
    found = sweep("a", "b", "c", "d", jobs=2)
    assert {outcome.status for outcome in found.values()} == {Status.PASSED}
    lines = order(tmp_path)
    assert len(lines) == 8
    depth = most = 0
    for line in lines:
        depth += 1 if line.endswith("begin") else -1
        most = max(most, depth)
    assert most == 2
    assert (tmp_path / "out" / "a" / "recipe.yaml").read_text().startswith("model: m\n")


def test_jobs_that_share_statistics_wait_for_the_first(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_statistics_of", lambda config: config.output.rpartition("/")[0][-2])
    sweep("x1", "x2", "x3", "y1", jobs=3)
    lines = order(tmp_path)
    assert set(lines[:2]) == {"x1 begin", "y1 begin"}
    assert lines.index("x1 end") < lines.index("x2 begin")
    assert lines.index("x3 begin") < lines.index("x2 end"), "once the first has filled the cache, the others may run"


def test_one_job_that_fails_stops_no_other_and_shows_in_the_exit_code(sweep: Sweep) -> None:
    found = sweep("a", "broken", "crash", "unreachable", "b", gates={"max_kl": 0.3})
    statuses = [outcome.status for outcome in found.values()]
    assert statuses == [Status.PASSED, Status.FAILED, Status.FAILED, Status.GATE, Status.PASSED]
    assert found["broken"].message == "the model is missing."
    assert found["crash"].message == "killed by SIGKILL, which often means that memory ran out"
    assert found["unreachable"].message == "no size keeps --max-kl 0."
    assert found["a"].message == "--max-kl 0.3 is kept with 0.05 to spare (0.25)"
    assert exit_code(list(found.values())) == 1
    assert exit_code([found["a"], found["unreachable"]]) == 3
    assert exit_code([found["a"], found["b"]]) == 0


def test_the_first_failure_ends_all_with_fail_fast(sweep: Sweep, tmp_path: Path) -> None:
    started = time.monotonic()
    found = sweep("slow", "broken", "c", jobs=2, fail_fast=True)
    assert time.monotonic() - started < 20
    assert [outcome.status for outcome in found.values()] == [Status.CANCELLED, Status.FAILED, Status.CANCELLED]
    assert "c begin" not in order(tmp_path)
    assert exit_code(list(found.values())) == 1


def test_a_missed_bound_is_no_failure_and_says_by_how_much(sweep: Sweep) -> None:
    bounds = {"max_kl": 0.2, "max_size": 40, "max_latency_ratio": 0.6}
    found = sweep("a", gates=bounds)["a"]
    assert found.status is Status.GATE
    assert found.message == (
        "--max-kl 0.2 is missed by 0.05 (0.25); --max-size 40 bytes is missed by 10 bytes (50 bytes); "
        "--max-latency-ratio 0.6 is kept with 0.1 to spare (0.5)"
    )


def test_a_job_that_takes_too_long_is_ended_with_all_it_started(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "GRACE", 0.5)
    started = time.monotonic()
    found = sweep("slow", "stubborn", "a", jobs=3, time_limit="1s")
    assert time.monotonic() - started < 15
    assert [outcome.status for outcome in found.values()] == [Status.TIMEOUT, Status.TIMEOUT, Status.PASSED]
    assert found["slow"].message == "took longer than 1 s"
    living = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path / "out") not in living
    assert exit_code(list(found.values())) == 1


def test_what_is_finished_is_not_run_again_and_everything_else_is(sweep: Sweep, tmp_path: Path) -> None:
    sweep("a", "b", "broken")
    with pytest.raises(OutputError, match="pass --resume"):
        sweep("a", "b")
    os.rename(tmp_path / "order", tmp_path / "order-before")
    again = sweep("a", "b", "broken", "c", resume=True)
    assert order(tmp_path) == ["broken begin", "c begin", "c end"]
    assert [again[name].reused for name in again] == [True, True, False, False]
    # bounds are held against what is there
    assert sweep("a", resume=True, gates={"max_kl": 0.1})["a"].status is Status.GATE


@pytest.mark.parametrize("damage", ["weights", "report", "state", "another name", "another recipe"])
def test_a_result_that_cannot_be_trusted_is_made_again(
    damage: str, sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep("a")
    job = tmp_path / "out" / "a"
    if damage == "weights":
        (job / "model" / "added.safetensors").write_text("x")
    elif damage == "report":
        (job / "model" / "report.json").write_text("{}")
    elif damage == "state":
        (job / "job.json").write_text('{"status": "pas')
    elif damage == "another name":
        job.rename(tmp_path / "out" / "renamed")
        again = sweep("renamed", resume=True)["renamed"]
        assert again.reused, "a job is known by what it follows from, not by its name"
        return
    else:
        monkeypatch.setattr(runner, "fingerprints", lambda configs: ["other"] * len(configs))
    again = sweep("a", resume=True)["a"]
    assert (again.status, again.reused) == (Status.PASSED, False)
    assert not checksums.broken_files(job / "model")


def test_an_interrupted_sweep_ends_its_processes_and_can_be_resumed(sweep: Sweep, tmp_path: Path) -> None:
    log = Log()
    log.interrupt_after = 3  # a runs, a passed, slow runs
    with pytest.raises(KeyboardInterrupt):
        sweep("a", "slow", observer=log)
    living = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path / "out") not in living
    assert sweep("a", resume=True)["a"].reused


def test_another_sweep_on_the_same_output_stops(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    plan = SweepPlan(tmp_path / "out", [])
    with locked(plan, resume=False), pytest.raises(OutputError, match="another sweep writes to"):
        sweep("a")
    assert sweep("a")["a"].status is Status.PASSED


def test_a_directory_of_something_else_is_left_alone(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(OutputError, match=r"is not empty|holds no sweep"):
            sweep("a", resume=resume)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_cache_that_was_kept_is_no_obstacle(resume: bool, sweep: Sweep, tmp_path: Path) -> None:
    """What CI restores, or is left where results were removed."""
    (tmp_path / "out" / "cache").mkdir(parents=True)
    (tmp_path / "out" / "cache" / "linearstats-0.safetensors").write_text("kept")
    assert sweep("a", resume=resume)["a"].status is Status.PASSED
    assert (tmp_path / "out" / "cache" / "linearstats-0.safetensors").exists()


@pytest.fixture
def killed_sweep(tmp_path: Path, script: Path, ready: Path) -> Callable[[str], None]:
    """Runs a sweep of one job in a process of its own, and kills that, and only that, once the job runs."""

    def kill(name: str) -> None:
        program = f"""
import sys, yaml
from pathlib import Path
from vitshrink.jobs.sweep import read_sweep, run_sweep
from vitshrink.runtime import child
child.command = lambda recipe: ["sh", {str(script)!r}, str(recipe), {str(ready)!r}]
class Quiet:
    def changed(self, *_): pass
    def tick(self): pass
run_sweep(read_sweep(Path({str(tmp_path / "sweep.yaml")!r})), Quiet())
"""
        entries = {"name": name, "model": "m", "keep": 0.5, "method": "svd", "calibration": "c"}
        sweep_file = {"output": str(tmp_path / "out"), "include": [entries]}
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep_file))
        path = str(Path(__file__).parents[1])
        process = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path})
        for _ in range(600):
            if f"{name} begin" in order(tmp_path):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()

    return kill


def test_a_job_that_outlives_its_sweep_is_waited_for_and_taken_over(
    killed_sweep: Callable[[str], None], sweep: Sweep, tmp_path: Path
) -> None:
    killed_sweep("orphan")
    assert order(tmp_path) == ["orphan begin"]
    log = Log()
    found = sweep("orphan", resume=True, observer=log)["orphan"]
    assert order(tmp_path) == ["orphan begin", "orphan end"], "it was not run twice"
    assert (found.status, found.reused) == (Status.PASSED, True)
    assert ("orphan", Status.RUNNING, "waits for a process of an earlier sweep") in log.said


def test_a_job_that_was_killed_with_its_sweep_is_run_again(sweep: Sweep, tmp_path: Path) -> None:
    sweep("a")
    job = tmp_path / "out" / "a"
    earlier = Outcome.read(job)
    assert earlier is not None
    replace(earlier, status=Status.RUNNING).write(job)
    assert sweep("a", resume=True)["a"].reused, "it was killed after the model had been published"
    for file in (job / "model").iterdir():
        file.unlink()
    (job / "model").rmdir()
    replace(earlier, status=Status.RUNNING).write(job)
    assert not sweep("a", resume=True)["a"].reused, "it was killed before"


def test_a_job_that_cannot_even_be_started_takes_no_other_along(sweep: Sweep, tmp_path: Path) -> None:
    sweep("a")
    (tmp_path / "out" / "blocked").write_text("a file where the directory of the job belongs")
    found = sweep("blocked", "b", resume=True)
    assert [outcome.status for outcome in found.values()] == [Status.FAILED, Status.PASSED]
    assert f"cannot write {tmp_path / 'out' / 'blocked'}" in found["blocked"].message
    assert exit_code(list(found.values())) == 1


def test_a_job_whose_result_cannot_be_judged_takes_no_other_along(sweep: Sweep, tmp_path: Path) -> None:
    """Its log and its report are gone when it ends, as where a disk fails."""
    file = tmp_path / "job.sh"
    file.write_text('case "$1" in *vanish*) rm "$(dirname "$1")/log.txt"; exit 1;; esac\n' + file.read_text())
    found = sweep("vanish", "b", jobs=2)
    assert [outcome.status for outcome in found.values()] == [Status.FAILED, Status.PASSED]
    assert "log.txt" in found["vanish"].message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "rays"}, "--engine rays: Did you mean 'ray'"),
        ({"address": "auto"}, "--address auto: --engine local runs jobs on this machine"),
    ],
)
def test_an_engine_that_there_is_none_of_is_refused(options: dict[str, Any], message: str, sweep: Sweep) -> None:
    with pytest.raises(UsageError, match=message):
        sweep("a", **options)


@pytest.mark.skipif(find_spec("ray") is not None, reason="ray is installed")
def test_an_engine_whose_package_is_missing_names_it(sweep: Sweep) -> None:
    with pytest.raises(DependencyError, match=r'pip install "vitshrink\[ray\]"'):
        sweep("a", engine="ray")


def test_results_that_cannot_be_written_hide_no_others(sweep: Sweep, tmp_path: Path) -> None:
    found = sweep("a", "broken")
    plan = read_sweep(tmp_path / "sweep.yaml")
    (tmp_path / "out" / "results.csv").mkdir()
    with pytest.raises(OutputError, match=r"results\.csv"):
        write_results(plan, list(found.values()))
    assert {"results.json", "summary.md", "junit.xml"} <= {path.name for path in (tmp_path / "out").iterdir()}
