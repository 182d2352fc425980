"""Recipes: the shipped ones are sound, and mistakes in a user's own are named."""

from pathlib import Path

import pytest

from vitshrink.data import load_recipe, recipe_names
from vitshrink.data.recipes import recipe_folder
from vitshrink.errors import DataError, UsageError


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_complete(name: str) -> None:
    recipe = load_recipe(name)
    assert all((recipe.id, recipe.split, recipe.samples, recipe.description))
    assert recipe.image_column if recipe.kind == "image" else recipe.text_column


def test_the_readme_lists_every_shipped_recipe() -> None:
    listing = (recipe_folder() / "README.md").read_text(encoding="utf-8")
    assert {"imagenet-1k", "sst2", "mnli", "stsb"} <= set(recipe_names())
    assert [name for name in recipe_names() if f"`{name}`" not in listing] == []


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return file


def test_relative_paths_start_at_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "kind: text\npath: data/x.tsv\ndelimiter: tab\n"))
    assert recipe.location == tmp_path / "data/x.tsv"
    assert (recipe.name, recipe.delimiter, recipe.header) == ("mine", "\t", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: text\npath: x\nsample: 3\n", "unknown key 'sample'.*Did you mean 'samples'"),
        ("kind: text\npath: x\nname: y\n", "unknown key 'name'"),
        ("kind: audio\npath: x\n", "`kind` must be one of image, text"),
        ("path: x\n", "`kind` is missing"),
        ("kind: text\n", "either `id`"),
        ("kind: text\nid: a/b\npath: x\n", "either `id`"),
        ("kind: text\npath: x\nsamples: many\n", "`samples` must be int, not 'many'"),
        ("kind: text\npath: x\nsamples: true\n", "`samples` must be int, not True"),
        ("kind: text\npath: x\nsamples: 0\n", "`samples` must be at least 1"),
        ("kind: text\npath: x\nquoting: all\n", "`quoting` must be one of minimal, none"),
        ("kind: text\npath: x\ndelimiter: '::'\n", "`delimiter` must be one character"),
        ("kind: text\npath: x\ncolumns: [a, b]\n", "add `header: false`"),
        ("- kind\n", "a recipe is"),
        ("", "a recipe is"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe(write(tmp_path, text))


def test_unreadable_recipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the recipe"):
        load_recipe(tmp_path / "missing.yaml")
    with pytest.raises(DataError, match="cannot read the recipe"):
        load_recipe(write(tmp_path, "kind: [text\n"))


def test_yaml_tags_build_no_objects(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the recipe"):
        load_recipe(write(tmp_path, "kind: !!python/object/apply:os.system ['true']\n"))


def test_an_unknown_name_brings_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"Did you mean 'imagenet-1k'.*sst2"):
        load_recipe("imagenet1k")


def test_words_and_numbers_are_what_is_written_there(tmp_path: Path) -> None:
    text = "kind: text\npath: x.tsv\nheader: no\ncolumns: [on, no, 1.10]\ntext_column: on\nlabel_column: no\n"
    recipe = load_recipe(write(tmp_path, text))
    assert (recipe.header, recipe.columns) == (False, ("on", "no", "1.10"))
    assert (recipe.text_column, recipe.label_column) == ("on", "no")
