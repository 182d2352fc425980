"""What takes how long on this machine: programs timed in a runtime, once, and kept in the cache."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink._version import __version__
from vitshrink.models import cost
from vitshrink.models.runtimes import Program, Runtime
from vitshrink.runtime import processes
from vitshrink.runtime.cache import Cache
from vitshrink.runtime.modes import threads

CPU = torch.device("cpu")

REPEATS = 15
"""Passes of each program; the shortest tells, since whatever else runs on the machine only adds to it."""


@dataclass(frozen=True)
class Price:
    """The time of one program, as it is kept."""

    nanoseconds: int


@dataclass(frozen=True, eq=False)
class Run:
    """A program, and what it is timed on."""

    program: Program
    inputs: Mapping[str, Tensor]


Stopwatch = Callable[[Mapping[str, nn.Module], Mapping[str, Mapping[str, Tensor]]], dict[str, int]]
"""From models and their inputs, by name, to nanoseconds."""


def shortest(models: Mapping[str, nn.Module], inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, int]:
    """The shortest of some passes of each, the models in turn.

    With one thread it is the time of the processor that counts: what a pass takes where nothing else runs.
    """
    on_cpu = all(each.device.type == "cpu" for model in models.values() for each in model.parameters())
    clock = time.process_time if on_cpu and torch.get_num_threads() == 1 else time.perf_counter
    seconds = cost.passes(models, inputs, repeats=REPEATS, clock=clock)
    return {name: max(1, int(1e9 * min(each))) for name, each in seconds.items()}


@dataclass(frozen=True, eq=False)
class Clock:
    """A runtime, and how it is run.

    Attributes:
        batch_size: of what is timed.
        threads: on the CPU; None for those of PyTorch.
        cache: where times are kept.
        device: where PyTorch runs; all else runs on the CPU.
    """

    runtime: Runtime
    batch_size: int
    threads: int | None = None
    cache: Cache | None = None
    device: torch.device = CPU
    stopwatch: Stopwatch = field(default_factory=lambda: shortest)

    def times(
        self, what: Mapping[str, Any], names: Sequence[str], runs: Callable[[], Mapping[str, Run]]
    ) -> dict[str, int]:
        """Nanoseconds by name of the ``runs``, which are made only where ``what`` they are is not in the cache."""
        return processes.by_main(lambda: self._times({"what": dict(what), "layers": list(names)}, runs))

    def ready(self, model: PreTrainedModel) -> nn.Module:
        """A whole model in the runtime."""
        with threads(self.threads):
            return self.runtime.compile(Program.of(model))

    def compared(self, ready: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]) -> dict[str, int]:
        """Nanoseconds of models in the runtime, timed in turn; never from the cache."""
        with threads(self.threads):
            return processes.by_main(lambda: self.stopwatch(ready, dict.fromkeys(ready, inputs)))

    @property
    def counted(self) -> int:
        """Threads that are taken."""
        return self.threads or torch.get_num_threads()

    @property
    def described(self) -> str:
        """Where and how it is timed, as an error says it."""
        number = self.counted
        return f"in {self.runtime.described}, batch of {self.batch_size}, {number} thread{'s' if number > 1 else ''}"

    def _times(self, what: Mapping[str, Any], runs: Callable[[], Mapping[str, Run]]) -> dict[str, int]:
        with threads(self.threads):
            key = {**what, "how": self.described, "machine": machine(self.device), "vitshrink": __version__}
            kept = None if self.cache is None else self.cache.read(Price, key)
            if kept is not None:
                return {name: each.nanoseconds for name, each in kept.items()}
            made = runs()
            programs = {id(run.program): run.program for run in made.values()}
            compiled = {number: self.runtime.compile(program) for number, program in programs.items()}
            models = {name: compiled[id(run.program)] for name, run in made.items()}
            found = self.stopwatch(models, {name: run.inputs for name, run in made.items()})
            if self.cache is not None:
                self.cache.write(key, {name: Price(each) for name, each in found.items()})
        return found


def machine(device: torch.device) -> str:
    """The processor, or GPU, as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    description = Path("/proc/cpuinfo")
    lines = description.read_text(encoding="utf-8").splitlines() if description.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
