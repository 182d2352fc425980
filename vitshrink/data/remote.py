"""Data by URL: what tells of samples is copied here when it is opened, and an image when it is read."""

import hashlib
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from vitshrink.data.images import IMAGE_SUFFIXES
from vitshrink.data.samples import Sample, SampleSet
from vitshrink.errors import DataError, OutputError, VitshrinkError
from vitshrink.runtime.storage import Place, is_url, scratch


@dataclass(frozen=True)
class RemoteImage:
    """An image at a URL. Two are equal if they are the same file."""

    place: Place
    name: str
    """Below the place."""
    here: Path
    """Where its copy lies, once it was read."""

    def __call__(self) -> bytes:
        """Its bytes. Raises FileNotFoundError where it is gone, DataError where the store cannot be reached."""
        if not self.here.is_file() or not self.here.stat().st_size:
            try:
                there = self.place.fetch(self.name, self.here)
            except OutputError as error:
                raise DataError(str(error)) from error
            if not there:
                raise FileNotFoundError(2, "no such file", f"{self.place}/{self.name}")
        return self.here.read_bytes()


@dataclass(frozen=True)
class Copy:
    """What lies at a URL, as a path of this machine."""

    url: str
    path: Path
    """A file, or a folder whose images are empty."""
    place: Place
    """The folder that the file lies in, or the folder itself."""
    root: Path
    """Where that is here."""

    def of(self, samples: SampleSet) -> SampleSet:
        """Samples that were opened here: they read their images there, and name the URL."""
        if not isinstance(samples.samples, list):  # streams and tables of their own hold no path
            return self._named(samples)
        return self._named(replace(samples, samples=[self._there(sample) for sample in samples.samples]))

    def _there(self, sample: Sample) -> Sample:
        if not isinstance(sample.image, Path) or not sample.image.is_relative_to(self.root):
            return sample
        name = posixpath.normpath(sample.image.relative_to(self.root).as_posix())
        return replace(sample, image=RemoteImage(self.place, name, self.root / name))

    def _named(self, samples: SampleSet) -> SampleSet:
        unlabeled = None if samples.unlabeled is None else self.named(samples.unlabeled)
        return replace(samples, notes=tuple(map(self.named, samples.notes)), unlabeled=unlabeled)

    def named(self, text: str) -> str:
        """A message about what lies here, as one about what lies there."""
        return text.replace(str(self.root), self.place.url)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Have errors name the URL."""
        try:
            yield
        except VitshrinkError as error:
            raise type(error)(self.named(str(error))) from error


@cache
def copy_of(url: str) -> Copy:
    """What lies at the URL of a file or a folder, copied for as long as this process lives; hidden files are not.

    Raises:
        DataError: there is nothing, or it cannot be reached.
        UsageError, DependencyError: a URL of no known kind, or of one that needs a package.
    """
    place = Place.of(url)
    here = scratch("data") / hashlib.sha256(url.encode()).hexdigest()[:16]
    try:
        if place.is_file():
            folder, name = place.parent(), posixpath.basename(place.path)
            folder.fetch(name, here / name)
            return Copy(url, here / name, folder, here)
        names = place.names() if place.exists() else {}
        for name in names:
            if posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                (here / name).parent.mkdir(parents=True, exist_ok=True)
                (here / name).touch()
            else:
                place.fetch(name, here / name)
    except OutputError as error:
        raise DataError(str(error)) from error
    if not names:
        raise DataError(f"there is no file or folder {url}. Check the URL.")
    return Copy(url, here, place, here)


def local_path(path_or_url: str | Path) -> Path:
    """A path of the user's as this machine has it; what lies at a URL is copied. Raises as ``copy_of``."""
    return copy_of(str(path_or_url)).path if is_url(path_or_url) else Path(path_or_url).expanduser()
