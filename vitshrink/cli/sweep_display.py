"""How a sweep is followed: in a table on a terminal, and line by line elsewhere."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from rich.console import Group
from rich.live import Live
from rich.table import Table as Grid
from rich.text import Text

from vitshrink.cli import console
from vitshrink.cli.groups import DisplayOptions, SweepOptions
from vitshrink.cli.table import Table
from vitshrink.config.names import shown, shown_text
from vitshrink.jobs.sweep import (
    JobPlan,
    Outcome,
    Shard,
    Status,
    SweepPlan,
    collect,
    exit_code,
    fingerprints,
    missing,
    read_sweep,
    run_sweep,
    write_results,
)
from vitshrink.runtime.storage import below

STYLES = {
    Status.PASSED: "green",
    Status.GATE: "red",
    Status.FAILED: "red",
    Status.TIMEOUT: "red",
    Status.RUNNING: "cyan",
}


def run(options: SweepOptions, bounds: Mapping[str, Any], display: DisplayOptions) -> None:
    """The sweep of a file, with these bounds, or with ``dry_run`` a list of its jobs. Exits as it ends."""
    warn = console.TerminalObserver(quiet=display.silent).warn
    plan = read_sweep(options.file, output=options.output, gates=bounds, time_limit=options.time_limit, warn=warn)
    plan = plan.part(None if options.shard is None else Shard.read(options.shard))
    if options.dry_run:
        _show_plan(plan, as_json=display.as_json)
        return
    if options.collect:
        outcomes = collect(plan)
        _end(plan, outcomes, write_results(plan, outcomes), display)
        return
    with SweepDisplay(plan, quiet=display.silent) as shown_jobs:
        try:
            asked = ("jobs", "resume", "fail_fast", "engine", "address")
            outcomes = run_sweep(plan, shown_jobs, **{name: getattr(options, name) for name in asked})
        finally:
            # an interrupted sweep has results, too
            rows = write_results(plan, shown_jobs.now()) if shown_jobs.started else []
    _end(plan, outcomes, rows, display)


def _end(plan: SweepPlan, outcomes: Sequence[Outcome], rows: list[dict[str, Any]], display: DisplayOptions) -> None:
    """Show the results, and exit with an error where they are not as they should be."""
    if display.as_json:
        console.show_json(json.loads((plan.results / "results.json").read_text(encoding="utf-8")))
    elif not display.quiet:
        console.show(_results_table(rows))
        shown_results = below(plan.shown, *plan.results.relative_to(plan.output).parts)
        line = f"{shown_results}  (summary.md, comparison.html, results.csv, results.json, junit.xml)"
        console.say(line)
    code = exit_code(outcomes)
    if absent := missing(plan, outcomes):
        told = f"{', '.join(absent[:20])}{f' and {len(absent) - 20} more' if len(absent) > 20 else ''}"
        remedy = "run their shards with --resume, then --collect again."
        console.fail(f"{len(absent)} of {len(plan.jobs)} jobs are missing in {plan.shown}: {told}: {remedy}", code)
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
