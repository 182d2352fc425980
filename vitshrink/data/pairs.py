"""Samples for dual encoders: images with captions, images with classes, or images and texts that are no pairs."""

from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

from vitshrink.config.data import DataConfig
from vitshrink.data.image_metadata import METADATA_NAMES
from vitshrink.data.labels import WORDNET_ID, imagenet_classes
from vitshrink.data.remote import local_path
from vitshrink.data.samples import Drawable, Sample, SampleSet
from vitshrink.data.sources import divide, open_samples
from vitshrink.data.tables import is_table
from vitshrink.errors import DataError, UsageError
from vitshrink.runtime.storage import below

CAPTIONS = ("caption", "captions", "text", "title", "prompt", "sentence")
"""What columns of captions are called; the first that there is counts."""

TEMPLATE = "a photo of a {}."
"""How a class becomes a text, where nobody says otherwise."""


def open_pairs(data: DataConfig, *, labeled: bool, offline: bool) -> SampleSet:
    """What ``data`` names: its images, with its ``texts``, its own captions, or else its classes where that will do.

    Images and texts that are no pairs are put side by side, the fewer of them again from the first on.

    Raises DataError where there are images and no texts.
    """
    if data.text_pair_column is not None:
        raise UsageError(f"{data.flags}text-pair-column: the model reads one text per image: remove it.")
    source = _with_metadata(data)
    images = open_samples(
        source,
        "image",
        split=data.split,
        image_column=data.image_column,
        label_column=data.label_column,
        labels=data.labels,
        flags=data.flags,
        offline=offline,
    )
    if data.texts is not None:
        texts = open_samples(data.texts, "text", offline=offline)
        return _side_by_side(_listed(images), _listed(texts))
    captions = _captions(data, source, offline=offline)
    if captions is not None:
        return _captioned(replace(_listed(images), unlabeled=None), _listed(captions))  # retrieval asks for no classes
    if labeled and images.label_names:
        prompts = prompts_of(images.label_names, data.templates or (TEMPLATE,))
        return replace(_listed(images), kind="image-text", apart=True, prompts=prompts)
    raise DataError(
        f"{images.source} has images without captions, and the model also needs texts: pass {texts_flag(data)} FILE "
        "with one text per line (they need not belong to the images), or a table with a column of images and a column "
        "of captions (file_name,caption)."
    )


def texts_flag(data: DataConfig) -> str:
    """What names texts that lie elsewhere."""
    return data.texts_flag or f"{data.flags}texts"


def prompts_of(names: list[str], templates: tuple[str, ...]) -> list[Sample]:
    """A text for each class and template; their keys begin with the number of the class."""
    return [
        Sample(f"{number}|{place}", text=template.replace("{}", _spoken(name)))
        for number, name in enumerate(names)
        for place, template in enumerate(templates)
    ]


def classes_of(samples: SampleSet) -> dict[str, int]:
    """The class of each image by its key, as ``prompts`` count them."""
    numbers = {name: number for number, name in enumerate(samples.label_names or [])}
    return {
        sample.key: sample.label if isinstance(sample.label, int) else numbers[str(sample.label)]
        for sample in samples.samples
        if sample.label is not None
    }


def _spoken(name: str) -> str:
    """A class as people call it: a WordNet id is looked up."""
    known = imagenet_classes().get(name, name) if WORDNET_ID.fullmatch(name) else name
    return known.partition(",")[0].replace("_", " ").strip()


def _with_metadata(data: DataConfig) -> str:
    """The table of a folder of images, which has the captions; what was named, where there is none."""
    folder = _folder(data.source)
    tables = [name for name in METADATA_NAMES if is_table(Path(name)) and (folder / name).is_file()]
    return below(data.source, tables[0]) if tables and data.texts is None else data.source


def _folder(source: str) -> Path:
    """Where it is on this machine; nowhere, if a split is named with it."""
    return Path(source) if divide(source, None)[1] is not None else local_path(source)


def _captions(data: DataConfig, source: str, *, offline: bool) -> SampleSet | None:
    """The texts beside the images of a source; None where it has none."""
    path = _folder(source)
    if path.is_dir() and data.text_column is None and not any(path.glob("**/*.parquet")):
        return None  # images alone
    for column in (data.text_column,) if data.text_column is not None else CAPTIONS:
        try:
            return open_samples(source, "text", split=data.split, text_column=column, flags=data.flags, offline=offline)
        except DataError:
            if data.text_column is not None:
                raise
    return None


def _listed(samples: SampleSet) -> SampleSet:
    if isinstance(samples.samples, Drawable):
        raise DataError(f"{samples.source} is a stream: for images with texts, pass files or a part of the stream.")
    return samples


def _captioned(images: SampleSet, captions: SampleSet) -> SampleSet:
    text_of = {sample.key: sample.text for sample in captions.samples}
    pairs = [replace(sample, text=text_of.get(sample.key)) for sample in images.samples]
    return replace(images, kind="image-text", samples=pairs, apart=True, captioned=True)


def _side_by_side(images: SampleSet, texts: SampleSet) -> SampleSet:
    count = max(len(images), len(texts))
    rows = zip(islice(cycle(images.samples), count), islice(cycle(texts.samples), count), strict=True)
    samples = [
        replace(image, key=image.key if number < len(images) else f"{image.key}, again {number}", text=text.text)
        for number, (image, text) in enumerate(rows)
    ]
    return replace(
        images,
        source=f"{images.source} with {texts.source}",
        kind="image-text",
        samples=samples,
        apart=True,
        notes=(*images.notes, *texts.notes),
    )
