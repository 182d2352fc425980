"""What is the same for every row of a table, and is computed once: the dense model's answers, and samples read."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.data import Batch, Preprocessor, SampleSet


class Remembered(nn.Module):
    """The dense model, which computes the outputs for a batch once and gives the same ones ever after."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.outputs: dict[str, Any] = {}

    def forward(self, **inputs: Tensor) -> Any:
        digest = hashlib.sha256()
        for tensor in inputs.values():
            digest.update(tensor.contiguous().cpu().numpy().data)
        key = digest.hexdigest()
        if key not in self.outputs:
            self.outputs[key] = self.model(**inputs)
        return self.outputs[key]


@dataclass
class ReadOnce:
    """A preprocessor that keeps the batches of the samples it has read."""

    preprocessor: Preprocessor
    kept: dict[str, list[Batch]] = field(default_factory=dict)

    @property
    def processor(self) -> Any:
        return self.preprocessor.processor

    def windows(self, samples: SampleSet) -> SampleSet:
        return self.preprocessor.windows(samples)

    def batches(self, samples: SampleSet, batch_size: int, **options: Any) -> Iterator[Batch]:
        key = samples.fingerprint()
        if key not in self.kept:
            self.kept[key] = list(self.preprocessor.batches(samples, batch_size, **options))
        yield from self.kept[key]
