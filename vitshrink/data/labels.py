"""From the labels of a data set to the class indices of a model: matched by meaning, never by chance of order."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

from vitshrink.data.samples import Label, SampleSet
from vitshrink.data.text_files import read_text, text_suffix
from vitshrink.errors import DataError, DependencyError

WORDNET_ID = re.compile(r"n\d{8}")
_PLACEHOLDER = re.compile(r"label[ _]?\d+", re.IGNORECASE)
_TRUTH = {"false": False, "true": True}
_REMEDY = "Pass --class-map FILE with one line `name index` for each class."


def align_labels(
    samples: SampleSet, id2label: Mapping[int, str], num_labels: int, class_map: Path | None = None
) -> tuple[dict[Label, int], str]:
    """The model's class index for every label that occurs, and the rule by which it was found.

    In this order: the class map where one is given; class names against ``id2label`` (any one of the comma-separated
    synonyms, case and punctuation ignored); WordNet ids against the 1000 classes of ImageNet; whole numbers and truth
    values by value, or by name where the model's classes are called by numbers.

    Raises:
        DataError: no labels, scores, labels out of range, or names that no rule assigns; the message says what to pass.
    """
    keys = _first_keys(samples)
    names = {label: _name(label, samples, key) for label, key in keys.items()}
    model_names = [id2label.get(index, f"LABEL_{index}") for index in range(num_labels)]
    try:
        if class_map is not None:
            classes, rule = _by_class_map(names, class_map), f"class map {class_map}"
        else:
            classes, rule = _by_meaning(names, samples, model_names)
    except _UnassignedError as problem:
        key = "" if problem.label is None else f"{keys[problem.label]} has the label "
        raise DataError(f"{samples.source}: {key}{problem} {_REMEDY}") from problem
    for label, index in classes.items():
        if not 0 <= index < num_labels:
            raise DataError(
                f"{samples.source}: {keys[label]} has the label {names[label]!r}, class {index}, but the model "
                f"has the classes 0 to {num_labels - 1}. If the numbers are not those of the model: {_REMEDY} "
                "For the numbers of the ImageNet development kit, pass its meta.mat."
            )
    return classes, f"{rule}; {len(set(classes.values()))} of {num_labels} classes occur"


class _UnassignedError(Exception):
    """Why no rule gives every label a class, or which ``label`` it does not: of that, the message goes on."""

    def __init__(self, problem: str, label: Label = None) -> None:
        super().__init__(problem)
        self.label = label


def _by_meaning(
    names: Mapping[Label, str], samples: SampleSet, model_names: Sequence[str]
) -> tuple[dict[Label, int], str]:
    """The first rule that fits labels with ``names`` and a model with ``model_names``."""
    if samples.labels_are != "names":
        return _by_number(names, model_names)
    placeholders = all(_PLACEHOLDER.fullmatch(name) for name in model_names)
    in_order = samples.label_names is not None and _agreement(samples.label_names, model_names) == len(model_names)
    if in_order and all(isinstance(label, int) for label in names):
        # Position goes before the name: ImageNet has two classes called "crane".
        return {label: int(str(label)) for label in names}, "class names, equal to those of the model and in its order"
    if all(map(WORDNET_ID.fullmatch, names.values())):
        return _by_wordnet_id(names, model_names, placeholders)
    if all(name.isdecimal() for name in names.values()) and not set(names.values()) <= set(model_names):
        return _by_value(names), "class names that are integers, by value"
    known = {normalized(name) for name in model_names}
    truth = {label: _TRUTH.get(name.casefold()) for label, name in names.items()}
    if None not in truth.values() and known.isdisjoint(_TRUTH):
        return {label: int(bool(value)) for label, value in truth.items()}, "truth values, with false as class 0"
    if placeholders and known.isdisjoint(map(normalized, names.values())):
        raise _UnassignedError(
            f"the classes have the names {_some(names.values())}, but the model has the names "
            f"{_some(model_names)}: they cannot be matched."
        )
    return _by_name(names, names, model_names), "class names"


def _by_number(names: Mapping[Label, str], model_names: Sequence[str]) -> tuple[dict[Label, int], str]:
    """By value, unless the model's classes are called by other numbers, such as 1 to 5 for stars."""
    classes = _by_value(names)
    called = {name: index for index, name in enumerate(model_names)}
    if any(called.get(names[label], index) != index for label, index in classes.items()):
        if all(0 <= index < len(model_names) for index in classes.values()):
            raise _UnassignedError(
                f"the labels {_some(names.values())} could be class indices, or the names of the model's "
                f"classes, which are {_some(model_names)}."
            )
        return _by_name(names, names, model_names), "class names, which are numbers"
    return classes, "integers taken as class indices (the data set has no class names to check them by)"


def _by_value(names: Mapping[Label, str]) -> dict[Label, int]:
    return {label: int(name) for label, name in names.items()}


def _by_wordnet_id(
    names: Mapping[Label, str], model_names: Sequence[str], placeholders: bool
) -> tuple[dict[Label, int], str]:
    if set(names.values()) <= set(model_names):
        return _by_name(names, names, model_names), "WordNet ids, which are the model's class names"
    imagenet = imagenet_classes()
    unknown = [name for name in names.values() if name not in imagenet]
    if unknown:
        raise _UnassignedError(f"{_some(unknown)} is not among the 1000 classes of ImageNet.")
    # Other spellings of the same classes are common, another order of them is not: half is far from both.
    standard = placeholders or _agreement(list(imagenet.values()), model_names) > len(imagenet) // 2
    if len(model_names) == len(imagenet) and standard:
        order = {wnid: index for index, wnid in enumerate(imagenet)}
        return {label: order[name] for label, name in names.items()}, "WordNet ids in the standard order of ImageNet"
    if placeholders:
        raise _UnassignedError(
            f"the classes are WordNet ids, but the model has {len(model_names)} without names ({model_names[0]} …)."
        )
    meanings = {label: imagenet[name] for label, name in names.items()}
    return _by_name(names, meanings, model_names), "names of the WordNet ids"


def _by_name(names: Mapping[Label, str], meanings: Mapping[Label, str], model_names: Sequence[str]) -> dict[Label, int]:
    """The one class whose full name is the same, else the one that shares a synonym."""
    full: dict[str, set[int]] = {}
    partial: dict[str, set[int]] = {}
    for index, name in enumerate(model_names):
        full.setdefault(normalized(name), set()).add(index)
        for synonym in _synonyms(name):
            partial.setdefault(synonym, set()).add(index)
    classes: dict[Label, int] = {}
    for label, meaning in meanings.items():
        found = full.get(normalized(meaning)) or set().union(*(partial.get(s, set()) for s in _synonyms(meaning)))
        if len(found) != 1:
            known = f"could be {_some(model_names[i] for i in sorted(found))}" if found else "is not one of the model's"
            raise _UnassignedError(
                f"{_shown(names[label], meaning)}, which {known}. The model's classes are {_some(model_names)}.", label
            )
        classes[label] = found.pop()
    taken: dict[int, Label] = {}
    for label, index in classes.items():
        if index in taken:
            raise _UnassignedError(
                f"{names[taken[index]]!r} and {names[label]!r} both look like the model's class {model_names[index]!r}."
            )
        taken[index] = label
    return classes


def _by_class_map(names: Mapping[Label, str], file: Path) -> dict[Label, int]:
    table = read_class_map(file)
    by_spelling = {normalized(name): index for name, index in table.items()}
    classes = {label: table.get(name, by_spelling.get(normalized(name))) for label, name in names.items()}
    missing = [names[label] for label, index in classes.items() if index is None]
    if missing:
        raise _UnassignedError(f"the class map {file} has no entry for {_some(missing)}.")
    return {label: index for label, index in classes.items() if index is not None}


def read_class_map(file: Path) -> dict[str, int]:
    """Class indices by name.

    JSON holds ``{"name": index}``, ``{"index": "name"}``, ``{"index": ["wnid", "name"]}`` or a list of names. A text
    file holds lines of ``name index`` (separated by a tab, a comma or blanks), or one name a line, the first being
    class 0; a line that starts with a WordNet id is named by it. ``meta.mat`` of the ImageNet development kit turns
    its numbers from 1 to 1000, which are in an order of their own, into classes; that needs scipy.

    Raises:
        DataError: unreadable, empty, of another form, or with a name on two lines.
        DependencyError: a ``.mat`` file without scipy.
    """
    if file.suffix == ".mat":
        return _development_kit(file)
    try:
        text = read_text(file, errors="surrogateescape")  # as names of folders are
        entries = _json_entries(json.loads(text)) if text_suffix(file) == ".json" else _line_entries(text.splitlines())
    except (DataError, ValueError, TypeError) as error:
        raise DataError(f"cannot read the class map {file}: {error}") from error
    table: dict[str, int] = {}
    for name, index in entries:
        if table.setdefault(name, index) != index:
            raise DataError(f"the class map {file} gives {name!r} two classes, {table[name]} and {index}.")
    if not table:
        raise DataError(f"the class map {file} is empty.")
    return table


def _development_kit(file: Path) -> dict[str, int]:
    """From ILSVRC2012_ID, as in ``ILSVRC2012_validation_ground_truth.txt``, to the position of its WordNet id."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DependencyError(f"reading {file} needs scipy: pip install scipy.") from error
    order = {wnid: index for index, wnid in enumerate(imagenet_classes())}
    try:
        synsets = loadmat(file, squeeze_me=True)["synsets"]
        numbers, wnids = synsets["ILSVRC2012_ID"], synsets["WNID"]
        return {str(int(n)): order[str(wnid)] for n, wnid in zip(numbers, wnids, strict=True) if str(wnid) in order}
    except Exception as error:  # a damaged file ends in any exception
        raise DataError(f"cannot read the class map {file}: not meta.mat of the development kit ({error}).") from error


def _json_entries(content: object) -> list[tuple[str, int]]:
    if isinstance(content, list):
        return [(str(name), index) for index, name in enumerate(content)]
    if not isinstance(content, dict):
        raise ValueError("a JSON object or list was expected")
    entries: list[tuple[str, int]] = []
    for key, value in content.items():
        if type(value) is int:
            entries.append((key, value))
        else:  # {"0": "tench"} or {"0": ["n01440764", "tench"]}
            names = value if isinstance(value, list) else [value]
            entries += [(str(name), int(key)) for name in names]
    return entries


def _line_entries(lines: Iterable[str]) -> list[tuple[str, int]]:
    filled = [line.strip() for line in lines if line.strip()]
    indexed = [re.fullmatch(r"(?P<name>.*\S)(?:\t|,|\s)\s*(?P<index>-?\d+)", line) for line in filled]
    if all(indexed):
        return [(match["name"].strip("\"' ,\t"), int(match["index"])) for match in indexed if match]
    if all(line.isdecimal() for line in filled):
        raise ValueError("its lines hold numbers without names")
    wnids = [WORDNET_ID.match(line) for line in filled]
    return [(wnid[0] if wnid else line, index) for index, (line, wnid) in enumerate(zip(filled, wnids, strict=True))]


@cache
def imagenet_classes() -> dict[str, str]:
    """The WordNet ids of ImageNet-1k in the standard (sorted) order, with the comma-separated names of each."""
    table = resources.files("vitshrink.data").joinpath("imagenet_classes.tsv").read_text(encoding="utf-8")
    return dict(line.split("\t", 1) for line in table.splitlines())


def _first_keys(samples: SampleSet) -> dict[Label, str]:
    """The distinct labels, each with the key of the first sample that has it."""
    if samples.labels_are is None:
        raise DataError(
            f"{samples.source} has no labels: "
            + (samples.unlabeled or "name their column, or pass class folders, --labels FILE or another split.")
        )
    keys: dict[Label, str] = {}
    for sample in samples.samples:
        keys.setdefault(sample.label, sample.key)
    if samples.labels_are in ("lists", "columns"):
        raise DataError(
            f"{samples.source} has several labels per sample, but this model predicts one class. If it predicts "
            'several, its config.json must contain "problem_type": "multi_label_classification".'
        )
    # A stream of floating-point numbers is only known by value once it is read.
    if samples.labels_are == "scores" and any(isinstance(label, float) and not label.is_integer() for label in keys):
        raise DataError(f"{samples.source} has scores, not classes: scores are for regression or text similarity.")
    missing = [label for label in (None, -1) if label in keys]
    if missing and len(keys) == len(missing):
        raise DataError(f"{samples.source}: every label is {missing[0]}, as in test splits: use a labeled split.")
    if missing:
        raise DataError(f"{samples.source}: {keys[missing[0]]} has no label ({missing[0]}), but others have one.")
    return keys


def _name(label: Label, samples: SampleSet, key: str) -> str:
    if isinstance(label, int) and samples.label_names is not None:
        if not 0 <= label < len(samples.label_names):
            raise DataError(
                f"{samples.source}: {key} has the label {label}, but there are {len(samples.label_names)} class names."
            )
        return samples.label_names[label]
    return str(int(label) if isinstance(label, bool | float) else label)


def _agreement(some: Sequence[str], others: Sequence[str]) -> int:
    """At how many places two equally long lists of class names share a synonym (0 if they differ in length)."""
    if len(some) != len(others):
        return 0
    return sum(not _synonyms(a).isdisjoint(_synonyms(b)) for a, b in zip(some, others, strict=True))


def _synonyms(name: str) -> set[str]:
    return {normalized(synonym) for synonym in name.split(",")}


def normalized(name: str) -> str:
    """Lower case, and one blank for any run of other characters; names of punctuation alone stay as they are."""
    return re.sub(r"[\W_]+", " ", name).strip().casefold() or name.strip()


def _shown(name: str, meaning: str) -> str:
    return repr(name) if name == meaning else f"{name!r} ({meaning})"


def _some(names: Iterable[str], limit: int = 5) -> str:
    listed = list(names)
    return ", ".join(map(repr, listed[:limit])) + (f" … ({len(listed)} in all)" if len(listed) > limit else "")
