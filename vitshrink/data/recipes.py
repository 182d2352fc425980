"""Recipes: a data set with everything needed to read it, written down in YAML.

The recipes shipped with vitshrink lie in ``calibration/`` of the repository.
"""

from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from vitshrink.config.written import read_yaml, truth
from vitshrink.data.tables import DELIMITERS, Quoting
from vitshrink.errors import DataError, UsageError
from vitshrink.runtime.storage import is_url

Kind = Literal["image", "text", "image-text"]
"""What a sample is; ``image-text``: an image and a text, of which a model reads each apart."""


@dataclass(frozen=True)
class Recipe:
    """One data set: ``id`` on the Hub, or a local ``path`` (relative ones start at the recipe's folder)."""

    name: str
    folder: Path
    kind: Kind
    description: str = ""
    id: str | None = None
    path: str | None = None
    config: str | None = None
    """Configuration of a Hub data set, e.g. ``sst2`` of ``nyu-mll/glue``."""
    split: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    columns: tuple[str, ...] | None = None
    """Names of the columns of a file that has none of its own; goes with ``header: false``."""
    header: bool | None = None
    """Whether the first line names the columns; None: as usual for such a file."""
    delimiter: str | None = None
    quoting: Quoting | None = None
    labels: str | None = None
    """File with one class name a line for a flat folder of images, in the order of the file names."""
    samples: int | None = None
    seed: int = 0

    @property
    def location(self) -> Path | None:
        """The local file or folder, None for a data set on the Hub."""
        return None if self.path is None else self.folder / Path(self.path).expanduser()


def recipe_folder() -> Path:
    """The folder of the shipped recipes: inside the wheel, or ``calibration/`` beside the package in a checkout."""
    package = Path(str(resources.files("vitshrink")))
    installed = package / "calibration_recipes"
    return installed if installed.is_dir() else package.parent / "calibration"


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(file.stem for file in recipe_folder().glob("*.yaml"))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a shipped recipe by its name, or any by the path of its ``.yaml`` file.

    Raises:
        UsageError: no such recipe, an unknown key, or a value of the wrong type.
        DataError: the file cannot be read or is not YAML.
    """
    if is_url(name_or_path):
        raise UsageError(f"{name_or_path}: a recipe must be a file on this machine; its `path` may be a URL.")
    file = Path(name_or_path).expanduser()
    if file.suffix not in (".yaml", ".yml"):
        names = recipe_names()
        if str(name_or_path) not in names:
            raise UsageError(f"there is no recipe {name_or_path!r}.{suggestion(str(name_or_path), names)}")
        file = recipe_folder() / f"{name_or_path}.yaml"
    try:
        entries = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the recipe {file}: {error}") from error
    if not isinstance(entries, dict):
        raise UsageError(f"{file}: a recipe is a list of `key: value` lines, but this is {type(entries).__name__}.")
    return _checked(file, entries)


def recipe_defaults(data: Any) -> dict[str, int]:
    """``samples`` and ``seed`` of a recipe, for those who say nothing else; empty where ``data`` names none.

    Every way to a job asks here: the command line, sweeps and Python. ``data`` may end in ``:split``.
    """
    spec = str(data or "")
    name = spec.rpartition(":")[0] if ":" in spec and not Path(spec).expanduser().exists() else spec
    if name not in recipe_names() and Path(name).suffix not in (".yaml", ".yml"):
        return {}
    recipe = load_recipe(name)
    return {"seed": recipe.seed} | ({} if recipe.samples is None else {"samples": recipe.samples})


def suggestion(name: str, available: list[str], limit: int = 20) -> str:
    """`` Did you mean …? Available: …`` for an error about a wrong name."""
    shown = ", ".join(available[:limit]) + (f" … ({len(available)} in all)" if len(available) > limit else "")
    close = get_close_matches(name, available, n=1)
    return (f" Did you mean {close[0]!r}?" if close else "") + f" Available: {shown or 'none'}."


_TEXT, _NUMBER = (str,), (int,)
_TYPES: dict[str, tuple[type, ...]] = {"columns": (list,), "header": (bool,), "samples": _NUMBER, "seed": _NUMBER}
_CHOICES = {"kind": ("image", "text"), "quoting": ("minimal", "none")}
_NAMED_DELIMITERS = {name: delimiter for delimiter, name in DELIMITERS.items()}


def _checked(file: Path, entries: dict[Any, Any]) -> Recipe:
    entries = {key: truth(value) if _TYPES.get(key) == (bool,) else value for key, value in entries.items()}
    known = [field.name for field in fields(Recipe) if field.name not in ("name", "folder")]
    for key, value in entries.items():
        if key not in known:
            raise UsageError(f"{file}: unknown key {key!r}.{suggestion(str(key), known)}")
        expected = _TYPES.get(key, _TEXT)
        if type(value) not in expected:  # not isinstance: YAML's `true` would pass for an integer
            raise UsageError(f"{file}: `{key}` must be {expected[0].__name__}, not {value!r}.")
        if key in _CHOICES and value not in _CHOICES[key]:
            raise UsageError(f"{file}: `{key}` must be one of {', '.join(_CHOICES[key])}, not {value!r}.")
    if "kind" not in entries:
        raise UsageError(f"{file}: `kind` is missing: image or text.")
    if ("id" in entries) == ("path" in entries):
        raise UsageError(f"{file}: give either `id` (on the Hub) or `path` (a local file or folder).")
    for key in ("text_column", "text_pair_column") if entries["kind"] == "image" else ("image_column",):
        if key in entries:
            raise UsageError(f"{file}: `{key}` cannot be used with the kind {entries['kind']}: remove it.")
    if entries.get("samples", 1) < 1:
        raise UsageError(f"{file}: `samples` must be at least 1, not {entries['samples']}.")
    values = dict(entries)
    if "columns" in values:
        if values.get("header", True):
            raise UsageError(f"{file}: `columns` names the columns of a file without a header: add `header: false`.")
        values["columns"] = tuple(map(str, values["columns"]))
    if "delimiter" in values:
        values["delimiter"] = _NAMED_DELIMITERS.get(values["delimiter"], values["delimiter"])
        if len(values["delimiter"]) != 1:
            raise UsageError(f"{file}: `delimiter` must be one character, or tab, comma, semicolon or pipe.")
    return Recipe(name=file.stem, folder=file.parent, **values)
