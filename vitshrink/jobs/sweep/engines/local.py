"""Jobs beside each other on this machine."""

import os
from dataclasses import dataclass

from vitshrink.errors import UsageError
from vitshrink.jobs.sweep.engines.registry import Task, Wanted, Work, engine
from vitshrink.jobs.sweep.output import LOG, RECIPE
from vitshrink.runtime.child import Child, environment


@dataclass(frozen=True)
class Local:
    """Processes of this machine. Several at once share its cores, unless the user has shared them out."""

    most: int

    def start(self, work: Work) -> Task:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = cores // self.most if self.most > 1 else None
        with (work.directory / LOG).open("wb") as log:
            process = Child(work.directory / RECIPE, log, environment(threads), lock=work.lock)
        os.pwrite(work.lock, f"{process.pid}\n".encode(), 0)
        return process

    def close(self) -> None:
        pass


@engine("local")
def local(wanted: Wanted) -> Local:
    """One job at a time, if the user does not say how many. Raises UsageError for an address."""
    if wanted.address is not None:
        raise UsageError(f"--address {wanted.address}: --engine local runs jobs on this machine; write --engine ray.")
    return Local(wanted.jobs or 1)
