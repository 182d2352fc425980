"""Samples that are in memory already: images, texts, or batches that the caller preprocessed."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitshrink.data.batches import BadSamples, Batch
from vitshrink.data.columns import Columns
from vitshrink.data.hub import open_dataset
from vitshrink.data.recipes import Kind
from vitshrink.data.samples import Sample, SampleSet
from vitshrink.errors import DataError
from vitshrink.models.example import text_length
from vitshrink.models.geometry import image_shape

INPUTS: Mapping[Kind, tuple[str, ...]] = {
    "image": ("pixel_values",),
    "text": ("input_ids", "attention_mask", "token_type_ids"),
}
"""The inputs of a model by its kind, the one it cannot do without first."""


def samples_in_memory(calibration: Any, kind: Kind, most: int, wanted: Columns) -> SampleSet | None:
    """The samples of a collection of images or texts, in any of the forms that Python has for one; None for batches.

    ``most`` are read of what can only be gone through. ``wanted`` names the columns of a data set or table.

    Raises:
        DataError: no item, or one that is of another kind, by its place.
    """
    if (table := _table(calibration, kind)) is not None:
        return open_dataset(table, kind, wanted)
    items = _items(calibration, most)
    if items is None or (items and not _is_item(items[0], kind)):
        return None
    source = f"the {kind}s in memory"
    if not items:
        raise DataError(f"{source}: there are no samples.")
    read = _choices if wanted.layout == "multiple-choice" else partial(_sample, kind=kind)
    return SampleSet(source, kind, [read(index, item) for index, item in enumerate(items)])


def _table(calibration: Any, kind: Kind) -> Any:
    """A ``datasets.Dataset`` of samples, or one made of a table; None for anything else."""
    columns = getattr(calibration, "column_names", None) or list(_columns(calibration))
    if _is_a(calibration, "datasets", "DatasetDict"):
        raise DataError(f"calibration has the splits {', '.join(calibration)}: give one of them.")
    if _is_a(calibration, "datasets", "IterableDataset"):
        raise DataError(
            "calibration is a stream: pass rows of it, as in datasets.Dataset.from_list(list(rows.take(600)))."
        )
    if not columns or INPUTS[kind][0] in columns:
        return None
    from datasets import Dataset

    try:
        if _is_a(calibration, "datasets", "Dataset"):
            return calibration
        if _is_a(calibration, "pandas", "DataFrame"):
            return Dataset.from_pandas(calibration, preserve_index=False)
        return Dataset.from_list(list(calibration))
    except Exception as error:  # of any class, from the libraries below
        raise DataError(f"calibration: its columns cannot be read ({str(error).splitlines()[0]}).") from error


def _columns(calibration: Any) -> Iterable[str]:
    """The columns of a table of pandas, or of a list of rows by name."""
    if _is_a(calibration, "pandas", "DataFrame"):
        return map(str, calibration.columns)
    first = calibration[0] if isinstance(calibration, list | tuple) and calibration else None
    rows = isinstance(first, dict) and not any(isinstance(value, Tensor) for value in first.values())
    return map(str, first) if rows and first is not None else ()


def _items(calibration: Any, most: int) -> list[Any] | None:
    """The members of a collection, as far as they are needed; None where they are rows of tensors."""
    if isinstance(calibration, np.ndarray) and (calibration.dtype.kind not in "OUSu" or not calibration.ndim):
        raise DataError(
            f"calibration is an array of {calibration.dtype} with shape {calibration.shape}: pass images as "
            "uint8 (number, height, width, channels), texts, or the output of the processor with "
            'return_tensors="pt".'
        )
    if isinstance(calibration, list | tuple | np.ndarray) or _is_a(calibration, "pandas", "Series"):
        return list(calibration)
    if isinstance(calibration, set | frozenset):
        return sorted(calibration, key=str)  # its own order differs from run to run
    if isinstance(calibration, Mapping | Tensor) or not all(
        hasattr(calibration, n) for n in ("__getitem__", "__len__")
    ):
        return None
    return [calibration[index] for index in range(min(most, len(calibration)))]  # as the data sets of torchvision are


def listed(calibration: Any, kind: Kind, most: int) -> Any:
    """The first ``most`` samples that a generator yields; one of batches, and anything else, stays what it is."""
    if not isinstance(calibration, Iterator):
        return calibration
    first = list(islice(calibration, 1))
    if first and _is_item(first[0], kind):
        return [*first, *islice(calibration, most - 1)]
    return chain(first, calibration)


def _is_a(value: Any, module: str, name: str) -> bool:
    """Whether ``value`` is of this class, without importing where it would come from."""
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(value, cls)


def _is_item(item: Any, kind: Kind) -> bool:
    """Whether a member of a collection is a sample of some kind, rather than a batch."""
    if isinstance(item, tuple | list):
        return bool(item) and (isinstance(item[0], str) or (kind == "image" and _is_item(item[0], kind)))
    return not isinstance(item, Tensor | Mapping) and not hasattr(item, "keys")


def _choices(index: int, item: Any) -> Sample:
    """A text, and the texts one of which follows it."""
    key = f"item {index}"
    if isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[1], tuple | list):
        text, choices = item
        if isinstance(text, str) and all(isinstance(choice, str) for choice in choices):
            return Sample(key, text=text, choices=tuple(choices))
    raise DataError(
        f'{key} of the samples is not a text with choices; the model needs pairs such as ("so?", ["a", "b"]).'
    )


def _sample(index: int, item: Any, kind: Kind) -> Sample:
    key = f"item {index}"
    if kind == "image":
        image = item[0] if isinstance(item, tuple) and item else item  # (image, label), as data sets have it
        if isinstance(image, np.ndarray):
            image = _picture(image, key)
        if isinstance(image, str | Path) and Path(image).is_file():
            return Sample(str(image), image=Path(image))
        if isinstance(image, Image.Image):
            return Sample(key, image=image)
    if kind == "text" and isinstance(item, str):
        return Sample(key, text=str(item))
    if kind == "text" and isinstance(item, tuple | list) and len(item) == 2 and all(isinstance(t, str) for t in item):
        return Sample(key, text=item[0], text_pair=item[1])
    wanted = "a PIL image, an array of bytes or a path" if kind == "image" else "a text or a pair of texts"
    raise DataError(f"{key} of the samples is a {type(item).__name__}; the model needs {wanted}.")


def _picture(array: NDArray[Any], key: str) -> Image.Image:
    try:
        if array.dtype != np.uint8:
            raise TypeError(f"it holds {array.dtype}")
        return Image.fromarray(array.squeeze(2) if array.shape[2:] == (1,) else array)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{key} of the samples is an array of shape {array.shape}, which is not an image ({error}): pass "
            "uint8 (height, width) or (height, width, channels)."
        ) from error


class ReadyBatches:
    """Batches that the caller has preprocessed, in the place of an encoder.

    Args:
        batches: each a mapping (``pixel_values``, or ``input_ids`` and ``attention_mask``; labels are left out), a
            tensor of the model's first input, or a tuple that starts with one of these.
        most: samples that are read; a ``DataLoader`` may hold far more than calibration needs.
        processor: the tokenizer, which masked-token figures need.
        config: that of the model; without it the values are not looked at.

    Raises:
        DataError: no batch, or one without the model's inputs, with inputs that the model cannot take, or with
            different numbers of samples, by its number and row.
    """

    def __init__(
        self, batches: Iterable[Any], kind: Kind, most: int, processor: Any = None, config: Any = None
    ) -> None:
        self.kind: Kind = kind
        self.processor = processor
        self.description: dict[str, Any] = {"kind": kind, "processor": "none: batches were given"}
        self._rows: dict[str, tuple[int, int]] = {}
        self._batches: list[dict[str, Tensor]] = []
        for number, batch in enumerate(batches):
            inputs = _inputs(batch, kind, f"batch {number}")
            if config is not None:
                _check_values(inputs, config, f"batch {number}")
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
            f"{where} of the calibration has no tensor {main!r} (it has "
            f"{', '.join(map(str, batch)) or 'nothing'}): pass the output of the processor with "
            'return_tensors="pt".'
        )
    sizes = {name: len(tensor) for name, tensor in inputs.items()}
    dimensions = 4 if kind == "image" else 2
    if len(set(sizes.values())) > 1 or any(tensor.ndim != dimensions for tensor in inputs.values()):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
        raise DataError(f"{where} of the calibration has inputs that do not fit together: {shapes}.")
    if kind == "text" and "attention_mask" not in inputs:
        raise DataError(
            f"{where} of the calibration has no attention_mask, and without it padding counts as text: pass the "
            "output of the tokenizer."
        )
    return inputs


def _check_values(inputs: Mapping[str, Tensor], config: Any, where: str) -> None:
    """Raises DataError for what the model cannot take, which torch would meet without knowing whose it is."""
    if "pixel_values" in inputs:
        pixels, shape = inputs["pixel_values"], image_shape(config)
        if tuple(pixels.shape[1:]) != shape or not pixels.is_floating_point():
            raise DataError(
                f"{where} of the calibration contains images of {' × '.join(map(str, pixels.shape[1:]))} as "
                f"{pixels.dtype}, but the model takes {' × '.join(map(str, shape))} (channels × height × width), "
                "normalized: prepare them with its own image processor."
            )
        _check_rows(where, pixels.isfinite().flatten(1).all(1), "holds NaN or infinite pixels")
        return
    tokens = inputs["input_ids"]
    if tokens.is_floating_point() or tokens.shape[1] > (text_length(config) or tokens.shape[1]):
        raise DataError(
            f"{where} of the calibration contains {tokens.shape[1]} tokens per text, as {tokens.dtype}, but the "
            f"model takes at most {text_length(config)} integers: tokenize with truncation=True."
        )
    for name, size in (("input_ids", config.vocab_size), ("token_type_ids", getattr(config, "type_vocab_size", 0))):
        if size and name in inputs:  # a model without types of tokens passes over them
            known = (inputs[name] >= 0) & (inputs[name] < size)
            problem = f"has {name} that are not below {size}: tokenize with the model's own tokenizer"
            _check_rows(where, known.all(1), problem)
    _check_rows(where, inputs["attention_mask"].bool().any(1), "has no token that its attention_mask keeps")


def _check_rows(where: str, good: Tensor, problem: str) -> None:
    """Raises DataError for the first row that is not ``good``."""
    if not good.all():
        raise DataError(f"{where}, row {int(good.int().argmin())} of the calibration {problem}.")


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU, and what is not a token in float32, in which the model computes; made of nothing but itself."""
    own = tensor.clone() if tensor.is_inference() else tensor.detach()
    return own.cpu().float() if own.is_floating_point() else own.cpu()
