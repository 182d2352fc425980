"""Running the jobs of a sweep, each in a process of its own, and finding those that are finished already."""

import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from vitshrink.compression.choices import Choices
from vitshrink.config.options import CompressConfig
from vitshrink.errors import GateError, OutputError, VitshrinkError, explanation
from vitshrink.jobs.sweep.engines import Engine, Task, Wanted, Work, open_engine
from vitshrink.jobs.sweep.fingerprint import fingerprints, is_same, recipe_key
from vitshrink.jobs.sweep.finished import finished, judged
from vitshrink.jobs.sweep.outcome import Outcome, Status
from vitshrink.jobs.sweep.output import FIGURES, LOCK, LOG, MODEL, RECIPE, fetch, keep, locked
from vitshrink.jobs.sweep.plan import JobPlan, SweepPlan
from vitshrink.runtime.child import GRACE
from vitshrink.runtime.locks import try_lock
from vitshrink.runtime.storage import MARKER

POLL = 0.1
"""Seconds between two looks at the running processes."""


class SweepObserver(Protocol):
    """How the command line follows a sweep."""

    def changed(self, job: JobPlan, outcome: Outcome) -> None:
        """A job was found, started or ended."""

    def tick(self) -> None:
        """Called several times a second."""


def run_sweep(
    plan: SweepPlan,
    observer: SweepObserver,
    *,
    jobs: int | None = None,
    resume: bool = False,
    fail_fast: bool = False,
    engine: str = "local",
    address: str | None = None,
) -> list[Outcome]:
    """Run what is not finished, ``jobs`` processes at once, and hold every result against its bounds.

    Args:
        jobs: None: as many as the engine holds right, one on this machine.
        resume: go on with a sweep in this output; a job is finished when one with the same fingerprint is there.
        fail_fast: the first job that breaks or misses a bound ends those that run, and none is started any more.
        engine: what runs the jobs: one of ``engines.ENGINES``.
        address: of the cluster that the engine is to use.

    Returns:
        An outcome for every job of the plan, in its order.

    Raises:
        OutputError: the output holds something else, or another sweep is writing it.
        UsageError: there is no such engine, or a job needs what it does not have.
        DependencyError: the engine needs a package that is missing.
    """
    with locked(plan, resume=resume):
        runs_on = open_engine(engine, Wanted(jobs, address, [job.resources for job in plan.jobs]))
        running = _Sweep(plan, observer, runs_on, fail_fast)
        try:
            running.run(resume=resume)
        finally:
            running.stop()
            runs_on.close()
        return [running.outcomes[job.name] for job in plan.jobs]


@dataclass
class _Running:
    """A job under way; without a task where one that an earlier sweep started is waited for."""

    job: JobPlan
    started: float
    task: Task | None = None
    lock: int | None = None


@dataclass
class _Sweep:
    plan: SweepPlan
    observer: SweepObserver
    engine: Engine
    fail_fast: bool
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    running: list[_Running] = field(default_factory=list)
    shared: dict[str, bool] = field(default_factory=dict)
    """For each set of statistics that several jobs need: whether it is known to lie in the cache."""
    statistics: dict[str, str] = field(default_factory=dict)
    """The set that a job needs, by its name."""

    def run(self, *, resume: bool) -> None:
        waiting = list(self.plan.jobs)
        for job, key in zip(waiting, fingerprints([job.config for job in waiting]), strict=True):
            self.outcomes[job.name] = Outcome(Status.WAITING, key, recipe=recipe_key(job.config))
            self.statistics[job.name] = _statistics_of(job.config)
        if resume:
            waiting = [job for job in waiting if not self._finished(job)]
        while waiting or self.running:
            for under_way in list(self.running):
                with self._for(under_way.job):
                    if (again := self._look_at(under_way)) is not None:
                        waiting.insert(0, again)
            if self.fail_fast and any(o.status.broken or o.status is Status.GATE for o in self.outcomes.values()):
                self._cancel(waiting)
                return
            while len(self.running) < self.engine.most and (ready := self._next(waiting)) is not None:
                waiting.remove(ready)
                with self._for(ready):
                    self._start(ready)
            self.observer.tick()
            if self.running:
                time.sleep(POLL)

    def stop(self) -> None:
        """End every process: gently, and then not."""
        for under_way in self.running:
            if under_way.task is not None:
                under_way.task.terminate()
        deadline = time.monotonic() + GRACE
        for under_way in self.running:
            if under_way.task is not None:
                under_way.task.wait(deadline - time.monotonic())
                under_way.task.kill()
            _release(under_way)
        self.running.clear()

    @contextmanager
    def _for(self, job: JobPlan) -> Iterator[None]:
        """Whatever goes wrong here is the failure of one job, and of no other."""
        try:
            yield
        except Exception as error:
            for under_way in [each for each in self.running if each.job is job]:
                if under_way.task is not None:
                    under_way.task.kill()
                self._ended(under_way)
            known = isinstance(error, VitshrinkError)
            self._became(job, Status.FAILED, message=str(error) if known else f"{type(error).__name__}: {error}")
            with suppress(OSError, OutputError):
                self._write(job)

    def _cancel(self, waiting: Sequence[JobPlan]) -> None:
        stopped = [under_way.job for under_way in self.running]
        self.stop()
        for job in (*stopped, *waiting):
            self._became(job, Status.CANCELLED, message="stopped, because another job failed and --fail-fast was given")

    def _next(self, waiting: Sequence[JobPlan]) -> JobPlan | None:
        """The first job whose statistics are not being collected by another one at this moment."""
        return next((job for job in waiting if self.shared.get(self.statistics[job.name], True)), None)

    def _start(self, job: JobPlan) -> None:
        directory = self.plan.output / job.name
        try:
            directory.mkdir(exist_ok=True)
            lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            under_way = _Running(job, time.monotonic(), lock=lock)
            self.running.append(under_way)
            if try_lock(lock) is False:
                self._became(job, Status.RUNNING, message="waits for a process of an earlier sweep")
                return
            shutil.rmtree(directory / MODEL, ignore_errors=True)  # or it might be taken for the new one
            if self.plan.store is not None:
                (self.plan.store / job.name / MODEL).remove(MARKER)
            (directory / RECIPE).write_text(job.config.to_yaml(), encoding="utf-8")
            self._became(job, Status.RUNNING)
            self._write(job)
            under_way.task = self.engine.start(self._work(job, directory, lock))
        except OSError as error:
            raise OutputError(f"cannot write {directory}: {explanation(error)}.") from error
        if statistics := self.statistics[job.name]:
            self.shared.setdefault(statistics, False)

    def _work(self, job: JobPlan, directory: Path, lock: int) -> Work:
        def say(message: str) -> None:
            self._became(job, Status.RUNNING, message=message)

        store = None if self.plan.store is None else self.plan.store / job.name
        return Work(job.name, directory, lock, job.resources, say, store)

    def _look_at(self, under_way: _Running) -> JobPlan | None:
        """See whether a job has ended. Gives the job when it has to be started anew."""
        job, task = under_way.job, under_way.task
        if task is not None and not task.began:
            under_way.started = time.monotonic()
        late = self.plan.time_limit is not None and time.monotonic() - under_way.started > self.plan.time_limit
        if task is None:
            return self._look_at_earlier(under_way, late=late)
        code = task.poll()
        if code is None and not late:
            return None
        if code is None:
            task.terminate()
            task.wait(GRACE)
            task.kill()
        self._ended(under_way)
        if code is None:
            self._became(job, Status.TIMEOUT, message=f"took longer than {self.plan.time_limit:g} s")
        elif code == 0:
            self._judge(job)
        elif code == GateError.exit_code:
            self._became(job, Status.GATE, message=_last_error(self.plan.output / job.name / LOG, code))
        else:
            self._became(job, Status.FAILED, message=_last_error(self.plan.output / job.name / LOG, code))
        self._write(job)
        return None

    def _look_at_earlier(self, under_way: _Running, *, late: bool) -> JobPlan | None:
        """Wait for a process that an earlier sweep has started; its result counts if it is what is wanted now."""
        job = under_way.job
        assert under_way.lock is not None
        if try_lock(under_way.lock) is not False:
            self._ended(under_way)
            return None if self._finished(job) else job
        if late:
            owner = os.pread(under_way.lock, 20, 0).decode(errors="replace").strip()
            self._ended(under_way)
            self._became(job, Status.TIMEOUT, message=f"process {owner} of an earlier sweep still runs it")
        return None

    def _ended(self, under_way: _Running) -> None:
        self.running.remove(under_way)
        _release(under_way)
        self.shared[self.statistics[under_way.job.name]] = True
        taken = time.monotonic() - under_way.started
        self.outcomes[under_way.job.name] = replace(self.outcomes[under_way.job.name], seconds=taken)

    def _finished(self, job: JobPlan) -> bool:
        """Take over a job that ended well, now or in an earlier sweep, if its result is there and undamaged."""
        now = self.outcomes[job.name]
        earlier = finished(self.plan, job, lambda outcome: is_same(outcome.fingerprint, now.fingerprint))
        if earlier is None:
            return False
        self.outcomes[job.name] = replace(earlier, reused=True, recipe=now.recipe)
        with self._for(job):
            self._judge(job)
            self._write(job)
        return True

    def _judge(self, job: JobPlan) -> None:
        """Hold a result against the bounds of its job."""
        fetch(self.plan, [job], [FIGURES])
        self.outcomes[job.name] = judged(self.outcomes[job.name], job.gates, self.plan.output / job.name)
        self.observer.changed(job, self.outcomes[job.name])

    def _write(self, job: JobPlan) -> None:
        self.outcomes[job.name].write(self.plan.output / job.name)
        keep(self.plan, job)

    def _became(self, job: JobPlan, status: Status, *, message: str = "") -> None:
        self.outcomes[job.name] = replace(self.outcomes[job.name], status=status, message=message)
        self.observer.changed(job, self.outcomes[job.name])


def _statistics_of(config: CompressConfig) -> str:
    """Jobs of which this is equal share what they calibrate, through the cache."""
    try:
        choices = Choices.of(config)
    except VitshrinkError:  # the job itself will say so
        return ""
    if config.cache is None or not choices.calibrated:
        return ""
    shared = [config.cache, config.model, config.calibration, config.calibration_split, config.samples, config.seed]
    layers = [config.layers, config.include, config.exclude]
    return repr([*shared, config.batch_size, config.max_length, config.probes, *layers, choices.method.needs])


def _release(under_way: _Running) -> None:
    if under_way.lock is not None:
        os.close(under_way.lock)
        under_way.lock = None


def _last_error(log: Path, code: int) -> str:
    """The sentence with which a command ended, or what there is instead."""
    lines = log.read_bytes()[-20_000:].decode(errors="replace").splitlines()
    said = next((line for line in reversed(lines) if line.startswith("error: ")), None)
    if said is not None:
        return said.removeprefix("error: ")
    if code < 0:
        killed = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"killed by {killed}" + (", which often means that memory ran out" if -code == signal.SIGKILL else "")
    return f"ended with exit code {code}: see {log}"
