"""A set of samples, none of them decoded yet."""

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

from vitshrink.data.images import ImageSource, read_image_bytes
from vitshrink.data.recipes import Kind, Recipe
from vitshrink.errors import DataError, UsageError


@dataclass(frozen=True)
class Answers:
    """What is right to answer to one question; nothing where its context does not tell."""

    context: str
    texts: tuple[str, ...]
    start: int | None = None
    """The character of the context at which the first of them begins."""


Label = int | str | float | tuple[int | str | float, ...] | Answers | None
LabelsAre = Literal["names", "integers", "scores", "lists", "columns", "tags", "answers"]


@dataclass(frozen=True)
class Sample:
    """One undecoded sample.

    ``key`` names it in messages: the path relative to the source, or ``row 17`` (counted from 1). ``label`` is what
    the source says: a name, an integer (an index into ``SampleSet.label_names`` where there are such), a score, or
    several of them.
    """

    key: str
    image: ImageSource | None = None
    text: str | None = None
    text_pair: str | None = None
    label: Label = None
    words: tuple[str, ...] | None = None
    """Of ``text``, where its words were told apart: there may be a label for each of them."""
    choices: tuple[str, ...] | None = None
    """That may follow ``text``, one of which is right."""
    query: str | None = None
    """What the pair of texts belongs to, where passages of a query are to be ranked."""
    skipped: int = 0
    """Characters of a context that stand before ``text_pair``, which is one window of it."""


class NothingLeftError(DataError):
    """A source has no more samples than those that were to be left out."""


@runtime_checkable
class Drawable(Protocol):
    """Samples that can be drawn at random without reading all of them (a stream)."""

    def draw(self, count: int | None, seed: int, skip: int) -> list[Sample]: ...


@dataclass(eq=False)
class SampleSet:
    """Samples of one source, in a fixed order.

    ``labels_are`` says what ``Sample.label`` holds: ``names`` (strings, or indices into ``label_names``), ``integers``
    without names, ``scores`` of a regression, ``lists`` of any number of names, integers or scores, ``columns`` with a
    number for each of ``label_names``, ``tags`` (names or integers) for each of the ``words``, the ``answers`` to a
    question, or None where the source has no labels; ``unlabeled`` may say why, and what to do about it. ``notes`` are
    what the user should know of how the source was read.
    """

    source: str
    kind: Kind
    samples: Sequence[Sample] = field(repr=False)
    label_names: list[str] | None = None
    labels_are: LabelsAre | None = None
    recipe: Recipe | None = None
    unlabeled: str | None = None
    notes: tuple[str, ...] = ()
    apart: bool = False
    """Whether a model reads the two texts of a pair apart, or an image and its text, and learns from each of them."""
    captioned: bool = False
    """Whether image and text of a sample belong together."""
    prompts: Sequence["Sample"] = ()
    """Texts for the classes of images, for a dual encoder to tell them by; their keys begin with the class."""

    def __len__(self) -> int:
        return len(self.samples)

    def read_apart(self) -> "SampleSet":
        """As a model reads them: pairs that are read apart as twice as many samples, without labels."""
        if self.apart and self.kind == "image-text":
            images = [replace(sample, text=None) for sample in self.samples if sample.image is not None]
            texts = [replace(sample, image=None) for sample in self.samples if sample.text is not None]
            return replace(self, samples=[*images, *texts], labels_are=None)
        if not self.apart or not any(sample.text_pair is not None for sample in self.samples):
            return self
        found = [
            replace(sample, key=f"{sample.key}, {side}", text=text, text_pair=None, label=None)
            for sample in self.samples
            for side, text in (("first", sample.text), ("second", sample.text_pair))
        ]
        return replace(self, samples=found, labels_are=None)

    def select(self, count: int | None, seed: int, skip: int = 0) -> "SampleSet":
        """``count`` samples of the order shuffled by ``seed``, after leaving out its first ``skip``.

        Calls with one seed and disjoint ranges give disjoint samples. ``count=None`` takes all that follow, and with
        ``skip=0`` keeps the source's order. Fewer come back where the source has fewer.

        Raises:
            UsageError: ``count`` below 1 or ``skip`` below 0.
            NothingLeftError: nothing is left.
        """
        if (count is not None and count < 1) or skip < 0:
            raise UsageError(
                f"cannot select {count} samples after skipping {skip}: ask for at least 1, skip at least 0."
            )
        chosen: Sequence[Sample]
        if count is None and skip == 0:
            chosen = self.samples
        elif isinstance(self.samples, Drawable):
            chosen = self.samples.draw(count, seed, skip)
        else:
            order = list(range(len(self.samples)))
            random.Random(seed).shuffle(order)
            chosen = [self.samples[i] for i in order[skip : None if count is None else skip + count]]
        if not len(chosen):
            raise NothingLeftError(f"{self.source}: no sample is left after skipping {skip}.")
        return replace(self, samples=chosen)

    def at_most(self, count: int | None, seed: int) -> "SampleSet":
        """All of them, or ``count`` drawn by ``seed``; of a stream no more is read than that."""
        if count is None or (not isinstance(self.samples, Drawable) and count >= len(self)):
            return self
        return self.select(count, seed)

    @cached_property
    def digests(self) -> list[bytes]:
        """SHA-256 of the content of each sample, labels and names left out."""
        with ThreadPoolExecutor() as pool:  # reading and hashing let go of the interpreter lock
            return list(pool.map(_digest, self.samples))

    @cached_property
    def marks(self) -> list[str]:
        """The first 48 bits of each digest in hexadecimal: enough to know the samples of another job again."""
        return [digest[:6].hex() for digest in self.digests]

    def fingerprint(self) -> str:
        """SHA-256 over the contents in order, in hexadecimal; reads every file once."""
        return hashlib.sha256(b"".join(self.digests)).hexdigest()

    def identity(self) -> str:
        """SHA-256 over contents and labels, in hexadecimal: where it is the same, any job makes the same of them."""
        labels = repr((self.labels_are, self.label_names, [sample.label for sample in self.samples]))
        return hashlib.sha256(f"{self.fingerprint()} {labels}".encode(errors="surrogatepass")).hexdigest()

    def outline(self) -> str:
        """SHA-256 over what is known before any image is read, in hexadecimal; of a stream, over what it is called."""
        if isinstance(self.samples, Drawable):
            return hashlib.sha256(self.source.encode(errors="surrogatepass")).hexdigest()
        known = [(each.key, each.label, each.text, each.text_pair) for each in self.samples]
        return hashlib.sha256(repr(known).encode(errors="surrogatepass")).hexdigest()


def overlap(a: SampleSet, b: SampleSet) -> int:
    """How many samples of ``b`` have the same content as a sample of ``a``."""
    counts = Counter(b.digests)
    return sum(counts[digest] for digest in set(a.digests))


def _digest(sample: Sample) -> bytes:
    if sample.image is not None:
        try:
            content = read_image_bytes(sample.image)
        except (
            OSError,
            ValueError,
        ):  # counted and named when it is decoded; here it only has to differ from the others
            content = f"unreadable {sample.key}".encode()
        content += b"" if sample.text is None else f"\x00{sample.text}".encode(errors="surrogatepass")
        return hashlib.sha256(content).digest()
    texts = "\x00".join(
        (f"{sample.text}", f"{sample.text_pair}", *(sample.choices or ()))
    )  # the separator keeps ("ab", "c") apart from ("a", "bc")
    return hashlib.sha256(texts.encode(errors="surrogatepass")).digest()
