"""``vitshrink sweep``: a matrix of jobs, followed in a table on a terminal and line by line elsewhere."""

import json
import time
from pathlib import Path
from typing import Annotated, Any, Self

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table as Grid
from rich.text import Text

from vitshrink.cli import console
from vitshrink.cli.tables import Table
from vitshrink.config.names import shown, shown_text
from vitshrink.jobs.sweep import (
    JobPlan,
    Outcome,
    Status,
    SweepPlan,
    exit_code,
    fingerprints,
    read_sweep,
    run_sweep,
    write_results,
)

STYLES = {
    Status.PASSED: "green",
    Status.GATE: "red",
    Status.FAILED: "red",
    Status.TIMEOUT: "red",
    Status.RUNNING: "cyan",
}


@console.reported
def sweep_command(
    file: Annotated[Path, typer.Argument(help="YAML with a matrix of jobs; see docs/batch.md.")],
    output: Annotated[Path | None, typer.Option(help="Where the results go; instead of the file's.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Processes at once.")] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a sweep; what is finished and unchanged is not run again.")
    ] = False,
    fail_fast: Annotated[
        bool, typer.Option("--fail-fast/--keep-going", help="Stop all jobs at the first that fails or misses a bound.")
    ] = False,
    time_limit: Annotated[str | None, typer.Option(help="Of every job, e.g. 90s, 30m, 1.5h.")] = None,
    min_accuracy: Annotated[float | None, typer.Option(help="Bound on every result, in percent.")] = None,
    max_drop: Annotated[float | None, typer.Option(help="Points of accuracy below the dense model.")] = None,
    max_changed: Annotated[
        float | None, typer.Option(help="Percent of the predictions that differ from the dense model's.")
    ] = None,
    max_kl: Annotated[float | None, typer.Option(help="Nats from the dense model.")] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Squared error of scores or features, as a share of their spread.")
    ] = None,
    max_size: Annotated[str | None, typer.Option(help="Bytes of the weight files, e.g. 90MB.")] = None,
    max_latency_ratio: Annotated[float | None, typer.Option(help="Time of a pass, as a fraction of the dense.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the jobs; run nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json on stdout, and nothing else.")] = False,
) -> None:
    """Run the jobs of FILE and compare what came of them.

    Exits with 0 when all passed, 3 when a bound is missed, 1 when a job failed.

    Example: vitshrink sweep nightly.yaml --jobs 2 --resume
    """
    bounds: dict[str, Any] = {
        "min_accuracy": min_accuracy,
        "max_drop": max_drop,
        "max_changed": max_changed,
        "max_kl": max_kl,
        "max_error": max_error,
        "max_size": max_size,
        "max_latency_ratio": max_latency_ratio,
    }
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    warn = console.TerminalObserver(quiet=quiet or as_json).warn
    plan = read_sweep(file, output=output, gates=given, time_limit=time_limit, warn=warn)
    if dry_run:
        _show_plan(plan, as_json=as_json)
        return
    with SweepDisplay(plan, quiet=quiet or as_json) as display:
        try:
            outcomes = run_sweep(plan, display, jobs=jobs, resume=resume, fail_fast=fail_fast)
        finally:
            # an interrupted sweep has results, too
            rows = write_results(plan, display.now()) if display.started else []
    code = exit_code(outcomes)
    if as_json:
        console.show_json(json.loads((plan.output / "results.json").read_text(encoding="utf-8")))
    elif not quiet:
        console.show(_results_table(rows))
        line = f"{plan.output}  (summary.md, comparison.html, results.csv, results.json, junit.xml)"
        console.say(line)
    if code:
        bad = [f"{job.name}: {o.message}" for job, o in zip(plan.jobs, outcomes, strict=True) if o.status.bad]
        console.fail("; ".join(bad[:5]) + (f"; and {len(bad) - 5} more" if len(bad) > 5 else ""), code)


class SweepDisplay:
    """The jobs that run, in a table that stays in place; a line for each that ends where there is no terminal."""

    def __init__(self, plan: SweepPlan, *, quiet: bool) -> None:
        self.plan = plan
        self.quiet = quiet
        self.outcomes: dict[str, Outcome] = {}
        self.began: dict[str, float] = {}
        self.live = None if quiet or not console.errors.is_terminal else Live(console=console.errors, transient=True)

    @property
    def started(self) -> bool:
        """Whether the sweep has got as far as its first job."""
        return bool(self.outcomes)

    def now(self) -> list[Outcome]:
        """An outcome for every job, as far as they have come."""
        return [self.outcomes.get(job.name, Outcome(Status.WAITING, "")) for job in self.plan.jobs]

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def changed(self, job: JobPlan, outcome: Outcome) -> None:
        self.outcomes[job.name] = outcome
        if outcome.status is Status.RUNNING:
            self.began[job.name] = time.monotonic()
        if self.quiet or (self.live is not None and not outcome.status.ended):
            return
        ended = sum(each.status.ended for each in self.outcomes.values())
        count = f"[{ended}/{len(self.plan.jobs)}] " if outcome.status.ended else ""
        seconds = "found finished" if outcome.reused else f"{outcome.seconds:.1f} s" if outcome.status.ended else ""
        details = "; ".join(filter(None, (seconds, outcome.message)))
        line = Text.assemble(f"{count}{job.name}: ", (str(outcome.status), STYLES.get(outcome.status, "")))
        console.errors.print(line + Text(shown_text(f" ({details})") if details else ""), soft_wrap=self.live is None)

    def tick(self) -> None:
        if self.live is not None:
            self.live.update(self._table())

    def _table(self) -> Group:
        grid = Grid.grid(padding=(0, 2))
        for name, outcome in self.outcomes.items():
            if outcome.status is Status.RUNNING:
                seconds = time.monotonic() - self.began[name]
                grid.add_row(Text(name, style="cyan"), f"{seconds:.0f} s", Text(self._stage(name), overflow="ellipsis"))
        ended = sum(outcome.status.ended for outcome in self.outcomes.values())
        return Group(grid, Text(f"{ended} of {len(self.plan.jobs)} jobs ended", style="bold"))

    def _stage(self, name: str) -> str:
        """The last line that the job has said."""
        try:
            lines = (self.plan.output / name / "log.txt").read_bytes()[-2000:].decode(errors="replace").split("\n")
        except OSError:
            return ""
        return shown(next((line.strip() for line in reversed(lines) if line.strip()), ""))


def _show_plan(plan: SweepPlan, *, as_json: bool) -> None:
    keys = fingerprints([job.config for job in plan.jobs])
    if as_json:
        listed = [
            {"job": job.name, "fingerprint": key, "gates": job.gates.to_dict(), "recipe": job.config.to_dict()}
            for job, key in zip(plan.jobs, keys, strict=True)
        ]
        console.show_json(listed)
        return
    table = Table(["job", "fingerprint", "gates", "command"], left=4)
    for job, key in zip(plan.jobs, keys, strict=True):
        bounds = ", ".join(f"{name} {bound:g}" for name, bound in job.gates.to_dict().items())
        table.add(job.name, key[:12], bounds, job.config.command())
    console.show(table)


def _results_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(["job", "status", "kept", "MB", "dense", "score", "drop", "KL", "seconds"], left=2)

    def figure(value: float | None, scale: float, digits: int) -> str:
        return "" if value is None else f"{value * scale:.{digits}f}"

    for row in rows:
        table.add(
            row["job"],
            str(row["status"]),
            figure(row["kept"], 1, 3),
            figure(row["bytes"], 1e-6, 2),
            figure(row["dense_score"], 100, 1),
            figure(row["score"], 100, 1),
            figure(row["drop"], 100, 1),
            figure(row["kl"], 1, 3),
            figure(row["seconds"], 1, 1),
        )
    return table
