"""Samples of a data set that the `datasets` library reads: stored ones by number, streamed ones in their order."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import fsspec

from vitshrink.data.columns import Columns
from vitshrink.data.images import ImageSource, read_image_bytes
from vitshrink.data.layouts import LAYOUTS
from vitshrink.data.samples import Sample

PARALLEL_READS = 16
"""Images of a Hub repository that holds them as single files are fetched so many at a time."""


def stored_samples(dataset: Any, columns: Columns) -> list[Sample]:
    def column(name: str | None) -> list[Any]:
        return [None] * len(dataset) if name is None else list(dataset[name])

    images: list[ImageSource | None] = [None] * len(dataset)
    if columns.image is not None:
        encoded = dataset.select_columns([columns.image])
        images = [partial(_fetch, encoded, columns.image, row) for row in range(len(dataset))]
    labels = map(_hashable, columns.labels(column))
    queries = (None if query is None else str(query) for query in column(columns.query))
    rows = zip(images, column(columns.text), column(columns.text_pair), labels, queries, strict=True)
    samples = (
        Sample(f"row {number}", image, text, pair, label, query=query)
        for number, (image, text, pair, label, query) in enumerate(rows, start=1)
    )
    return [sample for sample in samples if not _is_spacing(sample, columns)]


def streamed_samples(stream: Any, columns: Columns) -> Iterator[Sample]:
    for number, row in enumerate(stream, start=1):
        image = None if columns.image is None else partial(_encoded, row[columns.image])
        text, pair = (None if name is None else row[name] for name in (columns.text, columns.text_pair))
        (label,) = columns.labels(lambda name, row=row: [None if name is None else row[name]])  # type: ignore[misc]
        sample = Sample(f"streamed row {number}", image, text, pair, _hashable(label))
        if not _is_spacing(sample, columns):
            yield sample


def arranged_samples(dataset: Any, columns: Columns, source: str, row: str = "row") -> Iterator[Sample]:
    """Of a layout, stored or streamed. Raises DataError, which names the row."""
    assert columns.layout is not None
    feature = None if columns.label is None else dataset.features[columns.label]
    names = getattr(getattr(feature, "feature", feature), "names", None)  # of a ClassLabel, or of a list of them
    return LAYOUTS[columns.layout].read(source, dataset, columns, names, row)


def _hashable(label: Any) -> Any:
    return tuple(label) if isinstance(label, list) else label


def with_bytes(sample: Sample) -> Sample:
    return sample if sample.image is None else replace(sample, image=read_image_bytes(sample.image))


def _is_spacing(sample: Sample, columns: Columns) -> bool:
    """Blank rows of running text (as in WikiText) separate paragraphs; with labels they would be broken samples."""
    return columns.text is not None and not columns.labeled and not (sample.text or "").strip()


def _fetch(dataset: Any, column: str, row: int) -> bytes:
    return _encoded(dataset[row][column])


def _encoded(value: Any) -> bytes:
    """The bytes of an undecoded image: in a struct, where its path leads (here or on the Hub), or as they are."""
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
    if content is None and path is not None:
        with fsspec.open(path, "rb") as file:
            content = file.read()
    return content or b""  # an empty image is counted and named where it is decoded


def undecoded(dataset: Any) -> Any:
    from datasets import Image

    for name, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    return dataset
