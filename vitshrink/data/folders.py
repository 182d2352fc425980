"""Folders of images: one folder a class, a flat folder, or either below a folder for each split."""

import mimetypes
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vitshrink.config.names import shown
from vitshrink.data.columns import Columns, class_names, typed_labels
from vitshrink.data.ground_truth import read_ground_truth
from vitshrink.data.image_metadata import METADATA_NAMES, read_metadata
from vitshrink.data.images import IMAGE_SUFFIXES
from vitshrink.data.recipes import suggestion
from vitshrink.data.samples import Label, LabelsAre, Sample, SampleSet
from vitshrink.data.tables import is_table
from vitshrink.errors import DataError, UsageError
from vitshrink.runtime.trees import is_folder, walk

_SPLIT_NAMES = (("train", "training"), ("val", "valid", "validation", "dev"), ("test", "testing"))
_PLAIN_NAMES = frozenset(("image", "images", "img", "imgs", "jpegimages", "photos", "pictures"))
"""The only folder with images, if it is called so, says where they are and not what they show."""

_SERVICE_NAMES = frozenset(
    (
        *("__macosx", "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "$recycle.bin"),
        *("system volume information", "lost+found", "__pycache__"),
    )
)
"""Folders, in lower case, that archives, file servers and operating systems leave behind."""


@dataclass
class Passed:
    """What was not read: images by the name of their hidden or service folder, hidden ones, other formats, links."""

    folders: Counter[str] = field(default_factory=Counter)
    files: list[str] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    """Images of kinds that are not read, by their suffix."""
    links: list[Path] = field(default_factory=list)
    """Those that lead to a folder which is read already, or which holds the one that is read."""

    def notes(self, source: str) -> tuple[str, ...]:
        notes = []
        if images := self.folders.total():
            folders = ", ".join(sorted(self.folders))
            notes.append(f"{source}: {images} images in hidden or service folders were left out ({folders}).")
        if self.files:
            notes.append(f"{source}: {len(self.files)} hidden files were left out ({_some(sorted(self.files))}).")
        if self.formats:
            suffixes = ", ".join(sorted(self.formats))
            notes.append(
                f"{source}: {self.formats.total()} images of other kinds were left out ({suffixes}): convert them."
            )
        if self.links:
            links = _some([str(link) for link in sorted(self.links)])
            notes.append(f"{source}: links to folders that are also read elsewhere were skipped ({links}).")
        return tuple(notes)


def split_folder(folder: Path, split: str | None) -> Path:
    """The folder of a split, or the folder itself where it is not divided into splits.

    Raises:
        DataError: the split is missing, or several are there and none was asked for.
    """
    folder = _inner(folder)
    names = {entry.name.casefold(): entry.name for entry in _visible(folder) if entry.is_dir()}
    if split is not None:
        wanted: tuple[str, ...] = next((group for group in _SPLIT_NAMES if split.casefold() in group), ())
        found = next((names[name] for name in (split.casefold(), *wanted) if name in names), None)
        if found is not None:
            return _inner(folder / found)
        raise DataError(f"{folder} has no folder for the split {split!r}.{suggestion(split, list(names.values()))}")
    known = {name for group in _SPLIT_NAMES for name in group}
    if not known & names.keys() or _holds_directly(folder):
        return folder
    holding = {name: real for name, real in names.items() if holds_images(folder / real)}
    if not holding or not holding.keys() <= known:  # one of the classes may well be called "test"
        return folder
    splits = list(holding.values())
    if len(splits) > 1:
        raise DataError(f"{folder} has the splits {', '.join(splits)}: choose one, such as {folder}:{splits[-1]}.")
    return _inner(folder / splits[0])


def holds_images(folder: Path) -> bool:
    """Whether there is an image anywhere below ``folder``."""
    return any(names for _, names in _walk(folder, Passed()))


def open_image_folder(
    root: Path, source: str, split: str | None, wanted: Columns, labels: Path | None = None
) -> SampleSet:
    """Images in the order of their paths; the label is the name of the folder directly below that of the split.

    Where ``metadata.csv``, ``.jsonl`` or ``.parquet`` (``file_name,label``) lies in a folder, its labels go before the
    names of folders. ``labels`` gives the classes of a flat folder instead: see ``read_ground_truth``. Hidden and
    service folders are left out at every depth; a linked folder is followed, and no folder is read twice.

    Raises:
        DataError: no images, images both beside and inside class folders, or ``labels`` that do not fit them.
        UsageError: ``labels`` for class folders, or columns without metadata.
    """
    folder, passed = split_folder(root, split), Passed()
    found = dict(sorted(_walk(folder, passed), key=lambda entry: entry[0].parts))
    files = [directory / name for directory, names in found.items() for name in names]
    if not files:
        raise DataError(f"{folder} contains no images ({' '.join(sorted(IMAGE_SUFFIXES))}).")
    samples = [Sample(shown(file.relative_to(folder)), image=file) for file in files]
    plain = SampleSet(source, "image", samples, notes=passed.notes(source))
    metadata = read_metadata(_metadata_files(root, folder, found), wanted)
    plain.notes += metadata.notes(source, folder, set(files))
    if metadata.labeled and labels is None:
        blank = (None,) * len(metadata.several) or None
        labels_of = [metadata.labels.get(file, blank) for file in files]
        values, labels_are = typed_labels(metadata.name, labels_of, metadata.several)
        return _labeled(plain, values, labels_are, list(metadata.several) or class_names(values, labels_are))
    for flag, column in (("image-column", wanted.image), ("label-column", wanted.label)):
        if column is not None and not metadata.name:
            raise UsageError(f"{wanted.flags}{flag} {column}: {folder} is a folder of images, which has no columns.")
    flat = found.get(folder, [])
    if flat and len(flat) < len(files):
        below = next(file for file in files if file.parent != folder).relative_to(folder).parts[0]
        raise DataError(
            f"{folder} contains images ({flat[0]} …) beside folders of images ({below} …): move one of them "
            "away, so that it is clear which images have a class."
        )
    if flat and labels is None:
        return replace(plain, unlabeled=metadata.unlabeled or _tables_beside(root, folder, wanted.flags))
    if flat and labels is not None:
        names = read_ground_truth(labels, flat)
        return _labeled(plain, names, "names", sorted(set(names)))
    if labels is not None:
        raise UsageError(f"{folder} has class folders: a file of labels ({labels}) is for a flat folder.")
    classes = [entry.name for entry in _visible(folder) if entry.is_dir()]
    return _labeled(plain, [file.relative_to(folder).parts[0] for file in files], "names", classes)


def _labeled(
    samples: SampleSet, labels: Sequence[Label], labels_are: LabelsAre | None, names: list[str] | None
) -> SampleSet:
    rows = [replace(sample, label=label) for sample, label in zip(samples.samples, labels, strict=True)]
    return replace(samples, samples=rows, label_names=names, labels_are=labels_are)


def _metadata_files(root: Path, folder: Path, found: Iterable[Path]) -> list[Path]:
    """One for each folder from ``root`` to the images, those that lie deeper last."""
    parts = folder.relative_to(root).parts
    above = [root.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
    candidates = ([directory / name for name in METADATA_NAMES] for directory in dict.fromkeys([*above, *found]))
    return [file for names in candidates if (file := next(filter(Path.is_file, names), None)) is not None]


def _tables_beside(root: Path, folder: Path, flags: str) -> str | None:
    """A hint that there may be labels."""
    tables = [
        file.name
        for directory in dict.fromkeys((root, folder))
        for file in _visible(directory)
        if file.is_file() and is_table(file) and not file.stem.casefold().startswith(("readme", "license"))
    ]
    if not tables:
        return None
    return f"{folder} has no class folders. If {_some(tables)} contains labels, pass it with {flags}labels."


def _inner(folder: Path) -> Path:
    """The folder ``images`` in it where no other holds any."""
    folders = [entry for entry in _visible(folder) if entry.is_dir()]
    plain = [entry for entry in folders if entry.name.casefold() in _PLAIN_NAMES]
    if len(plain) != 1 or _holds_directly(folder) or any(holds_images(e) for e in folders if e != plain[0]):
        return folder
    return plain[0]


def _holds_directly(folder: Path) -> bool:
    return any(_is_image(entry.name) and entry.is_file() for entry in _visible(folder))


def _visible(folder: Path) -> list[Path]:
    """Entries in the order of their names, without hidden and service files."""
    try:
        return sorted(
            (entry for entry in folder.iterdir() if not _is_service(entry.name)), key=lambda entry: entry.name
        )
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror or error}).") from error


def _walk(root: Path, passed: Passed) -> Iterator[tuple[Path, list[str]]]:
    """Every folder that holds images, with their names in order; linked folders last, and none twice."""
    try:
        for folder, entries in walk(root, lambda name: not _is_service(name), passed.links.append):
            images = list(_images(entries, passed))
            if images:
                yield folder, images
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror or error}).") from error


def _images(entries: Iterable[os.DirEntry[str]], passed: Passed) -> Iterator[str]:
    """The names of the images of a folder; what else there is of images is noted in ``passed``."""
    for entry in entries:
        if is_folder(entry):
            if images_inside := _count(entry.path):
                passed.folders[entry.name] += images_inside
        elif _is_image(entry.name):
            if _is_service(entry.name):
                passed.files.append(entry.name)
            else:
                yield entry.name
        elif (mimetypes.guess_type(entry.name)[0] or "").startswith("image/"):
            passed.formats[os.path.splitext(entry.name)[1].lower()] += 1


def _count(folder: str) -> int:
    return sum(map(_is_image, (name for _, _, names in os.walk(folder) for name in names)))


def is_hidden(path: Path) -> bool:
    """Whether a file or one of its folders is hidden, or is left over from an archive or a file server."""
    return any(map(_is_service, path.parts))


def _is_service(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _SERVICE_NAMES


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (" …" if len(names) > limit else "")
