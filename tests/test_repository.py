"""What the repository says of itself: workflows, templates, policies."""

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from vitshrink import __version__

ROOT = Path(__file__).resolve().parents[1]
YAML = sorted([*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"])
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))


def read(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def targets() -> set[str]:
    (line,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return set(line.split())


@pytest.mark.parametrize("file", YAML, ids=lambda file: file.name)
def test_every_make_target_that_is_named_exists(file: Path) -> None:
    assert read(file)
    commands = re.findall(r"(?:run|entry): (.*)", file.read_text(encoding="utf-8"))
    named = {target for command in commands for target in re.findall(r"\bmake ([\w-]+)", command)}
    assert named <= targets()


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflows_may_write_only_where_they_say_so(file: Path) -> None:
    workflow = read(file)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert "@" in step.get("uses", "@")


def test_the_versions_of_python_are_those_that_are_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    claimed = re.findall(r":: (3\.\d+)'", str(project["classifiers"]))
    assert read(ROOT / ".github/workflows/test.yml")["jobs"]["pinned"]["strategy"]["matrix"]["python"] == claimed
    assert project["requires-python"] == f">={claimed[0]}"


def test_every_test_that_security_rests_on_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(named) > 15
    for file, test in named:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"


def test_the_citation_and_the_changelog_name_the_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    released = __version__.partition(".dev")[0]
    assert citation["version"] == released
    if released == __version__:
        heading = f"## [{released}] - {citation['date-released']}"
        assert heading in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
