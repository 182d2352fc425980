"""Data sets read by the `datasets` library: from the Hub, or local parquet and webdataset shards.

Images stay encoded (``decode=False``), so that one broken image can be counted and named instead of ending the reading.
The library is imported where it is used: it takes a second that a folder of images need not pay.
"""

import errno
import hashlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, overload

from vitshrink.data.columns import LABEL_COLUMNS, Columns, class_names, find_columns, typed_labels
from vitshrink.data.hub_samples import (
    PARALLEL_READS,
    arranged_samples,
    stored_samples,
    streamed_samples,
    undecoded,
    with_bytes,
)
from vitshrink.data.layouts import LAYOUTS
from vitshrink.data.recipes import Kind, recipe_names, suggestion
from vitshrink.data.samples import LabelsAre, Sample, SampleSet
from vitshrink.errors import DataError, explanation

SHUFFLE_BUFFER = 1000
"""Streamed rows from which the next is drawn, besides a shuffled order of the shards: about 110 MB of ImageNet."""


SHARD_FORMATS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}

_NO_ROOM = (errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.EROFS)
"""Never met by those who read."""

_LABEL_TYPES: dict[str, LabelsAre] = {
    "bool": "integers",
    "int": "integers",
    "uint": "integers",
    "float": "scores",
    "double": "scores",
    "string": "names",
    "large_string": "names",
}


@dataclass(frozen=True)
class Address:
    """A split of a data set: ``path`` is an id on the Hub, a local folder, or one local shard."""

    path: str
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        """As a user would write it."""
        split = f":{self.split}" if self.split and not Path(self.path).is_file() else ""
        return self.path + (f"/{self.config}" if self.config else "") + split


def open_shards(address: Address, kind: Kind, wanted: Columns) -> SampleSet:
    """All samples of a local split; `datasets` keeps an Arrow copy in its cache, from which any row can be read.

    Raises:
        DataError: unreadable shards, no such split, or columns that cannot be told.
    """
    with _explained(address):
        split = _Split(address)
        dataset = split.download()
    return _sample_set(split.address, kind, wanted, dataset)


def open_hub(address: Address, kind: Kind, wanted: Columns, *, offline: bool = False) -> SampleSet:
    """Samples of a split on the Hub: streamed where some are selected, downloaded once where all are used.

    ``offline`` (or ``HF_HUB_OFFLINE=1``) takes what an earlier download left in the cache.

    Raises:
        DataError: gated, unknown or unreachable; no such configuration, split or column.
    """
    import huggingface_hub

    if offline or huggingface_hub.constants.HF_HUB_OFFLINE:
        return _sample_set(address, kind, wanted, _downloaded_before(address))
    with _explained(address):
        split = _Split(address)
        features = split.stream.features
    columns, label_names, labels_are = _schema(split.address, kind, features, wanted)
    samples = _HubSamples(split, columns)
    return SampleSet(str(split.address), kind, samples, label_names, labels_are, unlabeled=columns.unlabeled)


def holds_saved(folder: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("state.json", "dataset_info.json")
    )


def open_saved(address: Address, kind: Kind, wanted: Columns) -> SampleSet:
    """Samples of a folder that ``save_to_disk`` wrote, read where they lie.

    Raises:
        DataError: unreadable, no such split, or columns that cannot be told.
    """
    from datasets import DatasetDict, load_from_disk

    with _explained(address):
        found = load_from_disk(address.path)
        if isinstance(found, DatasetDict):
            address = _with_split(address, list(found))
            found = found[address.split]
        elif address.split is not None:
            raise DataError(f"{address.path} is one data set without splits: remove the split {address.split!r}.")
    return _sample_set(address, kind, wanted, undecoded(found))


def open_dataset(dataset: Any, kind: Kind, wanted: Columns) -> SampleSet:
    """Samples of a ``datasets.Dataset`` in memory, without labels. Raises DataError for columns that cannot be told."""
    labels = {name for names in LABEL_COLUMNS for name in names} - {wanted.image, wanted.text, wanted.text_pair}
    dataset = dataset.with_format(None).remove_columns([name for name in dataset.column_names if name in labels])
    return _sample_set(Address("the data set in memory"), kind, wanted, undecoded(dataset))


def _sample_set(address: Address, kind: Kind, wanted: Columns, dataset: Any) -> SampleSet:
    columns, label_names, labels_are = _schema(address, kind, dataset.features, wanted)
    if columns.layout is not None:
        found = list(arranged_samples(dataset, columns, str(address)))
        return SampleSet(str(address), kind, found, None, labels_are, unlabeled=columns.unlabeled)
    samples = stored_samples(dataset, columns)
    if columns.labeled and (label_names is None or columns.several):  # known by value, as in tables
        where = f"{address}: {columns.place}"
        labels, labels_are = typed_labels(where, [sample.label for sample in samples], columns.several)
        samples = [replace(sample, label=label) for sample, label in zip(samples, labels, strict=True)]
        label_names = label_names or class_names(labels, labels_are)
    return SampleSet(str(address), kind, samples, label_names, labels_are, unlabeled=columns.unlabeled)


def _with_split(address: Address, splits: Sequence[str]) -> Address:
    """The address of one of these splits. Raises DataError where it is none, or several and none was asked for."""
    if address.split is None and len(splits) > 1:
        raise DataError(f"{address} has the splits {', '.join(splits)}: choose one, such as {address}:{splits[-1]}.")
    if address.split is not None and address.split not in splits:
        raise DataError(f"{address.path} has no split {address.split!r}.{suggestion(address.split, list(splits))}")
    return replace(address, split=address.split or splits[0])


class _Split:
    """One split, found but not read yet."""

    def __init__(self, address: Address) -> None:
        self.address = _with_split(address, list(map(str, _builder(address).config.data_files)))

    @cached_property
    def stream(self) -> Any:
        """An IterableDataset."""
        stream = _builder(self.address).as_streaming_dataset(split=self.address.split)
        # decode(), because cast_column() has no effect on the stream of a folder of images
        return (stream if stream.features is not None else stream._resolve_features()).decode(False)

    def download(self) -> Any:
        """A Dataset on disk.

        Only this split is fetched, where `datasets` would fetch all: beside the 6 GB of ImageNet's validation split lie
        140 GB of training. So the builder is told of no other, and works in a cache of its own.
        """
        split = self.address.split
        builder = _builder(self.address, cache=_split_cache(self.address))
        builder.config.data_files = {split: builder.config.data_files[split]}
        for total in ("splits", "download_size", "dataset_size", "size_in_bytes"):
            setattr(builder.info, total, None)
        builder.download_and_prepare(verification_mode="no_checks")
        return undecoded(builder.as_dataset(split=split))


def _builder(address: Address, cache: Path | None = None) -> Any:
    from datasets import load_dataset_builder

    path = Path(address.path)
    if path.is_file():
        return load_dataset_builder(SHARD_FORMATS[path.suffix.lower()], data_files=str(path.resolve()), cache_dir=cache)
    return load_dataset_builder(address.path, address.config, cache_dir=cache)


def _split_cache(address: Address) -> Path:
    from datasets.config import HF_DATASETS_CACHE

    return Path(HF_DATASETS_CACHE, "vitshrink", str(address.split), *_state(Path(address.path)))


def _state(path: Path) -> list[str]:
    """Of local shards: `datasets` knows them by path and time alone, and what replaces a file may keep its time."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    stats = [(str(file), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for file in files for s in (file.stat(),)]
    return [hashlib.sha256(repr(sorted(stats)).encode()).hexdigest()[:32]] if files else []


def _downloaded_before(address: Address) -> Any:
    """The Dataset that this module, or else anyone with `datasets.load_dataset`, has downloaded."""
    from datasets import load_dataset

    with _offline_mode():
        for cache in (_split_cache(address), None) if address.split else ():
            with suppress(Exception):  # whatever is wrong with one cache, the data are not to be had from it
                return undecoded(load_dataset(address.path, address.config, split=address.split, cache_dir=cache))
    hint = "" if address.split else f" Offline, name the split as well, as in {address}:train."
    raise DataError(
        f"{address} is not a local path, and the local cache does not contain it: pass a local folder or file, "
        f"or download it once with a network connection.{hint}{suggestion(address.path, recipe_names())}"
    )


class _HubSamples(Sequence[Sample]):
    """Samples of a Hub split: drawn from a stream, or all downloaded when the length or one by its index is needed."""

    def __init__(self, split: _Split, columns: Columns) -> None:
        self._split = split
        self._columns = columns

    @cached_property
    def _all(self) -> list[Sample]:
        with _explained(self._split.address):
            dataset = self._split.download()
            if self._columns.layout is not None:
                return list(arranged_samples(dataset, self._columns, str(self._split.address)))
            return stored_samples(dataset, self._columns)

    def __len__(self) -> int:
        return len(self._all)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        return self._all[index]

    def draw(self, count: int | None, seed: int, skip: int) -> list[Sample]:
        """``count`` samples (None: all) of the stream shuffled by ``seed``, after its first ``skip``, in memory."""
        shuffled = self._split.stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        with _explained(self._split.address), ThreadPoolExecutor(PARALLEL_READS) as pool:
            end = None if count is None else skip + count
            if self._columns.layout is not None:
                found = arranged_samples(shuffled, self._columns, str(self._split.address), "streamed row")
                return list(islice(found, skip, end))
            samples = list(islice(streamed_samples(shuffled, self._columns), skip, end))
            if self._columns.image is None:
                return samples
            return list(pool.map(with_bytes, samples))


def _schema(
    address: Address, kind: Kind, features: Mapping[str, Any], wanted: Columns
) -> tuple[Columns, list[str] | None, LabelsAre | None]:
    """The columns to use, the class names, and what the labels are as far as their type says."""
    from datasets import ClassLabel, Image, LargeList, List, Value

    if wanted.layout is not None:
        layout = LAYOUTS[wanted.layout]
        columns = layout.columns(str(address), list(features), wanted)
        return columns, None, layout.labels_are if columns.labeled else None
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    if kind == "image" and wanted.image is None and len(images) == 1:
        wanted = replace(wanted, image=images[0])
    columns = find_columns(str(address), kind, list(features), wanted)

    def dtype(column: str) -> str:
        return str(features[column].dtype) if isinstance(features[column], Value) else ""

    if columns.image is not None:
        image = features[columns.image]
        struct = isinstance(image, Mapping) and "bytes" in image
        if not (isinstance(image, Image) or struct or "binary" in dtype(columns.image)):
            raise DataError(f"{address}: column {columns.image!r} contains {image}, not images.")
    for text in filter(None, (columns.text, columns.text_pair)):
        if "string" not in dtype(text):
            raise DataError(f"{address}: column {text!r} contains {features[text]}, not text.")
    if columns.several:
        return columns, list(columns.several), "columns"
    if columns.label is None:
        return columns, None, None
    label = features[columns.label]
    if isinstance(label, ClassLabel):
        return columns, list(label.names), "names"
    if isinstance(label, List | LargeList):
        return columns, list(label.feature.names) if isinstance(label.feature, ClassLabel) else None, "lists"
    for prefix, labels_are in _LABEL_TYPES.items():
        if dtype(columns.label).startswith(prefix):
            return columns, None, labels_are
    raise DataError(f"{address}: column {columns.label!r} contains {label}, which is not one class or score per row.")


@contextmanager
def _offline_mode() -> Iterator[None]:
    """Both libraries read their environment variable at import only, so the flags themselves are set."""
    import datasets
    import huggingface_hub

    modules = (datasets.config, huggingface_hub.constants)
    before = [vars(module)["HF_HUB_OFFLINE"] for module in modules]
    for module in modules:
        vars(module)["HF_HUB_OFFLINE"] = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            vars(module)["HF_HUB_OFFLINE"] = value


@contextmanager
def _explained(address: Address) -> Iterator[None]:
    """Turns what goes wrong inside `datasets` into a DataError that says what to do; quiet where nobody watches."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # the library lets errors of HTTP, file systems, Arrow and its own pass through
        raise DataError(_explanation(address, error)) from error
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _explanation(address: Address, error: Exception) -> str:
    from datasets.exceptions import DatasetNotFoundError

    text = str(error) or type(error).__name__
    page = f"https://huggingface.co/datasets/{address.path}"
    cause: BaseException = error
    while cause.__cause__ is not None:  # what is outermost may say no more than that something went wrong
        cause = cause.__cause__
    if isinstance(cause, UnicodeEncodeError):
        return f"{address}: its path, or a name in it, is not UTF-8, and `datasets` cannot read that: rename it."
    if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
        from datasets.config import HF_DATASETS_CACHE

        return (
            f"{address}: {explanation(cause)}. `datasets` keeps a copy of the data in {HF_DATASETS_CACHE}: free "
            "space there, or set HF_HOME to a writable folder."
        )
    if Path(address.path).exists():
        return f"{address}: cannot be read ({str(cause) or text})."
    if re.search(r"\bgated\b", text.replace(address.path, "")):
        return (
            f"{address} is gated: accept the terms at {page} and log in with `hf auth login`, "
            "or pass a local folder or parquet file of the same data."
        )
    if isinstance(error, DatasetNotFoundError):
        return (
            f"there is no data set {address.path!r} on the Hub, or it is private (then log in with `hf auth "
            f"login`). It is not a local path or a recipe either.{suggestion(address.path, recipe_names())}"
        )
    if isinstance(error, ConnectionError):
        return (
            f"cannot reach the Hub for {address} ({text}), and there is no such local path: without a network, "
            f"pass a local folder or file.{suggestion(address.path, recipe_names())}"
        )
    return f"{address}: {text}"
