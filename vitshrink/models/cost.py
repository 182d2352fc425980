"""What a model costs: numbers stored, bytes, multiplications, time and memory."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import psutil
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitshrink.errors import VitshrinkError
from vitshrink.models.structures.coded import Coded
from vitshrink.models.structures.quantized import QuantizedLinear
from vitshrink.runtime.modes import evaluating, frozen
from vitshrink.runtime.offloading import stopped
from vitshrink.runtime.records import IfSet


def parameters(model: nn.Module) -> int:
    """Number of parameters; tied ones count once, a byte of two 4-bit integers is two, and padding is none."""
    return sum(map(_numbers, model.parameters())) - _padding(model)


def _numbers(parameter: Tensor) -> int:
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def _padding(model: nn.Module) -> int:
    """Numbers that stand for no weight, less weights that are no numbers of their own."""
    padding = sum(module.padding for module in model.modules() if isinstance(module, QuantizedLinear))
    coded = [module for module in model.modules() if isinstance(module, Coded)]
    return padding - sum(math.prod(module.dense_shape) - module.weight.numel() for module in coded)


def layers_parameters(model: nn.Module, names: Iterable[str]) -> int:
    """Number of parameters of the named layers, biases left out: what a low-rank method can change."""
    layers = [model.get_submodule(name) for name in names]
    return sum(
        _numbers(parameter)
        for layer in layers
        for kind, parameter in layer.named_parameters()
        if kind.rpartition(".")[2] != "bias"
    ) - sum(map(_padding, layers))


def memory_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers in memory; tied ones count once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the tensors that a file of the model holds: its parameters, tied ones once, and persistent buffers."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = [tensor for name, tensor in model.state_dict().items() if name not in parameters]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *buffers))


def macs(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Multiply-accumulate operations of one forward pass of ``inputs``, attention included.

    Half of the floating-point operations that torch counts; normalizations, activations and additions are left out,
    as usual. Pass one sample for the MACs of a sample.
    """
    return int(_counted(model, inputs).get_total_flops()) // 2


def macs_of_modules(model: nn.Module, inputs: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, int]:
    """The part of ``macs`` that each of the named modules does."""
    counts = _counted(model, inputs).get_flop_counts()
    return {name: sum(counts[f"{type(model).__name__}.{name}"].values()) // 2 for name in names}


def _counted(model: nn.Module, inputs: Mapping[str, Tensor]) -> FlopCounterMode:
    # torch counts nothing for the fused attention of the CPU, so that the plain one is run; and under inference_mode
    # linear layers are not taken apart into the operations that it counts
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._int_mm: _product_flops})
    with frozen(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), stopped(), counter:
        model(**_on_device_of(model, inputs))
    return counter


def _product_flops(left: torch.Size, right: torch.Size, **_: Any) -> int:
    """Of a product (m, k) × (k, n) of integers, which torch does not count."""
    return 2 * left[0] * left[1] * right[1]


@final
@dataclass(frozen=True)
class Latency:
    """Time of a forward pass of one batch."""

    median: float
    """Seconds a batch: the median of ``repeats`` passes."""
    lower_quartile: float
    """Seconds a batch."""
    upper_quartile: float
    """Seconds a batch."""
    throughput: float
    """Samples per second, at the median."""
    batch_size: int
    """Samples per batch."""
    repeats: int
    """Number of timed passes."""
    threads: int
    """Threads on the CPU."""
    runtime: IfSet[str] = None
    """What ran it, its version and the type that it computed in; left out where that was PyTorch as it is."""

    def overlaps(self, other: "Latency") -> bool:
        """Whether the middle halves of the times of both have a time in common."""
        return max(self.lower_quartile, other.lower_quartile) <= min(self.upper_quartile, other.upper_quartile)


FEWEST = 5
"""Timed passes of a model, at least."""

ENOUGH = 10.0
"""Seconds that timed passes take together, about, once there are enough of them."""


def latency(
    models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], *, repeats: int = 20, warmup: int = 3
) -> dict[str, Latency]:
    """Time the models in turn, A B A B, so that a machine that warms up or slows down does so for all of them.

    Of large models fewer passes are timed, at least ``FEWEST``, once they have taken ``ENOUGH`` seconds.
    """
    seconds = passes(models, dict.fromkeys(models, inputs), repeats=repeats, warmup=warmup)
    batch_size = len(next(iter(inputs.values())))
    runtimes = {name: getattr(model, "runtime", None) for name, model in models.items()}
    return {name: _summary(times, batch_size, runtimes[name]) for name, times in seconds.items()}


Clock = Callable[[], float]
"""Seconds since whenever."""


def passes(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Mapping[str, Tensor]],
    *,
    repeats: int,
    warmup: int = 3,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each pass of each model, on inputs of its own, the models in turn."""
    if repeats < 1:
        raise ValueError("repeats must be at least 1")
    prepared = {name: _on_device_of(model, inputs[name]) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with evaluating(*models.values()), torch.inference_mode():
        for i in range(warmup + repeats):
            for name, model in models.items():
                elapsed = _time(model, prepared[name], clock)
                if i >= warmup:
                    seconds[name].append(elapsed)
            if i >= warmup + FEWEST - 1 and sum(map(sum, seconds.values())) > ENOUGH:
                break
    return seconds


def latency_by_batch_size(
    models: Mapping[str, nn.Module],
    inputs: Callable[[int], Mapping[str, Tensor]],
    batch_sizes: Iterable[int],
    *,
    repeats: int = 20,
) -> list[dict[str, Latency]]:
    """``latency`` for each of the batch sizes, ``inputs`` making a batch of a size.

    Raises VitshrinkError for a batch that does not fit into memory.
    """
    found = []
    for batch_size in batch_sizes:
        try:
            found.append(latency(models, inputs(batch_size), repeats=repeats))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise VitshrinkError(f"out of memory with a batch of {batch_size}: use a smaller --latency.") from error
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """On the CPU torch says so in a RuntimeError only."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """Largest memory so far: allocated on a GPU, or else resident in this process."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kibibytes


def _time(model: nn.Module, inputs: Mapping[str, Tensor], clock: Clock) -> float:
    device = next(model.parameters()).device
    _synchronize(device)
    start = clock()
    model(**inputs)
    _synchronize(device)
    return clock() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(seconds: list[float], batch_size: int, runtime: str | None) -> Latency:
    lower, median, upper = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return Latency(
        median=float(median),
        lower_quartile=float(lower),
        upper_quartile=float(upper),
        throughput=batch_size / float(median),
        batch_size=batch_size,
        repeats=len(seconds),
        threads=torch.get_num_threads(),
        runtime=runtime,
    )


def _on_device_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parameter = next(each for each in model.parameters() if each.is_floating_point())
    return {
        name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
