"""One job in several processes, as ``torchrun`` or ``accelerate launch`` starts them.

Each process takes its share of the samples or layers, and all of them learn the results; the first alone speaks and
writes. A process that runs alone needs no special case: its share is everything.
"""

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from vitshrink._version import __version__
from vitshrink.errors import UsageError, VitshrinkError

Item = TypeVar("Item")
Result = TypeVar("Result")


class OtherProcessError(VitshrinkError):
    """Another process of this job has failed; ``silent`` where a process that speaks says why."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.silent = not is_main()


def join(device: str = "auto") -> None:
    """Meet the other processes of this job, where a launcher has started several; each gets a GPU of its own.

    Raises:
        UsageError: more processes than GPUs, where ``device`` is not the CPU, or machines with other versions.
        VitshrinkError: the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or started():
        return
    if device != "cpu" and torch.cuda.is_available():
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > gpus:
            raise UsageError(f"{here} processes for {gpus} GPUs: start one process per GPU, or pass --device cpu.")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        distributed.init_process_group()  # gloo for what is on the CPU, NCCL for what is on a GPU
    except Exception as error:  # the address, the store and each backend have errors of their own
        reason = str(error).strip().split("\n")[0]
        raise VitshrinkError(
            f"cannot connect to the other processes of this job ({reason}): start it with torchrun or accelerate "
            "launch, or unset WORLD_SIZE to run one process."
        ) from error
    require_same({"vitshrink": __version__} | {name: version(name) for name in ("torch", "transformers")})


def leave() -> None:
    """Part from the other processes, at the end of the job."""
    if started():
        distributed.destroy_process_group()


def started() -> bool:
    """Whether this process has met others."""
    return distributed.is_available() and distributed.is_initialized()


def count() -> int:
    """How many processes work on this job."""
    return distributed.get_world_size() if started() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return distributed.get_rank() if started() else 0


def is_main() -> bool:
    """Whether this is the one that speaks and writes."""
    return rank() == 0


def node() -> str:
    """The machine of this process, or what stands for one: launchers count them."""
    return f"node {os.environ['GROUP_RANK']} ({platform.node()})" if "GROUP_RANK" in os.environ else platform.node()


def require_same(facts: Mapping[str, object]) -> None:
    """Raises UsageError where another process passes something else under one of the names; the first one says it."""
    places = gather((f"process {rank()} on {node()}", {name: str(value) for name, value in facts.items()}))
    (main, expected), *others = places
    for place, found in others:
        different = [name for name in expected if found.get(name) != expected[name]]
        if different:
            told = ", ".join(f"{name} ({found.get(name, 'none')[:16]}, {expected[name][:16]})" for name in different)
            error = UsageError(
                f"{place} and {main} differ in {told}: give all processes the same files, flags and versions."
            )
            error.silent = not is_main()
            raise error


def share(items: Sequence[Item]) -> Sequence[Item]:
    """Every ``count()``-th of the items, from the ``rank()``-th: disjoint, and together all of them."""
    return items if count() == 1 else items[rank() :: count()]


def owners(costs: Sequence[float]) -> list[int]:
    """For each of some things the process that works on it, so that all have about as much to do."""
    loads, found = [0.0] * count(), [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        found[number] = loads.index(min(loads))
        loads[found[number]] += costs[number]
    return found


def block(number: int) -> range:
    """This process's share of ``number`` things in a row: neighbors, and in the order of the ranks."""
    start, stop = ((each * number + count() - 1) // count() for each in (rank(), rank() + 1))
    return range(start, stop)


@contextmanager
def together() -> Iterator[None]:
    """Work of every process, at the end of which they meet: where one of them fails all fail, and none waits for it.

    Raises:
        OtherProcessError: another process has failed; the message is its own, and names its machine if that is another.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if not started():
            raise
        failure = error
    told = None if failure is None else (_sentence(failure), getattr(failure, "exit_code", 1), node())
    failures = gather(told)
    if failure is not None:
        raise failure
    for number, other in enumerate(failures):
        if other is not None:
            said, code, place = other
            raise OtherProcessError(said if place == node() else f"process {number} on {place}: {said}", code)


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, VitshrinkError) else f"{type(error).__name__}: {error}"


@contextmanager
def _meeting() -> Iterator[None]:
    """Turn what torch says of a process that has gone into an error that vitshrink means."""
    try:
        yield
    except RuntimeError as error:
        raise OtherProcessError("another process of this job has ended; its last message says why.") from error


def gather(value: Any) -> list[Any]:
    """The values of all processes in the order of their ranks; each process gets them and has to ask for them.

    Raises:
        OtherProcessError: one of them has ended.
    """
    if not started():
        return [value]
    values: list[Any] = [None] * count()
    with _meeting():
        distributed.all_gather_object(values, value)
    return values


def from_process(source: int, value: Any) -> Any:
    """The value that process ``source`` passes, in every process."""
    if not started():
        return value
    values = [value]
    with _meeting():
        distributed.broadcast_object_list(values, src=source)
    return values[0]


def send(source: int, tensor: Tensor) -> None:
    """Fill a tensor with what it holds in process ``source``: of the same shape and type in all of them."""
    if started():
        with _meeting():
            distributed.broadcast(tensor, src=source)


def from_main(value: Any) -> Any:
    """The value that the first process passes, in every process."""
    return from_process(0, value)


def by_main(work: Callable[[], Result]) -> Result:
    """What the first process makes, in every process; the others wait, and leave it the processor.

    Raises:
        OtherProcessError: the first process has failed; the message is its own.
    """
    made: Result | None = None
    with together():
        if is_main():
            made = work()
    return from_main(made)  # type: ignore[no-any-return]


def total(tensor: Tensor, *, largest: bool = False) -> Tensor:
    """The sum, or the largest, over all processes of a tensor that each of them passes; the same bits in each."""
    if not started():
        return tensor
    result = tensor.clone()
    with _meeting():
        distributed.all_reduce(result, distributed.ReduceOp.MAX if largest else distributed.ReduceOp.SUM)
    return result


def wait() -> None:
    """Return when every process has come this far."""
    if started():
        with _meeting():
            distributed.barrier()


def copy_from_main(directory: Path) -> None:
    """Give the other processes, which may be on other machines, the files that the first one has below a directory."""
    if not started():
        return
    files = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    for name in from_main(sorted(files)):
        content = from_main((directory / name).read_bytes() if is_main() else None)
        if not is_main():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)
