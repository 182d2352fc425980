"""The examples do what they say: the script and the Makefile are run, the other files are read."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_lines import exit_code
from typer.testing import CliRunner

from vitshrink.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
FILES = sorted(file for file in EXAMPLES.iterdir() if file.suffix != ".ipynb")
INSTRUCTIONS = {"FROM", "RUN", "WORKDIR", "ENV", "ENTRYPOINT", "CMD", "COPY", "USER", "ARG", "LABEL", "EXPOSE"}


# What they say


def shell_lines(file: Path) -> Iterator[str]:
    """Every command line that starts vitshrink, in a script, a rule, a CI job or a comment."""
    text = file.read_text(encoding="utf-8")
    if file.name == "Containerfile":
        lists = [json.loads(words) for words in re.findall(r"^(?:ENTRYPOINT|CMD) (\[.*\])$", text, re.M)]
        yield shlex.join([word for words in lists for word in words])
    for line in text.splitlines():
        started = re.search(r"(?:^|[\s&;(])(vitshrink (?:sweep|verify|compress|eval|inspect|report) [^|&;#]+)", line)
        if started and "lags of vitshrink" not in line.replace("FLAGS", "Flags"):
            yield started[1]


def code_of(line: str) -> int:
    # what stands in the place of further flags is left out, and in the place of a path stands one
    line = line.replace("${{ matrix.shard }}", "1")
    words = [word for word in shlex.split(line) if word not in ("$@", "$(SWEEPFLAGS)")]
    return exit_code([re.sub(r"\$(\([^)]*\)|\w+|[<@^])", "sweep.yaml", word) for word in words[1:]])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_command_line_is_one_of_the_program(file: Path) -> None:
    lines = list(shell_lines(file))
    assert lines or file.name == "sweep.yaml"
    for line in lines:
        assert code_of(line) == 0, line


def test_a_command_line_with_a_mistake_is_found() -> None:
    assert code_of("vitshrink sweep sweep.yaml --resume --jobs 2") == 0
    for wrong in ("sweep sweep.yaml --resumee", "sweep", "sweep a b", "swep a", "sweep a --jobs many"):
        assert code_of(f"vitshrink {wrong}") == 2, wrong


def test_the_sweep_is_two_sizes_of_one_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    listed = CliRunner().invoke(app, ["sweep", str(EXAMPLES / "sweep.yaml"), "--dry-run", "--json"])
    assert listed.exit_code == 0, listed.stderr
    assert [job["job"] for job in json.loads(listed.stdout)] == ["pets-keep-0.7", "pets-keep-0.5"]


def read_yaml(name: str) -> dict[Any, Any]:
    document = yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def test_github_runs_the_sweep_at_night_and_shows_it_whatever_came_of_it() -> None:
    workflow = read_yaml("github-workflow.yml")
    assert {"schedule", "pull_request", "workflow_dispatch"} == workflow[
        True
    ].keys()  # YAML reads "on" as a truth value
    assert workflow["permissions"] == {"contents": "read"}
    jobs = workflow["jobs"]
    assert jobs.keys() == {"plan", "sweep"}
    for job in jobs.values():
        assert job["runs-on"]
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), step
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/checkout@v4")), step
        assert "pip install vitshrink" in [step.get("run") for step in job["steps"]]
    assert jobs["plan"]["steps"][-1]["run"].endswith("--dry-run")
    steps = jobs["sweep"]["steps"]
    (at,) = (number for number, step in enumerate(steps) if step.get("run", "").startswith("vitshrink sweep"))
    (cache,) = (step["with"] for step in steps[:at] if step.get("uses", "").startswith("actions/cache@"))
    assert cache["path"] == read_yaml("sweep.yaml")["defaults"]["cache"]
    assert [step["if"] for step in steps[at + 1 :]] == ["always()", "always()"]
    assert any(step.get("with", {}).get("path") == read_yaml("sweep.yaml")["output"] for step in steps[at + 1 :])


def test_github_gathers_what_its_machines_wrote() -> None:
    jobs = read_yaml("github-shards.yml")["jobs"]
    shards = jobs["sweep"]["strategy"]["matrix"]["shard"]
    assert shards == list(range(1, len(shards) + 1))
    runs = [step.get("run", "") for step in jobs["sweep"]["steps"]]
    assert f"vitshrink sweep sweep.yaml --shard ${{{{ matrix.shard }}}}/{len(shards)}" in runs
    assert jobs["collect"]["needs"] == "sweep"
    assert jobs["collect"]["if"] == "always()"
    output = read_yaml("sweep.yaml")["output"]
    paths = [
        step["with"]["path"] for job in jobs.values() for step in job["steps"] if "artifact" in step.get("uses", "")
    ]
    assert paths == [output] * 3
    assert any(step.get("run", "").endswith("--collect") for step in jobs["collect"]["steps"])


def test_gitlab_reads_the_jobs_of_the_sweep_as_tests() -> None:
    pipeline = read_yaml("gitlab-ci.yml")
    assert pipeline.keys() == {"default", "plan", "sweep"}
    assert pipeline["default"]["before_script"] == ["pip install vitshrink"]
    assert pipeline["plan"]["script"][-1].endswith("--dry-run")
    sweep, entries = pipeline["sweep"], read_yaml("sweep.yaml")
    assert sweep["script"] == ["vitshrink sweep sweep.yaml"]
    assert sweep["artifacts"]["when"] == "always"
    assert sweep["artifacts"]["paths"] == [entries["output"] + "/"]
    assert sweep["artifacts"]["reports"] == {"junit": entries["output"] + "/junit.xml"}
    assert sweep["cache"]["paths"] == [entries["defaults"]["cache"] + "/"]
    for job in (pipeline["plan"], sweep):
        assert all("CI_PIPELINE_SOURCE" in rule["if"] for rule in job["rules"])


def test_the_container_is_made_of_known_instructions() -> None:
    lines = (EXAMPLES / "Containerfile").read_text(encoding="utf-8").splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    names = [name for name, _ in instructions]
    assert set(names) <= INSTRUCTIONS
    assert names[0] == "FROM"
    for single in ("FROM", "WORKDIR", "ENTRYPOINT", "CMD"):
        assert names.count(single) == 1, single
    assert dict(instructions)["ENTRYPOINT"] == '["vitshrink"]'


def test_every_example_is_in_the_documentation() -> None:
    page = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(\.\./examples/([\w.-]+)\)", page))
    assert linked == {file.name for file in FILES}
    for readme in ("README.md", "docs/README.md"):
        assert "[examples](" in (ROOT / readme).read_text(encoding="utf-8"), readme


# What they do


@pytest.fixture(scope="module")
def project(
    tmp_path_factory: pytest.TempPathFactory, vit_directory: Path, flat_images: Path, learned_images: Path
) -> Path:
    """A directory as the examples expect it, with a ``vitshrink`` that is this one."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(vit_directory, root / "models" / "pets")
    shutil.copytree(flat_images, root / "data" / "train")
    shutil.copytree(learned_images, root / "data" / "val")
    for file in FILES:
        shutil.copy(file, root)
    entries = read_yaml("sweep.yaml")
    entries["defaults"] |= {"samples": 8, "holdout": 4, "refine": 0}  # the rest is as it is
    (root / "sweep.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))
    program = root / "bin" / "vitshrink"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m vitshrink "$@"\n')
    program.chmod(0o755)
    return root


def run(project: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    path = f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment |= {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_the_script_sweeps_checks_and_says_how_it_went(project: Path) -> None:
    missed = run(project, "sh", "nightly.sh", "sweep.yaml", "--max-drop", "-100")
    assert missed.returncode == 3, missed.stderr
    assert "a bound is missed: see results/summary.md" in missed.stderr
    assert len(re.findall(r"^checksums +ok ", missed.stdout, re.M)) == 2
    assert (project / "results" / "summary.md").is_file()
    assert list((project / "cache").iterdir())

    (project / "wrong.yaml").write_text("matrix: {modle: [x]}\n")
    wrong = run(project, "sh", "nightly.sh", "wrong.yaml")
    assert wrong.returncode == 2
    assert "modle" in wrong.stderr
    assert wrong.stdout == ""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_goes_on_until_the_sweep_has_passed_and_then_rests(project: Path) -> None:
    flags = "SWEEPFLAGS=--max-drop"
    missed = run(project, "make", f"{flags} -100")
    assert missed.returncode == 2, missed.stdout
    assert "--max-drop" in missed.stderr
    assert not (project / "results" / "passed").exists()

    passed = run(project, "make", f"{flags} 100")
    assert passed.returncode == 0, passed.stderr
    rested = run(project, "make", f"{flags} -100")
    assert (rested.returncode, "vitshrink" in rested.stdout) == (0, False)
    notes = project / "models" / "pets" / "notes.txt"
    notes.touch()
    later = (project / "results" / "passed").stat().st_mtime + 2  # some file systems keep whole seconds
    os.utime(notes, (later, later))
    assert run(project, "make", "--question").returncode == 1
    notes.unlink()

    assert run(project, "make", "check").returncode == 0
    weights = project / "results" / "pets-keep-0.5" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert run(project, "make", "check").returncode == 2
    assert run(project, "make", "clean").returncode == 0
    assert not (project / "results").exists()
    assert (project / "cache").is_dir()
