"""From several labels of a sample to 0 or 1 for each label of a model."""

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitshrink.data.labels import align_labels, normalized
from vitshrink.data.samples import Label, Sample, SampleSet
from vitshrink.errors import DataError

_SEPARATORS = "|;,"


def align_label_lists(
    samples: SampleSet, id2label: Mapping[int, str], num_labels: int, class_map: Path | None = None
) -> tuple[dict[Label, tuple[int, ...]], str]:
    """0 or 1 for each of the model's labels, for every label that occurs, and the rule by which it was found.

    A sample may have any number of labels: a list of names or indices, 0 or 1 for each label of the model, a column
    for each label, one label alone, or names in a string that ``|``, ``;`` or commas divide, also as JSON. Single
    labels are found as by ``align_labels``; a blank is no label at all.

    Raises:
        DataError: as ``align_labels``, and for what is no label, 0 or 1.
    """
    keys: dict[Label, str] = {}
    for sample in samples.samples:
        keys.setdefault(sample.label, sample.key)
    parts = {label: _parts(label, samples, id2label, keys[label]) for label in keys}
    if samples.labels_are == "lists" and all(
        len(each) == num_labels and set(each) <= {0, 1} for each in parts.values()
    ):
        return {label: tuple(map(int, each)) for label, each in parts.items()}, "0 or 1 for each label of the model"
    classes, rule = align_labels(_single(samples, keys, parts), id2label, num_labels, class_map)
    chosen = {label: {classes[part] for part in each} for label, each in parts.items()}
    sets = {label: tuple(int(index in each) for index in range(num_labels)) for label, each in chosen.items()}
    none = sum(not chosen[sample.label] for sample in samples.samples)
    return sets, f"{rule}; any number of them per sample" + (f", none in {none} samples" if none else "")


def _single(samples: SampleSet, keys: Mapping[Label, str], parts: Mapping[Label, Sequence[Any]]) -> SampleSet:
    """Each label on its own, as a data set of one label a sample."""
    single = [Sample(keys[label], label=part) for label, each in parts.items() for part in each]
    if not single and samples.labels_are is not None:
        raise DataError(f"{samples.source}: no sample has a label: name their column, or use another split.")
    if samples.labels_are is None or (samples.label_names is not None and samples.labels_are != "columns"):
        return replace(samples, samples=single, labels_are=samples.labels_are and "names")
    whole = all(isinstance(sample.label, int) for sample in single)
    names = None if whole else sorted({str(sample.label) for sample in single})
    return replace(samples, samples=single, label_names=names, labels_are="integers" if whole else "names")


def _parts(label: Label, samples: SampleSet, id2label: Mapping[int, str], key: str) -> list[Any]:
    """The single labels that a sample has: names, or whole numbers."""
    if samples.labels_are == "columns":
        return _applying(label, samples, key)
    if isinstance(label, str):
        label = _divided(label, {normalized(name) for name in id2label.values()})
    listed = label if isinstance(label, tuple) else () if label is None else (label,)
    parts = [int(part) if isinstance(part, bool | float) and float(part).is_integer() else part for part in listed]
    for part in parts:
        if not isinstance(part, int | str):
            raise DataError(f"{samples.source}: {key} has the label {part!r}, which is not a name, an index, 0 or 1.")
    return parts


def _applying(label: Label, samples: SampleSet, key: str) -> list[str]:
    """The names of the columns that hold 1."""
    if label is None:
        raise DataError(f"{samples.source}: {key} has no labels, but others have some.")
    assert isinstance(label, tuple)
    names = samples.label_names or []
    for name, value in zip(names, label, strict=True):
        if value not in (0, 1):
            raise DataError(
                f"{samples.source}: {key} has {value:g} in the column {name!r}: write 1 where the label applies, and 0 "
                "where it does not."
            )
    return [name for name, value in zip(names, label, strict=True) if value]


def _divided(text: str, known: set[str]) -> tuple[Any, ...]:
    """The labels in a string: one of the ``known`` names, a list of JSON or Python, or names between separators."""
    if re.fullmatch(r"[\[(].*[\])]", text.strip(), re.DOTALL):
        try:
            listed = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            listed = None
        if isinstance(listed, list | tuple):
            return tuple(listed)
    if normalized(text) in known:
        return (text,)
    separator = next((each for each in _SEPARATORS if each in text), None)
    parts = (part.strip() for part in text.split(separator)) if separator else (text,)
    return tuple(int(part) if part.isdecimal() and normalized(part) not in known else part for part in parts if part)
