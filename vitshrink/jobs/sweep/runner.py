"""Running the jobs of a sweep, each in a process of its own, and finding those that are finished already.

A job has a directory: ``recipe.yaml``, ``log.txt``, ``job.json`` (what became of it), ``lock`` (held as long as its
process lives, whatever became of the sweep that started it) and ``model``, which appears whole or not at all.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from vitshrink.compression.choices import Choices
from vitshrink.config.options import CompressConfig
from vitshrink.errors import DataError, GateError, OutputError, UsageError, VitshrinkError, explanation
from vitshrink.evaluation.gates import Gates
from vitshrink.jobs.sweep.fingerprint import fingerprints, is_same
from vitshrink.jobs.sweep.outcome import FILE_NAME, Outcome, Status
from vitshrink.jobs.sweep.plan import CACHE, JobPlan, SweepPlan
from vitshrink.report import Report
from vitshrink.runtime.checksums import broken_files
from vitshrink.runtime.locks import require_locks, try_lock

POLL = 0.1
"""Seconds between two looks at the running processes."""

GRACE = 10.0
"""Seconds that a process gets to clean up before it is killed."""

LOG, RECIPE, LOCK, MODEL = "log.txt", "recipe.yaml", "lock", "model"


def command(recipe: Path) -> list[str]:
    """The process that runs a job: the command line of this installation."""
    return [sys.executable, "-m", "vitshrink", "compress", "--config", str(recipe)]


class SweepObserver(Protocol):
    """How the command line follows a sweep."""

    def changed(self, job: JobPlan, outcome: Outcome) -> None:
        """A job was found, started or ended."""

    def tick(self) -> None:
        """Called several times a second."""


def run_sweep(
    plan: SweepPlan, observer: SweepObserver, *, jobs: int = 1, resume: bool = False, fail_fast: bool = False
) -> list[Outcome]:
    """Run what is not finished, ``jobs`` processes at once, and hold every result against its bounds.

    Args:
        resume: go on with a sweep in this output; a job is finished when one with the same fingerprint is there.
        fail_fast: the first job that breaks or misses a bound ends those that run, and none is started any more.

    Returns:
        An outcome for every job of the plan, in its order.

    Raises:
        OutputError: the output holds something else, or another sweep is writing it.
    """
    with _locked(plan.output, resume=resume):
        running = _Sweep(plan, observer, jobs, fail_fast)
        try:
            running.run(resume=resume)
        finally:
            running.stop()
        return [running.outcomes[job.name] for job in plan.jobs]


@contextmanager
def _locked(output: Path, *, resume: bool) -> Iterator[None]:
    """The output for this sweep alone, as long as it lives."""
    require_locks()
    try:
        output.mkdir(parents=True, exist_ok=True)
        there = [path.name for path in output.iterdir() if path.name not in (f".{LOCK}", CACHE)]
        if there and not resume:
            raise OutputError(f"{output} is not empty: pass --resume to go on with the sweep in it, or choose another.")
        if there and not any(output.glob(f"*/{FILE_NAME}")):
            raise OutputError(f"{output} holds no sweep to resume: choose another output.")
        descriptor = os.open(output / f".{LOCK}", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {explanation(error)}.") from error
    try:
        if try_lock(descriptor) is False:
            raise OutputError(f"another sweep is writing {output}: wait for it, or choose another output.")
        yield
    finally:
        os.close(descriptor)


@dataclass
class _Running:
    """A job under way; without a process where one that an earlier sweep started is waited for."""

    job: JobPlan
    started: float
    process: "subprocess.Popen[bytes] | None" = None
    lock: int | None = None


@dataclass
class _Sweep:
    plan: SweepPlan
    observer: SweepObserver
    most: int
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
            self.outcomes[job.name] = Outcome(Status.WAITING, key)
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
            while len(self.running) < self.most and (ready := self._next(waiting)) is not None:
                waiting.remove(ready)
                with self._for(ready):
                    self._start(ready)
            self.observer.tick()
            if self.running:
                time.sleep(POLL)

    def stop(self) -> None:
        """End every process: gently, and then not."""
        for under_way in self.running:
            _signal(under_way, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for under_way in self.running:
            if under_way.process is not None:
                with suppress(subprocess.TimeoutExpired):
                    under_way.process.wait(max(0.0, deadline - time.monotonic()))
                _signal(under_way, signal.SIGKILL)
                under_way.process.wait()
            _release(under_way)
        self.running.clear()

    @contextmanager
    def _for(self, job: JobPlan) -> Iterator[None]:
        """Whatever goes wrong here is the failure of one job, and of no other."""
        try:
            yield
        except Exception as error:
            for under_way in [each for each in self.running if each.job is job]:
                _signal(under_way, signal.SIGKILL)
                if under_way.process is not None:
                    under_way.process.wait()
                self._ended(under_way)
            known = isinstance(error, VitshrinkError)
            self._became(job, Status.FAILED, message=str(error) if known else f"{type(error).__name__}: {error}")
            with suppress(OSError):
                self.outcomes[job.name].write(self.plan.output / job.name)

    def _cancel(self, waiting: Sequence[JobPlan]) -> None:
        stopped = [under_way.job for under_way in self.running]
        self.stop()
        for job in (*stopped, *waiting):
            self._became(job, Status.CANCELLED, message="not run to its end: another job failed, and --fail-fast")

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
                self._became(job, Status.RUNNING, message="waits for the process of an earlier sweep")
                return
            shutil.rmtree(directory / MODEL, ignore_errors=True)  # or it might be taken for the new one
            (directory / RECIPE).write_text(job.config.to_yaml(), encoding="utf-8")
            self._became(job, Status.RUNNING)
            self.outcomes[job.name].write(directory)
            with (directory / LOG).open("wb") as log:
                under_way.process = subprocess.Popen(
                    command(directory / RECIPE),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=_environment(self.most),
                    pass_fds=(lock,),
                    start_new_session=True,  # so that a time limit reaches all that the job has started
                )
            os.pwrite(lock, f"{under_way.process.pid}\n".encode(), 0)
        except OSError as error:
            raise OutputError(f"cannot write {directory}: {explanation(error)}.") from error
        if statistics := self.statistics[job.name]:
            self.shared.setdefault(statistics, False)

    def _look_at(self, under_way: _Running) -> JobPlan | None:
        """See whether a job has ended. Gives the job when it has to be started anew."""
        job, process = under_way.job, under_way.process
        late = self.plan.time_limit is not None and time.monotonic() - under_way.started > self.plan.time_limit
        if process is None:
            return self._look_at_earlier(under_way, late=late)
        code = process.poll()
        if code is None and not late:
            return None
        if code is None:
            _signal(under_way, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            _signal(under_way, signal.SIGKILL)
            process.wait()
        self._ended(under_way)
        if code is None:
            self._became(job, Status.TIMEOUT, message=f"took longer than {self.plan.time_limit:g} s")
        elif code == 0:
            self._judge(job)
        elif code == GateError.exit_code:
            self._became(job, Status.GATE, message=_last_error(self.plan.output / job.name / LOG, code))
        else:
            self._became(job, Status.FAILED, message=_last_error(self.plan.output / job.name / LOG, code))
        self.outcomes[job.name].write(self.plan.output / job.name)
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
        directory = self.plan.output / job.name
        earlier = Outcome.read(directory)
        if earlier is None or not is_same(earlier.fingerprint, self.outcomes[job.name].fingerprint):
            return False
        if earlier.status not in (Status.RUNNING, Status.PASSED, Status.GATE) or not (directory / MODEL).is_dir():
            return False
        try:
            if broken_files(directory / MODEL) or _is_locked(directory / LOCK):
                return False
        except OSError:  # it cannot be looked at, so it is made again
            return False
        self.outcomes[job.name] = replace(earlier, reused=True)
        with self._for(job):
            self._judge(job)
            self.outcomes[job.name].write(directory)
        return True

    def _judge(self, job: JobPlan) -> None:
        """Hold a result against the bounds of its job."""
        try:
            status, message = judge(job.gates, Report.read(self.plan.output / job.name / MODEL))
        except (DataError, UsageError) as error:
            status, message = Status.FAILED, str(error)
        self._became(job, status, message=message)

    def _became(self, job: JobPlan, status: Status, *, message: str = "") -> None:
        self.outcomes[job.name] = replace(self.outcomes[job.name], status=status, message=message)
        self.observer.changed(job, self.outcomes[job.name])


def judge(gates: Gates, report: Report) -> tuple[Status, str]:
    """Whether a result keeps its bounds, and by how much. Raises UsageError where that cannot be told."""
    nbytes = report.bytes and report.bytes.compressed
    verdicts = gates.judge(report.evaluation, nbytes=nbytes, latency_ratio=report.latency_ratio)
    status = Status.PASSED if all(verdict.passed for verdict in verdicts) else Status.GATE
    return status, "; ".join(map(str, sorted(verdicts, key=lambda verdict: verdict.passed)))


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


def _environment(processes: int) -> Mapping[str, str]:
    """That of this process; several at once share the cores, unless the user has shared them out."""
    environment = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "COLUMNS")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if processes > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    return environment


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        return try_lock(descriptor) is False
    finally:
        os.close(descriptor)


def _signal(under_way: _Running, number: int) -> None:
    if under_way.process is not None and under_way.process.poll() is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(under_way.process.pid, number)


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
        return f"killed by {killed}" + (", as when memory runs out" if -code == signal.SIGKILL else "")
    return f"ended with exit code {code}: see {log}"
