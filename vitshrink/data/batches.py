"""What preprocessing yields, and the account of samples that it cannot use."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from torch import Tensor

from vitshrink.data.samples import Label, Sample, SampleSet
from vitshrink.errors import DataError


@dataclass(eq=False)
class Batch:
    """``inputs`` of the model: ``pixel_values`` (batch, channels, height, width), or token tensors (batch, tokens).

    ``mask`` (batch, tokens), or (batch, choices, tokens) as the inputs, is True at real tokens, None for images.
    ``truncated`` counts texts cut to the maximum length. ``places`` (batch, tokens, 2) is for heads that answer for
    some of the tokens: the first word, or character, that a token stands for, and the one after its last; -1 where the
    head is not asked. None: it is asked for all.
    """

    inputs: dict[str, Tensor]
    mask: Tensor | None
    labels: list[Label]
    keys: list[str]
    truncated: int = 0
    places: Tensor | None = None


@dataclass
class BadSamples:
    """Samples that could not be used, and how many are put up with.

    ``reasons`` says why, by key: passing over the same set twice counts a sample once.
    """

    limit: int
    reasons: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, samples: SampleSet, limit: int | None = None) -> "BadSamples":
        """Put up with ``limit`` of the samples, or else with 1 % of them and at least one."""
        return cls(max(1, len(samples) // 100) if limit is None else limit)

    def add(self, key: str, reason: str, samples: SampleSet) -> None:
        """Raises DataError when this is one too many."""
        self.reasons[key] = reason
        self.check(samples)

    def check(self, samples: SampleSet) -> None:
        """Raises DataError when there are too many."""
        if len(self.reasons) > self.limit:
            listed = "; ".join(f"{name} {why}" for name, why in islice(self.reasons.items(), 5))
            raise DataError(
                f"{samples.source}: {len(self.reasons)} of {len(samples)} samples cannot be used, but at most "
                f"{self.limit} are allowed: {listed}. Repair or remove them, or allow more with "
                "--max-bad-samples."
            )


def batched(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """Lists of ``size`` samples, the last one shorter. (`itertools.batched` came with Python 3.12.)"""
    iterator = iter(samples)
    while batch := list(islice(iterator, size)):
        yield batch
