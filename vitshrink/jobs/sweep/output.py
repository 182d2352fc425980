"""The output of a sweep: what lies in it, and who may write it.

A job has a directory: ``recipe.yaml``, ``log.txt``, ``job.json`` (what became of it), ``lock`` (held as long as its
process lives, whatever became of the sweep that started it) and ``model``, which appears whole or not at all.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vitshrink.errors import OutputError, explanation
from vitshrink.jobs.sweep.outcome import FILE_NAME
from vitshrink.jobs.sweep.plan import CACHE, SweepPlan
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
    with ExitStack() as held:
        try:
            output.mkdir(parents=True, exist_ok=True)
            _check(plan, resume=resume)
            _hold(output / f".{LOCK}", held, f"another sweep is writing {output}", shared=shard is not None)
            if shard is not None:
                path = output / f".{LOCK}-{shard.number}-of-{shard.count}"
                _hold(path, held, f"another sweep is writing shard {shard} of {output}")
        except OSError as error:
            raise OutputError(f"cannot write {output}: {explanation(error)}.") from error
        yield


def _check(plan: SweepPlan, *, resume: bool) -> None:
    output = plan.output
    names = {path.name for path in output.iterdir()}
    locks = {name for name in names if name.startswith(f".{LOCK}")}
    there = names - locks - {CACHE}
    if not there:
        return
    mine = there if plan.shard is None else there & {job.name for job in plan.jobs}
    if mine and not resume:
        what = "is not empty" if plan.shard is None else f"holds jobs of shard {plan.shard}, such as {min(mine)}"
        raise OutputError(f"{output} {what}: pass --resume to go on with the sweep in it, or choose another.")
    begun = any(name.startswith(f".{LOCK}-") for name in locks)  # another shard, which may have no result yet
    if not begun and not any(output.glob(f"*/{FILE_NAME}")):
        raise OutputError(f"{output} holds no sweep to resume: choose another output.")


def _hold(path: Path, held: ExitStack, problem: str, *, shared: bool = False) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    held.callback(os.close, descriptor)
    if try_lock(descriptor, shared=shared) is False:
        raise OutputError(f"{problem}: wait for it, or choose another output.")


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
