"""How the package is built, what one job does twice, and how long a command takes to start.

python -m benchmarks.house
python -m benchmarks.house --against COMMIT
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from . import structure

ROOT = Path(__file__).resolve().parents[2]
JOB = Path(__file__).with_name("job.py")
PARTS = ("structure", "job", "start")
TORCH = "import torch"
STARTS = {
    TORCH: ["-c", TORCH],
    **{
        f"vitshrink {arguments}": ["-m", "vitshrink", *arguments.split()]
        for arguments in (
            "--help",
            "methods",
            "compress missing out --keep 2",
            "compress missing out --unknown",
            "compress missing out --method svd --compensation none --keep 0.5 --offline",
        )
    },
}

Facts = dict[str, Any]
Rows = Iterator[tuple[str, str]]


@contextmanager
def tree_of(commit: str | None) -> Iterator[Path]:
    """The tree of a commit, checked out into a folder that is removed afterwards; None is the tree as it lies here."""
    if commit is None:
        yield ROOT
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    with TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "tree"
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def python(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own, whose ``vitshrink`` is the tree's."""
    environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )


def job(tree: Path, layers: int) -> Facts:
    """What ``job.py`` saw. Raises SystemExit where the job fails."""
    with TemporaryDirectory() as work:
        ended = python(tree, str(JOB), str(tree), work, str(layers))
        if ended.returncode:
            raise SystemExit(f"the job of {layers} layers failed in {tree}:\n{ended.stderr}")
        return json.loads((Path(work) / "facts.json").read_text())  # type: ignore[no-any-return]


def starts(trees: Sequence[Path], repeats: int) -> list[Facts]:
    """For every tree the median seconds of each command, all of them in turn, after one round that is not counted."""
    runs: list[defaultdict[str, list[tuple[float, float]]]] = [defaultdict(list) for _ in trees]
    codes: list[dict[str, int]] = [{} for _ in trees]
    for _ in range(repeats + 1):
        for tree, times, ends in zip(trees, runs, codes, strict=True):
            for name, arguments in STARTS.items():
                before = os.times()
                ends[name] = python(tree, *arguments).returncode
                after = os.times()
                used = after.children_user + after.children_system - before.children_user - before.children_system
                times[name].append((used, after.elapsed - before.elapsed))
    return [
        {
            "processor": {name: median(used for used, _ in pairs[1:]) for name, pairs in times.items()},
            "elapsed": {name: median(elapsed for _, elapsed in pairs[1:]) for name, pairs in times.items()},
            "exit codes": ends,
        }
        for times, ends in zip(runs, codes, strict=True)
    ]


def rows_of_structure(facts: Facts) -> Rows:
    rooms = facts["rooms"]
    yield "rooms", str(len(rooms))
    yield "modules", str(sum(room["modules"] for room in rooms.values()))
    yield "lines", str(sum(room["lines"] for room in rooms.values()))
    counts = [count for others in facts["imports"].values() for count in others.values()]
    yield "imports from room to room", f"{sum(counts)}, {len(counts)} pairs"
    yield "pairs of rooms that import each other", str(facts["mutual"])
    yield "imports of the package's own `__init__`", str(facts["of the package itself"])
    yield "imports that climb", "no rooms" if facts["climbs"] is None else str(len(facts["climbs"]))
    yield "rooms that the order does not name", str(len(facts["outside the order"]))
    yield "file names in several rooms", str(len(facts["names in several rooms"]))
    yield "`.get(“…”`", str(facts[".get(“…”"])
    yield "`or {}`", str(facts["or {}"])
    for title in ("longest modules", "longest functions", "most arguments"):
        for place, (name, number) in enumerate(facts[title], 1):
            yield f"{title}, {place}", f"{number}: {name}"
    for room, size in rooms.items():
        yield f"room {room}", f"{size['modules']} modules, {size['lines']} lines"


def rows_of_jobs(jobs: list[Facts]) -> Rows:
    for facts in jobs:
        of = f"{facts['layers']} layers"
        for what, count in sorted(facts["counts"].items()):
            yield f"{of}: {what}", str(count)
        state = sum(facts["state"].values())
        yield f"{of}: state at its peak, models", f"{state:.1f}" if state else "none seen"


def rows_of_starts(facts: Facts) -> Rows:
    """Multiples of importing torch, by processor time and by the clock."""
    used, elapsed = facts["processor"], facts["elapsed"]
    for name, code in facts["exit codes"].items():
        ratios = f"{used[name] / used[TORCH]:.2f} ({elapsed[name] / elapsed[TORCH]:.2f} by the clock)"
        yield f"`{name}`", f"{ratios}, {elapsed[name]:.2f} s, exit code {code}"


ROWS = {"structure": rows_of_structure, "job": rows_of_jobs, "start": rows_of_starts}


def print_table(title: str, columns: dict[str, dict[str, str]]) -> None:
    """A column a tree; a dash where a tree lacks the row."""
    print(f"| {title} | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}")
    for row in dict.fromkeys(name for column in columns.values() for name in column):
        print(f"| {row} | {' | '.join(column.get(row, '–') for column in columns.values())} |")
    print()


def print_lists(facts: Facts) -> None:
    """What a table has no room for: who imports whom, names that occur twice, and who does what in a job."""
    known = facts.get("structure", {})
    for room, others in known.get("imports", {}).items():
        print(f"* {room} imports {', '.join(f'{other} {count}' for other, count in sorted(others.items()))}")
    for name, rooms in known.get("names in several rooms", {}).items():
        print(f"* {name} is a file in {', '.join(rooms)}")
    for climb in known.get("climbs") or ():
        print(f"* {climb} climbs")
    for seen in facts.get("job", [])[:1]:
        who = Counter((event["what"], " ← ".join(event["who"][:5])) for event in seen["events"])
        for (what, callers), count in sorted(who.items()):
            print(f"* {what}, {count} × {callers}")
    for seen in facts.get("job", [])[-1:]:
        for file, ratio in sorted(seen["state"].items()):
            print(f"* state at its peak, {seen['layers']} layers: {ratio:.2f} models in {file}")
    print()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table a part, with a column a tree; then the lists behind them."""
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument("--at", metavar="COMMIT", help="measure this commit in place of the tree as it lies here")
    known.add_argument("--against", metavar="COMMIT", help="and this one in a column before it")
    known.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    known.add_argument(
        "--layers", type=int, nargs="+", default=[2, 8], help="blocks of the models whose jobs are watched"
    )
    known.add_argument("--repeats", type=int, default=5, help="starts of every command")
    known.add_argument("--json", type=Path, metavar="FILE", help="write all facts as well")
    given = known.parse_args(arguments)
    commits = [given.against, given.at] if given.against else [given.at]
    with ExitStack() as stack:
        trees = {commit or "this tree": stack.enter_context(tree_of(commit)) for commit in commits}
        facts: dict[str, Facts] = {name: {} for name in trees}
        for name, tree in trees.items():
            if "structure" in given.only:
                facts[name]["structure"] = structure.facts_of(tree)
            if "job" in given.only:
                facts[name]["job"] = [job(tree, layers) for layers in given.layers]
        if "start" in given.only:
            for name, found in zip(trees, starts(list(trees.values()), given.repeats), strict=True):
                facts[name]["start"] = found
    for part in (part for part in PARTS if part in given.only):
        print_table(part, {name: dict(ROWS[part](found[part])) for name, found in facts.items()})
    for name, found in facts.items():
        if found.keys() & {"structure", "job"}:
            print(f"## {name}\n")
            print_lists(found)
    if given.json:
        given.json.write_text(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
