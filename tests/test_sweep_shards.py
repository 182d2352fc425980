"""A sweep in parts on several machines, and gathered: the results are those of one sweep of all jobs."""

import csv
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from click.testing import Result
from typer.testing import CliRunner

from vitshrink.cli.app import app
from vitshrink.errors import OutputError, UsageError
from vitshrink.jobs.compress import compress
from vitshrink.jobs.sweep import Shard, SweepPlan, read_sweep
from vitshrink.jobs.sweep.output import locked
from vitshrink.jobs.sweep.results import FILES
from vitshrink.runtime import child


def sweep(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["sweep", *map(str, arguments)])


@pytest.mark.parametrize("count", [1, 2, 3, 8, 20])
def test_shards_are_all_jobs_once_balanced_and_neighbors(count: int) -> None:
    jobs = list(range(17))
    shards = [Shard(number, count).of(jobs) for number in range(1, count + 1)]
    assert [job for shard in shards for job in shard] == jobs
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("text", ["0/8", "9/8", "3", "3/", "a/b", "-1/2"])
def test_a_shard_that_there_is_none_of_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="from 1/8 to 8/8"):
        Shard.read(text)


SCRIPT = """
directory=$(dirname "$1"); name=$(basename "$directory")
if [ "$name" = lost ]; then echo "error: no such folder: 'no/such-model'."; exit 1; fi
cp -r "$2/$name" "$directory/.new" && mv "$directory/.new" "$directory/model"
"""


@pytest.fixture(scope="module")
def sweep_file(tmp_path_factory: pytest.TempPathFactory, vit_directory: Path, flat_images: Path) -> Path:
    """Two sizes and a job that fails. Its jobs copy what was compressed once: the slow tests start real ones."""
    folder = tmp_path_factory.mktemp("shards")
    file = tiny.write_sweep(folder / "sweep.yaml", vit_directory, flat_images, "svd")
    for job in read_sweep(file, output=folder / "ready").jobs[:2]:
        compress(replace(job.config, output=str(folder / "ready" / job.name), cache=None))
    script = folder / "job.sh"
    script.write_text(SCRIPT)
    return file


@pytest.fixture(scope="module", autouse=True)
def jobs_that_copy(sweep_file: Path) -> Iterator[None]:
    folder = sweep_file.parent
    with pytest.MonkeyPatch.context() as patch:
        words = ["sh", str(folder / "job.sh")]
        patch.setattr(child, "command", lambda recipe: [*words, str(recipe), str(folder / "ready")])
        yield


@pytest.fixture(scope="module")
def whole(sweep_file: Path) -> Path:
    """The results of one sweep of all jobs."""
    output = sweep_file.parent / "whole"
    assert sweep(sweep_file, "--output", output).exit_code == 1
    return output


@pytest.fixture(scope="module")
def parts(sweep_file: Path) -> Path:
    """The output of three shards."""
    output = sweep_file.parent / "parts"
    codes = [sweep(sweep_file, "--output", output, "--shard", f"{number}/3").exit_code for number in (1, 2, 3)]
    assert codes == [3, 0, 1], "each tells of its own jobs"
    return output


def rows(output: Path) -> list[dict[str, Any]]:
    with (output / "results.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert all(float(row.pop("seconds")) >= 0 for row in found)
    for row in found:
        del row["latency_ratio"]  # which is measured
    return [{name: value.replace(str(output), "") for name, value in row.items()} for row in found]


def summary(output: Path) -> str:
    return re.sub(r"[\d.]+×", "×", (output / "summary.md").read_text())


def test_gathered_shards_are_the_results_of_one_sweep(whole: Path, parts: Path, sweep_file: Path) -> None:
    assert not (parts / "results.csv").exists()
    assert {file.name for file in (parts / "shard-1-of-3").iterdir()} == {*FILES}
    gathered = sweep(sweep_file, "--output", parts, "--collect", "--json")
    assert gathered.exit_code == json.loads((whole / "results.json").read_text())["exit_code"] == 1
    assert "no such folder: 'no/such-model'" in gathered.stderr
    assert rows(parts) == rows(whole)
    assert [row["status"] for row in rows(parts)] == ["gate", "passed", "failed"]
    assert [row["job"] for row in json.loads(gathered.stdout)["jobs"]] == [row["job"] for row in rows(whole)]
    assert summary(parts) == summary(whole)
    for row in rows(whole)[:2]:
        weights = Path(row["job"]) / "model" / "model.safetensors"
        assert (parts / weights).read_bytes() == (whole / weights).read_bytes()
    assert sorted(FILES) == sorted(name for name in FILES if (parts / name).exists())


def test_bounds_are_judged_again_where_shards_are_gathered(parts: Path, sweep_file: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(parts, tmp_path / "out"))
    shutil.rmtree(output / "lost")
    without = tmp_path / "sweep.yaml"
    without.write_text(yaml.safe_dump({**yaml.safe_load(sweep_file.read_text()), "include": []}, sort_keys=False))
    assert sweep(without, "--output", output, "--collect").exit_code == 3
    assert sweep(without, "--output", output, "--collect", "--max-size", "1MB").exit_code == 0


def test_a_shard_goes_on_where_it_was_and_runs_nothing_of_others(parts: Path, sweep_file: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(parts, tmp_path / "out"))
    refused = sweep(sweep_file, "--output", output, "--shard", "2/3")
    assert refused.exit_code == 1
    assert "contains jobs of shard 2/3, such as svd-keep-0.7: pass --resume" in refused.stderr
    shutil.rmtree(output / "svd-keep-0.9")
    again = sweep(sweep_file, "--output", output, "--shard", "2/3", "--resume")
    assert (again.exit_code, again.stderr.count("found finished")) == (0, 1)
    assert not (output / "svd-keep-0.9").exists()


@pytest.mark.parametrize("problem", ["no shard", "killed", "another recipe", "damaged"])
def test_jobs_that_are_missing_are_named(problem: str, parts: Path, sweep_file: Path, tmp_path: Path) -> None:
    output, file = Path(shutil.copytree(parts, tmp_path / "out")), sweep_file
    job = output / "svd-keep-0.7"
    if problem == "no shard":
        shutil.rmtree(job)
    elif problem == "killed":
        record = json.loads((job / "job.json").read_text())
        (job / "job.json").write_text(json.dumps({**record, "status": "running"}))
        shutil.rmtree(job / "model")
    elif problem == "damaged":
        (job / "model" / "model.safetensors").write_bytes(b"half")
    else:
        file = tmp_path / "sweep.yaml"
        entries = yaml.safe_load(sweep_file.read_text())
        entries["include"].append({"keep": 0.7, "refine": 1})
        file.write_text(yaml.safe_dump(entries, sort_keys=False))
    gathered = sweep(file, "--output", output, "--collect")
    assert gathered.exit_code == 1
    assert "1 of 3 jobs are missing in" in gathered.stderr
    assert ": svd-keep-0.7: run their shards with --resume" in gathered.stderr
    assert [row["status"] for row in rows(output)] == ["gate", "waiting", "failed"]


def test_gathering_runs_nothing_and_needs_an_output(sweep_file: Path, tmp_path: Path) -> None:
    assert "run its shards first" in sweep(sweep_file, "--output", tmp_path / "none", "--collect").stderr
    for flags in (["--shard", "1/2"], ["--resume"], ["--jobs", "2"], ["--dry-run"]):
        refused = sweep(sweep_file, "--collect", *flags)
        assert refused.exit_code == 2
        assert f"{flags[0]} has no effect with --collect" in refused.stderr


def test_a_dry_run_lists_the_jobs_of_the_shard(sweep_file: Path) -> None:
    listed = sweep(sweep_file, "--output", "out", "--dry-run", "--json", "--shard", "2/3")
    assert [job["job"] for job in json.loads(listed.stdout)] == ["svd-keep-0.7"]


def test_shards_share_an_output_that_a_whole_sweep_has_alone(sweep_file: Path, tmp_path: Path) -> None:
    plan = read_sweep(sweep_file, output=tmp_path / "out")

    def part(number: int) -> SweepPlan:
        return plan.part(Shard(number, 2))

    with locked(part(1), resume=False), locked(part(2), resume=False):
        with pytest.raises(OutputError, match="another sweep writes to shard 1/2 of"), locked(part(1), resume=False):
            pass
        with pytest.raises(OutputError, match="another sweep writes to"), locked(plan, resume=True):
            pass
