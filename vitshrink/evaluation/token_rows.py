"""One batch through token classifiers: tags right and wrong, and the entities that they make."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from vitshrink.errors import DataError
from vitshrink.evaluation.entities import counted, entities, kinds_of
from vitshrink.evaluation.rows import Batch, Columns, LabelOf, Step, finite, forward, hits, mapped
from vitshrink.models.fidelity import SOFTMAX
from vitshrink.models.readings import asked_tokens


class _TaggedTokens:
    def __init__(self, batch: Batch, tags_of: LabelOf | None, names: Mapping[int, str]) -> None:
        self.batch = batch
        self.tags_of = tags_of
        self.names = names
        self.kinds = kinds_of(names)
        self.asked = asked_tokens(batch, batch.inputs["input_ids"])
        self.owner = self.asked.nonzero()[:, 0]

    def outputs(self, role: str, model: nn.Module) -> Tensor:
        logits: Tensor = forward(model, self.batch.inputs).logits
        keys = [self.batch.keys[row] for row in self.owner.tolist()]
        return finite(role, logits[self.asked.to(logits.device)], keys)

    def columns(self, outputs: Mapping[str, Tensor]) -> Columns:
        device, width = next((rows.device, rows.shape[-1]) for rows in outputs.values())
        truth = None if self.tags_of is None else self._truth(self.tags_of, width).to(device)
        sums = torch.zeros(len(self.batch.keys), dtype=torch.float64, device=device)
        owner = self.owner.to(device)
        rows = hits(outputs, truth)
        columns = {name: sums.index_add(0, owner, values.double()) for name, values in rows.items()}
        if self.kinds:
            tags = {role: SOFTMAX.decisions(each).tolist() for role, each in outputs.items()}
            columns |= self._entities(tags if truth is None else tags | {"truth": truth.tolist()})
        return columns | {"units": self.asked.sum(1)}

    def _truth(self, tags_of: LabelOf, width: int) -> Tensor:
        """The class of each word whose token is asked."""
        found = []
        places = getattr(self.batch, "places", None)
        for row, (key, tags) in enumerate(zip(self.batch.keys, mapped(self.batch, tags_of), strict=True)):
            if places is None:
                raise DataError(f"{key}: its tags belong to words, and the batch has no word positions.")
            words = places[row, :, 0]
            found += [tags[word] for word in words[words >= 0].tolist()]
        wrong = next((tag for tag in found if type(tag) is not int or not 0 <= tag < width), None)
        if wrong is not None:
            raise DataError(f"a tag means class {wrong!r}, but the model has the classes 0 to {width - 1}.")
        return torch.tensor(found, dtype=torch.long)

    def _entities(self, tags: Mapping[str, Sequence[int]]) -> Columns:
        """Entities of every kind, (samples, kinds): those of each role, and those that two of them share."""
        ends = [0, *self.asked.sum(1).cumsum(0).tolist()]
        found = {
            role: [entities([self.names[tag] for tag in each[start:end]]) for start, end in pairwise(ends)]
            for role, each in tags.items()
        }
        columns = {f"{role}.entities": counted(each, self.kinds) for role, each in found.items()}
        for first, second in (("dense", "truth"), ("compressed", "truth"), ("dense", "compressed")):
            if first in found and second in found:
                shared = [one & other for one, other in zip(found[first], found[second], strict=True)]
                columns[f"{first}.{second}.entities"] = counted(shared, self.kinds)
        return columns


def token_step(tags_of: LabelOf | None, names: Mapping[int, str]) -> Step:
    """For token classifiers, whose classes have ``names``; tags are tuples of classes, one for each word."""
    return lambda batch: _TaggedTokens(batch, tags_of, names)
