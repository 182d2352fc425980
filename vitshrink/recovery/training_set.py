"""Training samples: decoded once where memory allows, and put together to batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitshrink.data import BadSamples, Batch, Preprocessor, SampleSet
from vitshrink.data.samples import Answers
from vitshrink.data.text_encoder import padded, padded_places
from vitshrink.errors import DataError

MEMORY = 2 * 2**30
"""Bytes of decoded samples that are kept; those that come later are decoded again whenever they are needed."""


@dataclass(frozen=True, eq=False)
class Item:
    """One preprocessed sample without padding; ``index`` is its place in the data set."""

    index: int
    inputs: dict[str, Tensor]
    label: Any = None
    places: Tensor | None = None
    """(tokens, 2), as in a ``Batch``."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.inputs.values())


@dataclass(eq=False)
class TrainingBatch:
    """``inputs`` of the model, ``mask`` (batch, tokens) of real tokens or None, class ``labels`` or scores (rows,)."""

    inputs: dict[str, Tensor]
    mask: Tensor | None
    indices: Tensor
    labels: Tensor | None = None
    selected: Tensor | None = None
    """(batch, tokens): where a masked language model is asked; None for other tasks."""
    places: Tensor | None = None
    """As in a ``Batch``."""

    @property
    def token_mask(self) -> Tensor | None:
        """(sequences, tokens), as the blocks read them."""
        return None if self.mask is None else self.mask.flatten(0, -2)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "TrainingBatch":
        """On ``device``; accelerate moves what has this method."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        inputs = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.inputs.items()}
        return TrainingBatch(
            inputs, moved(self.mask), self.indices, moved(self.labels), moved(self.selected), moved(self.places)
        )


class TrainingSet(Dataset[Item]):
    """Samples by index, in the form that the model reads.

    Raises:
        DataError: from reading, more unusable samples than allowed.
    """

    def __init__(
        self,
        samples: SampleSet,
        preprocessor: Preprocessor,
        *,
        labels: Sequence[Any] | None = None,
        max_bad_samples: int | None = None,
        memory: int = MEMORY,
    ) -> None:
        self.samples = samples
        self.preprocessor = preprocessor
        self.labels = labels
        # of the whole set, though it is read in small parts
        self.bad = BadSamples(max(1, len(samples) // 100) if max_bad_samples is None else max_bad_samples)
        self.room = memory
        self._kept: dict[int, Item] = {}
        self._unusable: set[int] = set()

    def take(self, batches: Iterable[Batch]) -> None:
        """Keep samples that were read before, without a copy."""
        by_key = {sample.key: index for index, sample in enumerate(self.samples.samples)}
        for batch in batches:
            for item in self._items(batch, by_key):
                self._keep(item)

    def missing(self) -> list[int]:
        """Samples that were not read yet, or are not kept."""
        return [i for i in range(len(self)) if i not in self._kept and i not in self._unusable]

    def fill(self, batch_size: int, on_samples: Callable[[int], None]) -> None:
        """Read samples as long as there is room to keep them, so that unusable ones are known."""
        missing = self.missing()
        for start in range(0, len(missing), batch_size):
            if self.room <= 0:
                break
            self.__getitems__(chunk := missing[start : start + batch_size])
            on_samples(len(chunk))

    def unseen(self, seen: frozenset[str]) -> list[int]:
        """Usable samples that a model was not fitted to, by their marks."""
        if not seen:
            return self.usable()
        return [i for i, mark in enumerate(self.samples.marks) if mark not in seen and i not in self._unusable]

    def usable(self) -> list[int]:
        """All samples but those that turned out to be unusable."""
        return [i for i in range(len(self)) if i not in self._unusable]

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[TrainingBatch]:
        """The samples in this order."""
        for start in range(0, len(indices), batch_size):
            if items := self.__getitems__(indices[start : start + batch_size]):
                yield self.collate(items)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """What ``torch.utils.data`` asks for when it needs a batch; samples that cannot be used are left out."""
        missing = [i for i in dict.fromkeys(indices) if i not in self._kept and i not in self._unusable]
        read = self._read(missing) if missing else {}
        self._unusable.update(i for i in missing if i not in read)
        for item in read.values():
            self._keep(item)
        return [read.get(i) or self._kept[i] for i in indices if i not in self._unusable]

    def _keep(self, item: Item) -> None:
        if self.room > 0:
            self.room -= item.nbytes
            self._kept[item.index] = item

    def _read(self, indices: Sequence[int]) -> dict[int, Item]:
        by_key = {self.samples.samples[i].key: i for i in indices}
        chosen = replace(self.samples, samples=[self.samples.samples[i] for i in indices])
        batches = self.preprocessor.batches(chosen, len(indices), bad=self.bad, in_order=True)
        try:
            return {item.index: item for batch in batches for item in self._items(batch, by_key)}
        except DataError:
            if set(by_key) <= self.bad.reasons.keys() and len(self.bad.reasons) <= (self.bad.limit or 0):
                return {}  # none of these few, but that is put up with
            raise

    def _items(self, batch: Batch, by_key: Mapping[str, int]) -> Iterator[Item]:
        for row, key in enumerate(batch.keys):
            if key not in by_key:  # calibrated on, and not trained on
                continue
            inputs = {name: tensor[row] for name, tensor in batch.inputs.items()}
            places = None if batch.places is None else batch.places[row]
            if batch.mask is not None:
                real = batch.mask[row].reshape(-1, batch.mask.shape[-1]).any(0)  # choices are as long as the longest
                inputs = {name: tensor[..., real] for name, tensor in inputs.items()}
                places = None if places is None else places[real]
            index = by_key[key]
            yield Item(index, inputs, None if self.labels is None else self.labels[index], places)

    def collate(self, items: Sequence[Item]) -> TrainingBatch:
        """One batch, padded to its longest text."""
        indices = torch.tensor([item.index for item in items])
        labels = None if self.labels is None else torch.tensor([row for item in items for row in _row_labels(item)])
        if self.preprocessor.kind == "image":
            names = items[0].inputs
            return TrainingBatch({n: torch.stack([i.inputs[n] for i in items]) for n in names}, None, indices, labels)
        rows = [{name: tensor.tolist() for name, tensor in item.inputs.items()} for item in items]
        inputs = padded(self.preprocessor.processor, rows)
        places = padded_places([item.places for item in items], self.preprocessor.processor)
        return TrainingBatch(inputs, inputs["attention_mask"].bool(), indices, labels, places=places)


def _row_labels(item: Item) -> list[Any]:
    """What is learned from a sample: its label, that of every word whose token is asked for, or the ends of its
    answer."""
    if item.places is None:
        return [item.label]
    if isinstance(item.label, Answers):
        return [_ends(item.label, item.places)]
    return [item.label[word] for word in item.places[:, 0].tolist() if word >= 0]


def _ends(answers: Answers, places: Tensor) -> tuple[int, int]:
    """First and last token of an answer; twice the one that stands for none, where there is none or it was cut off."""
    nothing = int((places == 0).all(1).int().argmax())
    if not answers.texts or answers.start is None:
        return nothing, nothing
    start, end = answers.start, answers.start + len(answers.texts[0])
    within = ((places[:, 0] < end) & (places[:, 1] > start)).nonzero().flatten()
    if not len(within) or int(places[:, 1].max()) < end:
        return nothing, nothing
    return int(within[0]), int(within[-1])
