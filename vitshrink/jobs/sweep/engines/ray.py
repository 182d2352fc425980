"""Jobs on a Ray cluster: each on a machine that has what the sweep says it needs, and again where that is lost."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TextIO

from vitshrink.errors import UsageError, VitshrinkError
from vitshrink.jobs.sweep.engines.registry import Task, Wanted, Work, engine
from vitshrink.jobs.sweep.output import LOCK, LOG, RECIPE
from vitshrink.jobs.sweep.resources import Resources
from vitshrink.runtime.attendant import Attendant, Errand
from vitshrink.runtime.child import GRACE
from vitshrink.runtime.extras import require
from vitshrink.runtime.locks import unlock

MOST_LOST = 3
"""How many machines may be lost with a job before it has failed: it may be what ends them."""


class Attempt:
    """A job on the way through the cluster."""

    def __init__(self, cluster: Any, work: Work, errand: Errand) -> None:
        self._ray, self._work, self._errand, self._lost = cluster, work, errand, 0
        self._send()

    def _send(self) -> None:
        needs = self._work.resources
        placed = self._ray.remote(Attendant).options(
            num_cpus=needs.cpus,
            num_gpus=needs.gpus,
            memory=needs.memory,
            max_restarts=0,
            max_concurrency=4,  # it is asked while it runs the job
            name=None,
        )
        self._attendant = placed.remote()
        self._place = self._attendant.place.remote()
        self._code = self._attendant.run.remote(replace(self._errand, again=self._lost > 0))

    @property
    def began(self) -> bool:
        return bool(self._ray.wait([self._place], timeout=0)[0])

    def poll(self) -> int | None:
        if not self._ray.wait([self._code], timeout=0)[0]:
            return None
        try:
            code = int(self._ray.get(self._code))
            if self._work.store is not None:
                self._work.store.fetch(LOG, self._work.directory / LOG)
            return code
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            known = isinstance(cause, VitshrinkError)
            raise VitshrinkError(str(cause) if known else f"{type(cause).__name__}: {cause}") from error
        except self._ray.exceptions.RayError as error:
            self._again(error)
            return None

    def _again(self, error: Exception) -> None:
        self._forget()
        self._lost += 1
        reason = type(error).__name__
        if self._lost > MOST_LOST:
            raise VitshrinkError(f"its machines were lost {self._lost} times; the last time: {reason}")
        self._work.say(f"its machine was lost, so it runs again: {reason}")
        self._send()

    def terminate(self) -> None:
        with suppress(self._ray.exceptions.RayError):
            self._attendant.terminate.remote()

    def wait(self, seconds: float) -> None:
        if self.began:
            self._ray.wait([self._code], timeout=max(0.0, seconds))

    def kill(self) -> None:
        if self.began:
            with suppress(self._ray.exceptions.RayError):
                self._ray.get(self._attendant.kill.remote(), timeout=GRACE)
        self._forget()

    def _forget(self) -> None:
        with suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.kill(self._attendant)


@dataclass
class Cluster:
    """A cluster that was joined, or was started on this machine for this sweep (``own``)."""

    ray: Any
    most: int
    own: bool
    _waited: set[Resources] = field(default_factory=set)

    def start(self, work: Work) -> Task:
        needs = work.resources
        if needs not in self._waited and not self._fits(needs):
            self._waited.add(needs)
            work.say(f"waits for a machine with {needs}; the cluster has none now")
        unlock(work.lock)  # it is taken where the job runs
        threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, int(needs.cpus)))
        text = (work.directory / RECIPE).read_text(encoding="utf-8")
        directory = str(work.store or work.directory.absolute())
        errand = Errand(os.getcwd(), directory, RECIPE, LOG, LOCK, threads, work.store is None, text)
        return Attempt(self.ray, work, errand)

    def close(self) -> None:
        self.ray.shutdown()
        if isinstance(sys.stdout, WithoutRay):
            sys.stdout = sys.stdout.stream

    def require(self, needs: Resources) -> None:
        """Raises UsageError for what this machine, which is the whole cluster, will never have."""
        if self.own and not self._fits(needs):
            raise UsageError(
                f"a job needs {needs}, and this machine has less: lower 'resources', or pass the --address of a "
                "cluster."
            )

    def _fits(self, needs: Resources) -> bool:
        wanted = {"CPU": needs.cpus, "GPU": needs.gpus, "memory": needs.memory or 0}
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes)


@engine("ray")
def join(wanted: Wanted) -> Cluster:
    """Join the cluster at an address, or start one on this machine. Raises DependencyError and UsageError."""
    require("ray", "--engine ray")
    import ray

    try:
        with _own_signals():
            ray.init(
                address=wanted.address or "local",
                include_dashboard=None if wanted.address else False,
                log_to_driver=False,
                logging_level="ERROR",
            )
    except Exception as error:  # an address that is none, nobody there, another version of Ray or Python
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UsageError(
            f"--address {wanted.address}: cannot join a Ray cluster there ({reason}). Start one with 'ray start "
            "--head', or remove --address."
        ) from error
    sys.stdout = WithoutRay(sys.stdout)
    cluster = Cluster(ray, wanted.jobs or sys.maxsize, own=wanted.address is None)
    try:
        for needs in dict.fromkeys(wanted.resources):
            cluster.require(needs)
    except UsageError:
        cluster.close()
        raise
    return cluster


class WithoutRay:
    """Standard output without what the threads of Ray print there, which no setting of it keeps back."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        own = not threading.current_thread().name.startswith("ray_")
        return self.stream.write(text) if own else len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handler of SIGTERM, which Ray replaces by one that leaves the jobs to themselves."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
