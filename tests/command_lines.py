"""Command lines that stand in files and on pages: found, and read by the program without doing what they say."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import typer

from vitshrink.cli import checks
from vitshrink.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
SHELL = {"", "bash", "sh", "console", "shell"}
"""Languages of blocks that hold command lines; a block of none often does."""

STARTERS = ("vitshrink", "accelerate launch", "torchrun", "python -m vitshrink")


def pages() -> list[Path]:
    """What people read: the guide, and the READMEs."""
    places = ("README.md", "CONTRIBUTING.md", "docs/*.md", "calibration/README.md", "benchmarks/**/*.md")
    return sorted(page for place in places for page in ROOT.glob(place))


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """The language and the text of every fenced block."""
    for found in re.finditer(r"^( *)```([\w-]*)[^\n]*\n(.*?)^\1```", page, re.MULTILINE | re.DOTALL):
        yield found[2], re.sub(rf"^{found[1]}", "", found[3], flags=re.MULTILINE)


def command_lines(page: str) -> list[str]:
    """Those of the blocks of a page that leave nothing out (…), each in one line, without the signs of a prompt."""
    lines = (
        line.removeprefix("$ ").strip()
        for language, text in blocks(page)
        if language in SHELL
        for line in text.replace("\\\n", " ").splitlines()
    )
    return [" ".join(line.split()) for line in lines if line.startswith(STARTERS) and "…" not in line]


def words_of(line: str) -> list[str]:
    """The arguments of vitshrink."""
    words = shlex.split(line, comments=True)
    words = words[words.index("vitshrink") + 1 :]
    ends = [index for index, word in enumerate(words) if word in ("|", "&&", ">", ";")]
    words = words[: ends[0]] if ends else words
    return [PLACES.get(word, word) for word in words]


PLACES = {"SIZE": "5MB", "N": "8"}
"""Of values that a page leaves open and that are no text, one that there may be."""


WITHOUT_JOB = ("sweep", "verify", "report", "methods", "demo")
"""Commands whose options are no job."""


def exit_code(words: list[str]) -> int:
    """That of a command line which the program reads, options and all, but whose command does nothing."""
    group: Any = typer.main.get_command(app)
    build = checks.job_of

    def read(*arguments: Any) -> None:
        build(*arguments)
        raise typer.Exit

    for name, command in group.commands.items():
        if name in WITHOUT_JOB or "--config" in words:
            command.callback = lambda **_: None
    with patch.object(checks, "job_of", read), pytest.raises(SystemExit) as ended:
        group.main(words, prog_name="vitshrink")
    assert isinstance(ended.value.code, int)
    return ended.value.code


def flags() -> set[str]:
    """All that the program has, and all that the scripts of benchmarks/ have."""
    group: Any = typer.main.get_command(app)
    commands = (group, *group.commands.values())
    own = {flag for each in commands for one in each.params for flag in (*one.opts, *one.secondary_opts)}
    scripts = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "benchmarks").rglob("*.py"))
    return own | {"--help"} | set(re.findall(r'"(--[a-z][a-z0-9-]*)"', scripts))


def inline_flags(page: str) -> list[str]:
    """Flags that stand in the text, in code that is theirs or the program's."""
    text = re.sub(r"^( *)```.*?^\1```", "", page, flags=re.MULTILINE | re.DOTALL)
    codes = (code for code in re.findall(r"`([^`]+)`", text) if code.startswith(("--", "vitshrink ", "python bench")))
    return [flag for code in codes for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", code)]
