"""Images to pixel tensors by the checkpoint's own image processor."""

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitshrink.data.batches import BadSamples, Batch, batched
from vitshrink.data.images import MODES, ImageError, decode_image
from vitshrink.data.recipes import Kind
from vitshrink.data.samples import Sample, SampleSet
from vitshrink.data.timm_transform import TimmTransform
from vitshrink.errors import CheckpointError, UsageError

PREFETCHED_BATCHES = 3
IMAGES_PER_JOB = 8
"""A call of an image processor costs about 0.3 ms beside the work on its images."""


@dataclass(frozen=True, eq=False)
class _Encoded:
    samples: list[Sample]
    pixels: Tensor
    failures: list[tuple[str, str]]


class ImageEncoder:
    """Decodes and preprocesses in threads, a few batches ahead of the model.

    Pillow and NumPy let go of the interpreter lock while they work.
    """

    kind: Kind = "image"

    def __init__(
        self,
        processor: Any,
        geometry: TimmTransform | None = None,
        shape: tuple[int, int, int] | None = None,
        name: str = "the image processor",
    ) -> None:
        """``geometry`` takes the place of the processor's resizing and cropping; ``shape`` is what the model takes.

        Raises:
            UsageError: images of so many channels cannot be read.
            CheckpointError: the processor, which messages call ``name``, makes images of another shape.
        """
        self.processor = processor
        self._geometry = geometry
        self._shape = shape
        self._name = name
        self._mode = "RGB" if shape is None else _mode(shape[0])
        self._levels = _levels(processor, self._mode)
        if shape is not None:
            self._check(shape)
        self.description = _describe(processor) | ({} if geometry is None else geometry.description)

    def batches(self, samples: SampleSet, batch_size: int, bad: BadSamples, workers: int | None) -> Iterator[Batch]:
        """Batches in the order of the samples; one with bad samples is smaller."""
        workers = _available_cores() if workers is None else workers
        if workers == 0:
            for members in batched(samples.samples, batch_size):
                yield from _joined([self._encode(members)], bad, samples)
            return
        waiting: deque[list[Future[_Encoded]]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="vitshrink-images")
        try:
            for members in batched(samples.samples, batch_size):
                waiting.append([pool.submit(self._encode, part) for part in batched(members, IMAGES_PER_JOB)])
                if len(waiting) > PREFETCHED_BATCHES:
                    yield from _joined([job.result() for job in waiting.popleft()], bad, samples)
            while waiting:
                yield from _joined([job.result() for job in waiting.popleft()], bad, samples)
        finally:
            pool.shutdown(cancel_futures=True)

    def _encode(self, samples: Sequence[Sample]) -> _Encoded:
        usable: list[Sample] = []
        images: list[Image.Image] = []
        failures: list[tuple[str, str]] = []
        for sample in samples:
            if sample.image is None:
                failures.append((sample.key, "has no image"))
                continue
            try:
                image = decode_image(sample.image, self._mode)
                images.append(image if self._geometry is None else self._geometry(image))
                usable.append(sample)
            except ImageError as error:
                failures.append((sample.key, str(error)))
        if not images:
            return _Encoded(usable, torch.empty(0), failures)
        try:
            pixels = self._pixels(images)
        except ValueError as error:
            self._name_misfit(usable, images)
            raise _processor_error(usable, error) from error
        if self._shape not in (None, pixels.shape[1:]):
            self._name_misfit(usable, images)
        return _Encoded(usable, pixels, failures)

    def _check(self, shape: tuple[int, int, int]) -> None:
        """An image of the model's own size has to keep it; others are looked at when they are read."""
        channels, height, width = shape
        blank = Image.new(self._mode, (width, height))
        try:
            found = self._pixels([blank if self._geometry is None else self._geometry(blank)]).shape[1:]
        except Exception as error:  # of any class: the settings may be anything
            raise CheckpointError(
                f"{self._name} cannot prepare an image with {channels} channels, which the model needs "
                f"({str(error).splitlines()[0]}): image_mean and image_std of preprocessor_config.json need one "
                "number per channel."
            ) from error
        if found != shape:
            raise CheckpointError(
                f"{self._name} makes images of {_by(found)}, but the model takes {_by(shape)} (channels × height "
                "× width): correct size and crop_size in preprocessor_config.json, or use the processor of this "
                "model."
            )

    def _name_misfit(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> None:
        """Raises CheckpointError for the first image that comes out with another shape than the model takes."""
        for sample, image in zip(samples, images, strict=True):
            found, shape = self._pixels([image]).shape[1:], self._shape
            if shape is not None and found != shape:
                raise CheckpointError(
                    f"{self._name} makes {_by(found)} of {sample.key}, but the model takes {_by(shape)} "
                    "(channels × height × width): set do_resize, and size as height and width, in "
                    "preprocessor_config.json, or pass images of this size."
                )

    def _pixels(self, images: list[Image.Image]) -> Tensor:
        done = {} if self._geometry is None else {"do_resize": False, "do_center_crop": False}
        if self._levels is None:
            return torch.as_tensor(self.processor(images, return_tensors="pt", **done)["pixel_values"])
        leveled = self.processor(images, do_rescale=False, do_normalize=False, return_tensors="np", **done)
        encoded = leveled["pixel_values"]
        return torch.from_numpy(_apply_levels(encoded, self._levels))


def _joined(parts: Sequence[_Encoded], bad: BadSamples, samples: SampleSet) -> Iterator[Batch]:
    """One batch of the parts, or none where no sample of theirs can be used."""
    for part in parts:
        for key, reason in part.failures:
            bad.add(key, reason, samples)
    usable = [sample for part in parts for sample in part.samples]
    if usable:
        try:
            pixels = torch.cat([part.pixels for part in parts if part.samples])
        except RuntimeError as error:
            raise _processor_error(usable, error) from error
        yield Batch({"pixel_values": pixels}, None, [s.label for s in usable], [s.key for s in usable])


def _mode(channels: int) -> str:
    if channels not in MODES:
        raise UsageError(
            f"the model takes images with {channels} channels, but image files are read with "
            f"{', '.join(map(str, MODES))}: pass ready batches to vitshrink.compress in Python, or choose a "
            "method that needs no data."
        )
    return MODES[channels]


def _by(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _processor_error(samples: Sequence[Sample], error: Exception) -> CheckpointError:
    return CheckpointError(
        "the image processor of the checkpoint cannot make one batch of "
        f"{', '.join(sample.key for sample in samples[:5])} ({str(error).splitlines()[0]}). For images of "
        "different sizes, set do_resize in preprocessor_config.json."
    )


def _levels(processor: Any, mode: str) -> NDArray[np.float32] | None:
    """What rescaling and normalizing make of each byte, (channels, 256); None where they do anything else.

    Looking the results up takes a quarter of the time of computing them in float64, and gives the same bits: that is
    tried here, on noise, so that a processor with steps of its own keeps its own output.
    """
    if getattr(processor, "backend", None) != "pil":
        return None
    channels = len(mode)  # a letter for each
    ramps = np.tile(np.arange(256, dtype=np.uint8), (channels, 1, 1))
    noises = np.random.default_rng(0).integers(0, 256, (channels, 300, 310), dtype=np.uint8)
    ramp, noise = (Image.merge(mode, [Image.fromarray(plane) for plane in planes]) for planes in (ramps, noises))
    try:
        alone = processor(ramp, do_resize=False, do_center_crop=False, return_tensors="np")
        levels: NDArray[np.float32] = alone["pixel_values"][0][:, 0, :]
        encoded = processor(noise, do_rescale=False, do_normalize=False, return_tensors="np")
        looked_up = _apply_levels(encoded["pixel_values"], levels)
        expected = processor(noise, return_tensors="np")["pixel_values"]
    except (TypeError, ValueError, IndexError):  # switches that this processor does not have
        return None
    return levels if looked_up.dtype == expected.dtype and np.array_equal(looked_up, expected) else None


def _apply_levels(encoded: NDArray[np.uint8], levels: NDArray[np.float32]) -> NDArray[np.float32]:
    """(batch, channels, height, width) bytes to their levels."""
    pixels = np.empty(encoded.shape, np.float32)
    for image, target in zip(encoded, pixels, strict=True):
        for channel, plane in enumerate(image):
            np.take(levels[channel], plane, out=target[channel], mode="clip")  # clip: without a check of bounds
    return pixels


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _describe(processor: Any) -> dict[str, Any]:
    """The effective preprocessing, in the words of preprocessor_config.json."""
    settings = json.loads(processor.to_json_string())  # plain values, as they are recorded
    switches = {"do_resize": ("size", "resample"), "do_center_crop": ("crop_size",), "do_rescale": ("rescale_factor",)}
    switches["do_normalize"] = ("image_mean", "image_std")
    described: dict[str, Any] = {
        "kind": "image",
        "processor": settings.get("image_processor_type", type(processor).__name__),
        "backend": getattr(processor, "backend", "unknown"),
    }
    for switch, names in switches.items():
        if settings.get(switch):
            described |= {name: settings[name] for name in names if settings.get(name) is not None}
    if "resample" in described:
        described["resample"] = Image.Resampling(int(described["resample"])).name.lower()
    return described
