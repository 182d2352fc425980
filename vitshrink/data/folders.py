"""Folders of images: one folder a class, a flat folder, or either below a folder for each split."""

import os
from collections.abc import Iterator
from pathlib import Path

from vitshrink.data.ground_truth import read_ground_truth
from vitshrink.data.images import IMAGE_SUFFIXES
from vitshrink.data.recipes import suggestion
from vitshrink.data.samples import Sample, SampleSet
from vitshrink.errors import DataError, UsageError
from vitshrink.names import shown

_SPLIT_NAMES = (("train", "training"), ("val", "valid", "validation", "dev"), ("test", "testing"))


def split_folder(folder: Path, split: str | None) -> Path:
    """The folder of a split, or the folder itself where it is not divided into splits.

    Raises:
        DataError: the split is missing, or several are there and none was asked for.
    """
    names = [entry.name for entry in _visible(folder) if entry.is_dir()]
    if split is not None:
        wanted: tuple[str, ...] = next((group for group in _SPLIT_NAMES if split in group), ())
        found = next((name for name in (split, *wanted) if name in names), None)
        if found is not None:
            return folder / found
        raise DataError(f"{folder} has no folder for the split {split!r}.{suggestion(split, names)}")
    known = {name for group in _SPLIT_NAMES for name in group}
    if not names or not set(names) <= known:  # one of the classes may well be called "test"
        return folder
    if len(names) > 1:
        raise DataError(f"{folder} holds the splits {', '.join(names)}: choose one, such as {folder}:{names[-1]}.")
    return folder / names[0]


def holds_images(folder: Path) -> bool:
    """Whether there is an image anywhere below ``folder``."""
    return next(_images_below(folder), None) is not None


def open_image_folder(folder: Path, source: str, labels: Path | None = None) -> SampleSet:
    """Images in the order of their paths; the label is the name of the folder directly below ``folder``.

    ``labels`` gives the classes of a flat folder instead: see ``read_ground_truth``.

    Raises:
        DataError: no images, images both beside and inside class folders, or ``labels`` that do not fit them.
    """
    flat = [entry for entry in _visible(folder) if entry.is_file() and _is_image(entry)]
    classes = [entry for entry in _visible(folder) if entry.is_dir()]
    found = [(file, entry.name) for entry in classes for file in _images_below(entry)]
    if flat and found:
        raise DataError(
            f"{folder} holds images ({flat[0].name} …) beside folders of images ({found[0][1]} …): "
            "move one of them away, so that it is clear which images have a class."
        )
    if flat:
        return _flat_folder(source, flat, labels)
    if not found:
        raise DataError(f"{folder} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))}).")
    if labels is not None:
        raise UsageError(f"{folder} has class folders: a file of labels ({labels}) is for a flat folder.")
    samples = [Sample(shown(file.relative_to(folder)), image=file, label=name) for file, name in found]
    return SampleSet(source, "image", samples, [entry.name for entry in classes], "names")


def _flat_folder(source: str, files: list[Path], labels: Path | None) -> SampleSet:
    if labels is None:
        return SampleSet(source, "image", [Sample(shown(file.name), image=file) for file in files])
    names = read_ground_truth(labels, [file.name for file in files])
    samples = [Sample(shown(file.name), image=file, label=name) for file, name in zip(files, names, strict=True)]
    return SampleSet(source, "image", samples, sorted(set(names)), "names")


def _visible(folder: Path) -> list[Path]:
    """Entries in the order of their names, without hidden files and what archives of a Mac leave behind."""
    entries = (entry for entry in folder.iterdir() if not entry.name.startswith((".", "__MACOSX")))
    return sorted(entries, key=lambda entry: entry.name)


def _images_below(folder: Path) -> Iterator[Path]:
    for directory, below, names in os.walk(folder):
        below.sort()
        files = (Path(directory, name) for name in sorted(names) if not name.startswith("."))
        yield from filter(_is_image, files)


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES
