"""From the tags of words to the class indices of a model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from vitshrink.data.labels import align_labels, normalized
from vitshrink.data.samples import Label, Sample, SampleSet
from vitshrink.errors import DataError


def align_tags(
    samples: SampleSet, id2label: Mapping[int, str], num_labels: int, class_map: Path | None = None
) -> tuple[dict[Label, tuple[int, ...]], str]:
    """The model's class index of each tag of a sample, for every label that occurs, and the rule by which it was found.

    Tags are names, found as by ``align_labels``, or class indices.

    Raises:
        DataError: as ``align_labels``; names the row of a tag that the model does not have.
    """
    rows: dict[int | str | float, str] = {}
    for sample in samples.samples:
        if sample.label is None:
            raise DataError(f"{samples.source}: {sample.key} has no tags, but others have some.")
        for tag in _tags(sample.label):
            rows.setdefault(tag, sample.key)
    whole = all(isinstance(tag, int) for tag in rows)
    known = {normalized(name) for name in id2label.values()}
    met = {tag: key for tag, key in rows.items() if normalized(str(tag)) in known}
    if class_map is None and not whole and met:
        for tag, key in rows.items():
            if tag not in met:
                raise DataError(
                    f"{samples.source}, {key}: the tag {tag!r} is not one of the model's, which are "
                    f"{', '.join(map(str, id2label.values()))}. Correct it, or pass --class-map FILE with one "
                    "line `name index` for each tag."
                )
    single = [Sample(key, label=tag if whole else str(tag)) for tag, key in rows.items()]
    names = None if whole else sorted(map(str, rows))
    alone = replace(samples, samples=single, label_names=names, labels_are="integers" if whole else "names")
    classes, rule = align_labels(alone, id2label, num_labels, class_map)
    of = {tag: classes[tag if whole else str(tag)] for tag in rows}
    tagged = {sample.label: tuple(of[tag] for tag in _tags(sample.label)) for sample in samples.samples}
    return tagged, f"{rule}; one tag per word"


def _tags(label: Label) -> tuple[int | str | float, ...]:
    return label if isinstance(label, tuple) else ()
