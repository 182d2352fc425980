"""What a compress job costs, stage by stage, beside the bare passes of the same model over the same samples."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from vitshrink.config.options import CompressConfig
from vitshrink.data import Batch, Preprocessor
from vitshrink.data.opening import open_data, read_calibration
from vitshrink.jobs.compress import compress
from vitshrink.models import cost
from vitshrink.models.loading import load_dense, quiet_transformers
from vitshrink.models.targets import blocks_of
from vitshrink.runtime.device import find_device
from vitshrink.runtime.observer import Job, Silent
from vitshrink.runtime.precision import Passes, passes_in
from vitshrink.statistics.calibration import to_device
from vitshrink.statistics.functionals import random_functional
from vitshrink.statistics.recomputing import batch_that_fits


@dataclass(frozen=True)
class Taken:
    """Seconds of something, by the clock on the wall and of the processor, all threads together."""

    wall: float
    processor: float
    peak: int = 0
    """Bytes of memory, at most; where a system cannot count anew, of all that came before as well."""


@contextmanager
def timed(keep: Callable[[Taken], None]) -> Iterator[None]:
    """``keep`` is told what the inside took."""
    started = time.perf_counter(), time.process_time()
    yield
    keep(Taken(time.perf_counter() - started[0], time.process_time() - started[1]))


def highest(device: torch.device) -> int:
    """The most bytes of memory since this was asked the last time."""
    found = cost.peak_memory_bytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # of Linux alone
            Path("/proc/self/clear_refs").write_text("5")
    return found


class Chronology(Silent):
    """Observes a job and keeps its stages in the order in which they ended."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stages: list[tuple[str, Taken]] = []
        self.between = 0
        """Bytes of memory outside of stages, at most."""

    @contextmanager
    def stage(self, title: str, _total: int | None = None) -> Iterator[Callable[[int], None]]:
        self.between = max(self.between, highest(self.device))
        with timed(lambda taken: self.stages.append((title, replace(taken, peak=highest(self.device))))):
            yield lambda _steps: None

    def peak(self) -> int:
        """Of the whole job so far."""
        self.between = max(self.between, highest(self.device))
        return max(self.between, *(taken.peak for _, taken in self.stages))


@dataclass(frozen=True)
class Passed:
    """What passes over the samples of a job take without it, and the model itself."""

    forward: Taken
    both: Taken
    exact: Taken
    """Forward and backward, in float32."""
    model_bytes: int
    """Of its weights in float32."""
    peak: int
    """Bytes of memory, at most."""


@dataclass(frozen=True)
class Ran:
    """What a job took."""

    stages: Sequence[tuple[str, Taken]]
    between: Taken
    """What is in no stage."""
    whole: Taken

    @property
    def peak(self) -> int:
        """Bytes of memory, at most."""
        return self.whole.peak


def pass_over(config: CompressConfig) -> Passed:
    """The bare passes of the model of a job over its calibration samples."""
    data = config.calibration_data
    assert data is not None
    device = find_device(config.device)
    source = load_dense(config.model, offline=config.offline)
    source.model.to(device)
    preprocessor = Preprocessor.from_checkpoint(source.directory, source.family.modality, offline=config.offline)
    samples = open_data(data, source, offline=config.offline)
    size = config.batch_size or batch_that_fits(source.model)
    batches = read_calibration(
        samples, preprocessor, Job(Silent()), samples=config.samples, seed=config.seed, batch_size=size
    ).batches
    forward, both = bare_passes(source.model, batches, passes_in(device, config.precision))
    _, exact = bare_passes(source.model, batches, nullcontext)
    return Passed(forward, both, exact, 4 * cost.parameters(source.model), cost.peak_memory_bytes(device))


def run(config: CompressConfig) -> Ran:
    """``vitshrink compress``, timed."""
    job, taken = Chronology(find_device(config.device)), list[Taken]()
    with timed(taken.append):
        compress(config, job)
    whole = replace(taken[0], peak=job.peak())
    walls, processors = zip(*((each.wall, each.processor) for _, each in job.stages), strict=True)
    between = Taken(whole.wall - sum(walls), whole.processor - sum(processors), job.between)
    return Ran(job.stages, between, whole)


def bare_passes(model: PreTrainedModel, batches: Sequence[Batch], passes: Passes) -> tuple[Taken, Taken]:
    """What a forward pass over all batches, and of a forward and backward pass, take; nothing else is done."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    model.requires_grad_(False)

    def forward(batch: Batch) -> None:
        with torch.no_grad(), passes():
            model(**to_device(batch.inputs, device))

    def forward_and_backward(batch: Batch) -> None:
        with passes():
            outputs = model(**to_device(batch.inputs, device))
        torch.autograd.backward(random_functional(model, outputs, batch, generator)(outputs).sum())

    def start(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0].detach().requires_grad_(), *arguments[1:])

    handle = blocks_of(model)[0].register_forward_pre_hook(start)
    try:
        return _seconds(forward, batches), _seconds(forward_and_backward, batches)
    finally:
        handle.remove()


def _seconds(run: Callable[[Batch], None], batches: Sequence[Batch]) -> Taken:
    run(batches[0])  # to warm up
    _synchronize()
    found: list[Taken] = []
    with timed(found.append):
        for batch in batches:
            run(batch)
        _synchronize()
    return found[0]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


SHAPES = {
    "tiny": (192, 12, 3, 768),
    "s": (384, 12, 6, 1536),
    "b": (768, 12, 12, 3072),
    "l": (1024, 24, 16, 4096),
    "h": (1280, 32, 16, 5120),
}
"""Of ViTs: width, blocks, heads and neurons. A head has 64 dimensions, in H 80."""


def random_vit(blocks: int | None = None, shape: str = "b") -> ViTForImageClassification:
    """Random weights in the shapes of a ViT with patches of 16 at 224 pixels; all its blocks, or so many."""
    torch.manual_seed(0)
    width, depth, heads, neurons = SHAPES[shape]
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=blocks or depth,
        num_attention_heads=heads,
        intermediate_size=neurons,
        num_labels=1000,
    )
    return ViTForImageClassification(config).eval()


def write_random_vit(directory: Path, blocks: int | None, shape: str = "b") -> Path:
    processor = ViTImageProcessorPil(do_resize=True, size={"height": 224, "width": 224})
    with quiet_transformers():
        random_vit(blocks, shape).save_pretrained(directory)
        processor.save_pretrained(directory)
    return directory


def write_images(directory: Path, count: int) -> Path:
    """Smooth random images: what is on them does not matter for time."""
    directory.mkdir()
    generator = np.random.default_rng(0)
    for index in range(count):
        coarse = generator.integers(0, 256, size=(14, 14, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC).save(directory / f"{index:04d}.jpg")
    return directory
