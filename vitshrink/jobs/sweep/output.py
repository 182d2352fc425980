"""The output of a sweep: what lies in it, and who may write it.

A job has a directory: ``recipe.yaml``, ``log.txt``, ``job.json`` (what became of it), ``lock`` (held as long as its
process lives, whatever became of the sweep that started it) and ``model``, which appears whole or not at all.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vitshrink.errors import OutputError, explanation
from vitshrink.jobs.sweep.outcome import FILE_NAME
from vitshrink.jobs.sweep.plan import CACHE, JobPlan, SweepPlan
from vitshrink.models.publication import REPORT
from vitshrink.runtime.checksums import broken_files
from vitshrink.runtime.locks import require_locks, try_lock

LOG, RECIPE, LOCK, MODEL = "log.txt", "recipe.yaml", "lock", "model"


@contextmanager
def locked(plan: SweepPlan, *, resume: bool) -> Iterator[None]:
    """The output for this sweep as long as it lives: alone, or beside other shards of it.

    Raises:
        OutputError: it holds something else, or another sweep is writing it.
    """
    require_locks()
    output, shard = plan.output, plan.shard
    if plan.store is not None:  # where there are no locks
        _check(plan, {name.split("/")[0] for name in plan.store.names()}, resume=resume)
        fetch(plan, plan.jobs)
        yield
        return
    with ExitStack() as held:
        try:
            output.mkdir(parents=True, exist_ok=True)
            _check(plan, {path.name for path in output.iterdir()}, resume=resume)
            _hold(output / f".{LOCK}", held, f"another sweep writes to {output}", shared=shard is not None)
            if shard is not None:
                path = output / f".{LOCK}-{shard.number}-of-{shard.count}"
                _hold(path, held, f"another sweep writes to shard {shard} of {output}")
        except OSError as error:
            raise OutputError(f"cannot write {output}: {explanation(error)}.") from error
        yield


def _check(plan: SweepPlan, names: set[str], *, resume: bool) -> None:
    output = plan.shown
    locks = {name for name in names if name.startswith(f".{LOCK}")}
    there = names - locks - {CACHE}
    if not there:
        return
    mine = there if plan.shard is None else there & {job.name for job in plan.jobs}
    if mine and not resume:
        what = "is not empty" if plan.shard is None else f"contains jobs of shard {plan.shard}, such as {min(mine)}"
        raise OutputError(f"{output} {what}: pass --resume to continue the sweep in it, or choose another.")
    begun = any(name.startswith(f".{LOCK}-") for name in locks)  # another shard, which may have no result yet
    if plan.store is None and not begun and not any(plan.output.glob(f"*/{FILE_NAME}")):
        raise OutputError(f"{output} holds no sweep to resume: choose another output.")


def _hold(path: Path, held: ExitStack, problem: str, *, shared: bool = False) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    held.callback(os.close, descriptor)
    if try_lock(descriptor, shared=shared) is False:
        raise OutputError(f"{problem}: wait until it ends, or choose another output.")


FIGURES = f"{MODEL}/{REPORT}"


def fetch(plan: SweepPlan, jobs: Sequence[JobPlan], names: Sequence[str] = (FILE_NAME, LOG, FIGURES)) -> None:
    """Copy what is read of finished jobs from the store of an output that is a URL. Raises OutputError."""
    if plan.store is not None:
        for job, name in itertools.product(jobs, names):
            (plan.store / job.name).fetch(name, plan.output / job.name / name)


def keep(plan: SweepPlan, job: JobPlan) -> None:
    """Copy what the sweep has written of a job to the store of an output that is a URL. Raises OutputError."""
    if plan.store is not None:
        files = (plan.output / job.name / name for name in (RECIPE, LOG, FILE_NAME))
        for file in filter(Path.exists, files):
            (plan.store / job.name).put(file, file.name)


def damage(plan: SweepPlan, job: JobPlan) -> str | None:
    """What is wrong with the files of a finished job; None where all are there as they were published.

    In a store, where that would mean to read all of them, the marker counts and that nothing it lists is missing.
    """
    if plan.store is not None:
        return (plan.store / job.name / MODEL).missing()
    directory = plan.output / job.name
    if not (directory / MODEL).is_dir():
        return "there is none"
    try:
        broken = broken_files(directory / MODEL)
    except OSError as error:  # it cannot be looked at, so it is made again
        return explanation(error)
    return next((f"{name} {what}" for name, what in broken.items()), None)


def is_running(directory: Path) -> bool:
    """Whether the process of a job holds its lock."""
    try:
        descriptor = os.open(directory / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        return try_lock(descriptor) is False
    finally:
        os.close(descriptor)
