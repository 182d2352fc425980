"""Samples that are in memory already: images, texts, or batches that the caller preprocessed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vitshrink.data.batches import BadSamples, Batch
from vitshrink.data.recipes import Kind
from vitshrink.data.samples import Sample, SampleSet
from vitshrink.errors import DataError

INPUTS: Mapping[Kind, tuple[str, ...]] = {
    "image": ("pixel_values",),
    "text": ("input_ids", "attention_mask", "token_type_ids"),
}
"""The inputs of a model by its kind, the one it cannot do without first."""


def samples_in_memory(items: Sequence[Any], kind: Kind) -> SampleSet:
    """Images (``PIL.Image``), or texts, or pairs of texts.

    Raises:
        DataError: no item, or one that is of another kind, by its place in the list.
    """
    source = f"the {kind}s in memory"
    if not len(items):
        raise DataError(f"{source}: there are none.")
    return SampleSet(source, kind, [_sample(index, item, kind) for index, item in enumerate(items)])


def _sample(index: int, item: Any, kind: Kind) -> Sample:
    key = f"item {index}"
    if kind == "image" and isinstance(item, Image.Image):
        return Sample(key, image=item)
    if kind == "text" and isinstance(item, str):
        return Sample(key, text=item)
    if kind == "text" and isinstance(item, tuple | list) and len(item) == 2 and all(isinstance(t, str) for t in item):
        return Sample(key, text=item[0], text_pair=item[1])
    wanted = "a PIL image" if kind == "image" else "a text or a pair of texts"
    raise DataError(f"{key} of the samples is a {type(item).__name__}; the model needs {wanted}.")


class ReadyBatches:
    """Batches that the caller has preprocessed, in the place of an encoder.

    Args:
        batches: each a mapping (``pixel_values``, or ``input_ids`` and ``attention_mask``; labels are left out), a
            tensor of the model's first input, or a tuple that starts with one of these.
        most: samples that are read; a ``DataLoader`` may hold far more than calibration needs.
        processor: the tokenizer, which masked-token figures need.

    Raises:
        DataError: no batch, or one without the model's inputs, or with different numbers of samples, by its number.
    """

    def __init__(self, batches: Iterable[Any], kind: Kind, most: int, processor: Any = None) -> None:
        self.kind: Kind = kind
        self.processor = processor
        self.description: dict[str, Any] = {"kind": kind, "processor": "none: batches were given"}
        self._rows: dict[str, tuple[int, int]] = {}
        self._batches: list[dict[str, Tensor]] = []
        for number, batch in enumerate(batches):
            inputs = _inputs(batch, kind, f"batch {number}")
            size = min(len(inputs[INPUTS[kind][0]]), most - len(self._rows))
            self._rows |= {f"batch {number}, row {row}": (number, row) for row in range(size)}
            self._batches.append({name: _plain(tensor) for name, tensor in inputs.items()})
            if len(self._rows) >= most:
                break
        if not self._rows:
            raise DataError("there is no batch to calibrate on.")

    def samples(self) -> SampleSet:
        """A sample for every row."""
        samples = [Sample(key, image=lambda key=key: self._content(key)) for key in self._rows]  # type: ignore[misc]
        return SampleSet("the batches in memory", self.kind, samples)

    def batches(self, samples: SampleSet, batch_size: int, _bad: BadSamples, _in_order: bool) -> Iterator[Batch]:
        """The rows of ``samples``; rows of one given batch stay together, at most ``batch_size`` of them."""
        chosen: dict[int, list[str]] = {}
        for sample in samples.samples:
            chosen.setdefault(self._rows[sample.key][0], []).append(sample.key)
        for number, keys in chosen.items():
            remaining = iter(keys)
            while part := list(islice(remaining, batch_size)):
                rows = torch.tensor([self._rows[key][1] for key in part])
                inputs = {name: tensor[rows] for name, tensor in self._batches[number].items()}
                mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
                yield Batch(inputs, mask, [None] * len(part), part)

    def _content(self, key: str) -> bytes:
        """What tells a sample from others; padding does not."""
        number, row = self._rows[key]
        inputs = {name: tensor[row] for name, tensor in self._batches[number].items()}
        mask = inputs.pop("attention_mask").bool() if "attention_mask" in inputs else None
        kept = (tensor if mask is None else tensor[mask] for tensor in inputs.values())
        return b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in kept)


def _inputs(batch: Any, kind: Kind, where: str) -> dict[str, Tensor]:
    main = INPUTS[kind][0]
    if isinstance(batch, tuple | list) and batch:
        batch = batch[0]  # (inputs, labels), as a TensorDataset or ImageFolder gives them
    if isinstance(batch, Tensor):
        batch = {main: batch}
    if not isinstance(batch, Mapping):  # BatchEncoding and BatchFeature are mappings
        batch = dict(batch) if hasattr(batch, "keys") else {}
    inputs = {name: batch[name] for name in INPUTS[kind] if batch.get(name) is not None}
    if main not in inputs or not all(isinstance(tensor, Tensor) for tensor in inputs.values()):
        raise DataError(
            f"{where} of the calibration has no tensor {main!r} (it has {', '.join(map(str, batch)) or 'nothing'}): "
            'give what the processor returns with return_tensors="pt".'
        )
    sizes = {name: len(tensor) for name, tensor in inputs.items()}
    dimensions = 4 if kind == "image" else 2
    if len(set(sizes.values())) > 1 or any(tensor.ndim != dimensions for tensor in inputs.values()):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
        raise DataError(f"{where} of the calibration has inputs that do not fit together: {shapes}.")
    if kind == "text" and "attention_mask" not in inputs:
        raise DataError(
            f"{where} of the calibration has no attention_mask: without it padding would count as text. "
            "Give what the tokenizer returns."
        )
    return inputs


def is_items(calibration: Sequence[Any]) -> bool:
    """Whether a list holds images or texts, rather than batches."""
    first = calibration[0] if len(calibration) else None
    pair = isinstance(first, tuple | list) and len(first) == 2 and all(isinstance(text, str) for text in first)
    return first is None or pair or isinstance(first, str | Image.Image)


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU, and what is not a token in float32, in which the model computes."""
    return tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.detach().cpu()
