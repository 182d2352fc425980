"""``open_samples``: from what a user writes on the command line to a set of samples."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vitshrink.data.columns import Columns, class_names, find_columns, typed_labels
from vitshrink.data.folders import holds_images, is_hidden, open_image_folder
from vitshrink.data.hub import SHARD_FORMATS, Address, holds_saved, open_hub, open_saved, open_shards
from vitshrink.data.image_metadata import METADATA_NAMES
from vitshrink.data.layouts import LAYOUTS
from vitshrink.data.recipes import Kind, Recipe, load_recipe, recipe_names, suggestion
from vitshrink.data.remote import copy_of, local_path
from vitshrink.data.samples import Sample, SampleSet
from vitshrink.data.tables import SEPARATED_SUFFIXES, TABLE_SUFFIXES, Table, is_table, read_table
from vitshrink.data.text_files import text_suffix
from vitshrink.errors import DataError, UsageError
from vitshrink.runtime.storage import is_url

_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(/(?P<config>[\w.-]+))?")


def open_samples(
    spec: str | Path,
    kind: Kind,
    *,
    split: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    labels: str | Path | None = None,
    model_labels: Sequence[str] = (),
    layout: str | None = None,
    flags: str = "--",
    offline: bool = False,
) -> SampleSet:
    """Find the samples that ``spec`` names, without decoding any.

    ``spec`` is one of

    * a folder of class folders, a flat folder of images, either with ``metadata.csv``, a folder of parquet or
      webdataset shards, each also below a folder for the split; or what ``save_to_disk`` wrote;
    * a file: ``.parquet``, ``.arrow``, ``.tar``, ``.csv``, ``.tsv``, ``.txt``, ``.json``, ``.jsonl``, and those of text
      also compressed;
    * a recipe: the name of a shipped one, or the path of a ``.yaml`` file;
    * a data set on the Hub: ``owner/name`` or ``owner/name/config``;
    * the URL of such a folder or file, see ``remote.copy_of``;
    * any of these with its split: ``spec:split``.

    Columns, split and labels given here go before those of a recipe. Columns that nobody names are guessed from usual
    names, or are those of the ``model_labels`` of a model that gives several labels a sample. ``label_column`` may list
    several columns, with commas between them. ``layout`` is how samples lie that are more than a text and a label.
    ``labels`` is a file with the classes of a flat folder of images.
    ``flags`` is how the flags begin that messages name.

    Raises:
        DataError: nothing there, no samples, or a split or column that is missing or cannot be told.
        UsageError: a recipe that makes no sense or is of the other kind; a column or file of labels where there is
            nothing that it could stand for.
    """
    wanted = Columns(
        image_column,
        text_column,
        text_pair_column,
        label_column,
        flags,
        model_labels=tuple(model_labels),
        layout=layout,
    )
    for flag, column in _foreign(wanted, kind):
        raise UsageError(f"{flags}{flag} {column}: the model reads {kind} samples, which have no such column.")
    name, split = divide(str(spec), split)
    if is_url(name) and not _is_recipe(name):
        return replace(_open_url(name, kind, split, wanted, _path(labels)), source=str(spec))
    path = Path(name).expanduser()
    if path.exists() and name in recipe_names():
        raise UsageError(
            f"{name!r} is a recipe, and also a file or folder here: write ./{name} for the file or folder."
        )
    if _is_recipe(name):
        samples = _open_recipe(load_recipe(name), kind, split, wanted, _path(labels), offline)
    elif path.exists():
        samples = _open_path(path, kind, split, wanted, _path(labels))
    else:
        _no_labels(spec, labels)
        match = _HUB_ID.fullmatch(name)
        if match is None or _looks_like_a_path(name):
            raise DataError(_nothing_there(name, path))
        samples = open_hub(Address(match["id"], match["config"], split), kind, wanted, offline=offline)
    return replace(samples, source=str(spec))


def hub_source(spec: str | Path) -> tuple[str, Recipe | None] | None:
    """The data set on the Hub that ``spec`` names, and the recipe by which it does; None for what lies here.

    Raises as ``open_samples`` for a recipe that makes no sense.
    """
    name, _ = divide(str(spec), None)
    path = Path(name).expanduser()
    if _is_recipe(name):
        recipe = load_recipe(name)
        return None if recipe.id is None else (recipe.id, recipe)
    match = _HUB_ID.fullmatch(name)
    return None if path.exists() or match is None or _looks_like_a_path(name) else (match["id"], None)


def divide(spec: str, split: str | None) -> tuple[str, str | None]:
    """``spec:split`` in two, unless there is a file of that name."""
    name, colon, inside = spec.rpartition(":")
    if not colon or not re.fullmatch(r"[\w.]+", inside) or Path(spec).expanduser().exists():
        return spec, split
    if split not in (None, inside):
        raise UsageError(f"{spec} names the split {inside!r}, but {split!r} was given as well: give one.")
    return name, inside


def _is_recipe(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml") or name in recipe_names()


def _path(file: str | Path | None) -> Path | None:
    return None if file is None else local_path(file)


def _foreign(wanted: Columns, kind: Kind) -> list[tuple[str, str]]:
    """Flags and columns that are only for samples of the other kind."""
    named = {"image-column": wanted.image, "text-column": wanted.text, "text-pair-column": wanted.text_pair}
    return [(flag, column) for flag, column in named.items() if column and not flag.startswith(kind)]


def _no_labels(source: str | Path, labels: str | Path | None) -> None:
    if labels is not None:
        raise UsageError(f"a file of labels ({labels}) is for a flat folder of images, but {source} is not one.")


def _open_recipe(
    recipe: Recipe, kind: Kind, split: str | None, wanted: Columns, labels: Path | None, offline: bool
) -> SampleSet:
    if recipe.kind != kind:
        raise UsageError(f"the recipe {recipe.name} is of the kind {recipe.kind}, but {kind} samples are needed here.")
    split = split or recipe.split
    wanted = replace(
        wanted,
        image=wanted.image or recipe.image_column,
        text=wanted.text or recipe.text_column,
        text_pair=wanted.text_pair or recipe.text_pair_column,
        label=wanted.label or recipe.label_column,
    )
    if labels is None and recipe.labels is not None:
        labels = local_path(recipe.labels) if is_url(recipe.labels) else recipe.folder / local_path(recipe.labels)
    if recipe.id is not None:
        _no_labels(recipe.name, labels)
        _refuse(recipe, _SEPARATED, recipe.id)
        samples = open_hub(Address(recipe.id, recipe.config, split), kind, wanted, offline=offline)
    elif recipe.path is not None and is_url(recipe.path):
        samples = _open_url(recipe.path, kind, split, wanted, labels, recipe)
    else:
        assert recipe.location is not None
        if not recipe.location.exists():
            raise DataError(f"the recipe {recipe.name} reads {recipe.location}, which does not exist.")
        samples = _open_path(recipe.location, kind, split, wanted, labels, recipe)
    return replace(samples, recipe=recipe)


def _open_url(
    url: str, kind: Kind, split: str | None, wanted: Columns, labels: Path | None, recipe: Recipe | None = None
) -> SampleSet:
    copy = copy_of(url)
    with copy.explaining():
        return copy.of(_open_path(copy.path, kind, split, wanted, labels, recipe))


_SEPARATED = dict.fromkeys(("delimiter", "header", "columns", "quoting"), "tables (.csv, .tsv, .txt)")
_CONFIGURED = {"config": "the Hub and for folders of shards"}
"""Keys of a recipe that only some sources have a use for, and what these are."""


def _refuse(recipe: Recipe | None, keys: Mapping[str, str], source: str | Path) -> None:
    """Raises UsageError for the first of the keys that a recipe has, since this source could only ignore it."""
    for key, what in keys.items():
        if getattr(recipe, key, None) is not None:
            assert recipe is not None
            raise UsageError(
                f"the recipe {recipe.name} has `{key}`, which is for {what}, but {source} is none of these."
            )


def _open_path(
    path: Path, kind: Kind, split: str | None, wanted: Columns, labels: Path | None, recipe: Recipe | None = None
) -> SampleSet:
    if split is not None and not path.is_dir():
        raise UsageError(f"{path} is one file and has no splits: remove the split {split!r}.")
    if path.is_dir():
        _refuse(recipe, _SEPARATED, path)
        samples = _open_folder(path, kind, split, wanted, labels, recipe)
    else:
        _no_labels(path, labels)
        _refuse(recipe, _CONFIGURED, path)
        samples = _open_file(path, kind, wanted, recipe)
    if not len(samples):
        raise DataError(f"{path} contains no samples.")
    return samples


def _open_file(path: Path, kind: Kind, wanted: Columns, recipe: Recipe | None) -> SampleSet:
    if text_suffix(path) not in SEPARATED_SUFFIXES:
        _refuse(recipe, _SEPARATED, path)
    if path.suffix.lower() in SHARD_FORMATS:
        return open_shards(Address(str(path)), kind, wanted)
    layout = LAYOUTS.get(wanted.layout or "")
    own = None if layout is None else layout.table(path)
    if own is not None or is_table(path):
        table = own or _read_table(path, recipe)
        if layout is None:
            return _table_samples(table, path, kind, wanted)
        return layout.samples(str(path), table.records(), layout.columns(str(path), table.columns, wanted))
    suffixes = () if layout is None else layout.suffixes
    known = ", ".join((*SHARD_FORMATS, *TABLE_SUFFIXES, *suffixes, ".yaml"))
    raise DataError(f"{path} is not a data file that vitshrink can read: pass a folder or one of {known}.")


def _open_folder(
    folder: Path, kind: Kind, split: str | None, wanted: Columns, labels: Path | None, recipe: Recipe | None
) -> SampleSet:
    if holds_saved(folder):
        _no_labels(folder, labels)
        _refuse(recipe, _CONFIGURED, folder)
        return open_saved(Address(str(folder), split=split), kind, wanted)
    shards = {
        file.suffix.lower()
        for pattern in ("*", "*/*")
        for file in folder.glob(pattern)
        if file.name not in METADATA_NAMES and not is_hidden(file.relative_to(folder))
    } & SHARD_FORMATS.keys()
    # Beside unpacked images a .tar is what they came from; beside .parquet an image is only an illustration.
    if shards - {".tar"} or (shards and not holds_images(folder)):
        _no_labels(folder, labels)
        return open_shards(Address(str(folder), None if recipe is None else recipe.config, split), kind, wanted)
    _refuse(recipe, _CONFIGURED, folder)
    if kind == "text":
        tables = [file.name for file in sorted(folder.iterdir()) if is_table(file)]
        raise DataError(
            f"{folder} contains no parquet or tar shards: pass one file of text."
            + (f" There are: {', '.join(tables)}." if tables else "")
        )
    return open_image_folder(folder, str(folder), split, wanted, labels)


def _read_table(path: Path, recipe: Recipe | None) -> Table:
    if recipe is None:
        return read_table(path)
    return read_table(
        path, delimiter=recipe.delimiter, header=recipe.header, quoting=recipe.quoting, columns=recipe.columns
    )


def _table_samples(table: Table, path: Path, kind: Kind, wanted: Columns) -> SampleSet:
    """Rows of a table; images are named by paths, which start at the table's folder."""
    columns = find_columns(str(path), kind, table.columns, wanted)
    labels, labels_are = typed_labels(f"{path}: {columns.place}", columns.labels(table.column), columns.several)
    images = [path.parent / name if name and name.strip() else None for name in _texts(table, path, columns.image)]
    texts = (_texts(table, path, column) for column in (columns.text, columns.text_pair))
    rows = zip(images, *texts, labels, _texts(table, path, columns.query), strict=True)
    samples = [
        Sample(f"row {number}", image, text, pair, label, query=query)
        for number, (image, text, pair, label, query) in enumerate(rows, start=1)
    ]
    unlabeled = columns.unlabeled
    notes: tuple[str, ...] = ()
    if table.running:
        unlabeled = f".txt is read as running text, one sample per line. {_RENAME}"
        if len(samples) > 1 and all("\t" in (sample.text or "") for sample in samples):
            notes = (f"{path}: every line contains a tab, but {unlabeled}",)
    names = list(columns.several) or class_names(labels, labels_are)
    return SampleSet(str(path), kind, samples, names, labels_are, unlabeled=unlabeled, notes=notes)


_RENAME = "If it is a table, rename it to .tsv or .csv, or name its columns in a recipe."


def _texts(table: Table, path: Path, column: str | None) -> list[str | None]:
    """A column of texts. Numbers are texts as well; NaN is what pandas writes where there is none."""
    values = table.column(column)
    for number, value in enumerate(values, start=1):
        if isinstance(value, list | dict):
            raise DataError(f"{path}, row {number}: column {column!r} contains a {type(value).__name__}, not text.")
    return [None if value is None or value != value else str(value) for value in values]


def _looks_like_a_path(name: str) -> bool:
    path = Path(name)
    return name.startswith((".", "/", "~")) or path.suffix.lower() in SHARD_FORMATS or is_table(path)


def _nothing_there(name: str, path: Path) -> str:
    found = path.parent.iterdir() if path.parent.is_dir() else ()
    beside = sorted(entry.name for entry in found if not entry.name.startswith("."))
    return f"there is no file or folder {name}.{suggestion(path.name, beside)} Recipes: {', '.join(recipe_names())}."
