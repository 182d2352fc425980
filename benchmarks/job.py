"""What a compress job costs, stage by stage, beside the bare passes of the same model over the same samples."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tables import print_head, print_row
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
from vitshrink.statistics.curvature import random_functional

AROUND = ("Loading the model", "Reading calibration data", "Saving and verifying", "Evaluating", "Measuring cost")
"""Stages that read, write or measure; all others compress."""

END_OF_A_SIZE = "Saving and verifying"


class Chronology(Silent):
    """Observes a job and keeps its stages in the order in which they ended, with their seconds."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, float]] = []

    @contextmanager
    def stage(self, title: str, _total: int | None = None) -> Iterator[Callable[[int], None]]:
        started = time.perf_counter()
        yield lambda _steps: None
        self.stages.append((title, time.perf_counter() - started))

    def sizes(self) -> list[list[tuple[str, float]]]:
        """The stages of each size, and what comes after the last; what all sizes share belongs to the first."""
        found: list[list[tuple[str, float]]] = [[]]
        for title, seconds in self.stages:
            found[-1].append((title, seconds))
            if title == END_OF_A_SIZE:
                found.append([])
        return found


def print_job(config: CompressConfig) -> None:
    """Time the bare passes, then the job; one table of stages, one of memory."""
    data = config.calibration_data
    assert data is not None
    source = load_dense(config.model, offline=config.offline)
    source.model.to(find_device(config.device))
    preprocessor = Preprocessor.from_checkpoint(source.directory, source.family.modality, offline=config.offline)
    samples = open_data(data, source, offline=config.offline)
    batches = read_calibration(
        samples, preprocessor, Job(Silent()), samples=config.samples, seed=config.seed, batch_size=config.batch_size
    ).batches
    peaks = [cost.peak_memory_bytes()]
    exact = bare_passes(source.model, batches, nullcontext)
    own = bare_passes(source.model, batches, passes_in(find_device(config.device), config.precision))
    peaks.append(cost.peak_memory_bytes())
    del source, samples, batches
    job = Chronology()
    started = time.perf_counter()
    compress(config, job)
    wall = time.perf_counter() - started
    peaks.append(cost.peak_memory_bytes())

    print("Bare passes over the calibration samples (gradients of the activations alone, as the method needs them):\n")
    print_head(["passes", "forward, s", "forward and backward, s"])
    print_row(["float32", *(f"{seconds:.1f}" for seconds in exact)])
    print_row([f"--precision {config.precision}", *(f"{seconds:.1f}" for seconds in own)])
    print()
    print_head(["stage", "seconds", "over forward and backward", "over float32 ones"])

    def row(title: str, seconds: float) -> None:
        print_row([title, f"{seconds:.1f}", f"{seconds / own[1]:.2f}", f"{seconds / exact[1]:.2f}"])

    *sizes, reported = job.sizes()
    for keep, stages in zip(config.keep, sizes, strict=True):
        for title, seconds in stages:
            row(f"keep {keep:g}: {title}", seconds)
        row(f"**keep {keep:g}: compressing**", sum(seconds for title, seconds in stages if title not in AROUND))
    for title, seconds in reported:
        row(f"all sizes: {title}", seconds)
    row("whole job", wall)
    print("\nPeak memory of the process so far, MB:\n")
    print_head(["model and data read", "bare passes", "job"])
    print_row([f"{peak / 1e6:.0f}" for peak in peaks])


def bare_passes(model: PreTrainedModel, batches: Sequence[Batch], passes: Passes) -> tuple[float, float]:
    """Seconds of a forward pass over all batches, and of a forward and backward pass; nothing else is done."""
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


def _seconds(run: Callable[[Batch], None], batches: Sequence[Batch]) -> float:
    run(batches[0])  # to warm up
    _synchronize()
    started = time.perf_counter()
    for batch in batches:
        run(batch)
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_vit(blocks: int) -> ViTForImageClassification:
    """The shapes of ViT-B/16 at 224 pixels, with ``blocks`` blocks (the real one has 12)."""
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(num_hidden_layers=blocks, num_labels=1000)).eval()


def write_random_vit(directory: Path, blocks: int) -> Path:
    processor = ViTImageProcessorPil(do_resize=True, size={"height": 224, "width": 224})
    with quiet_transformers():
        random_vit(blocks).save_pretrained(directory)
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
