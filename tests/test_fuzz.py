"""Damaged and hostile input: whatever is in it, the answer is a result or an error that vitshrink means."""

import copy
import json
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitshrink import load
from vitshrink.config.options import CompressConfig, read_recipe
from vitshrink.data import Kind, open_samples
from vitshrink.data.ground_truth import read_ground_truth
from vitshrink.data.labels import read_class_map
from vitshrink.data.recipes import load_recipe
from vitshrink.errors import VitshrinkError
from vitshrink.jobs.compress import CompressionResult
from vitshrink.jobs.sweep import read_sweep
from vitshrink.models.source import examine
from vitshrink.models.structures.registry import describe, read
from vitshrink.report import Report

settings.register_profile(
    "fuzz",
    derandomize=True,  # the same inputs every time: a failure is one for everybody
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
fuzz = settings(settings.get_profile("fuzz"), max_examples=40)

WEIRD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**5, 2**31, 2**62, 10**30, -(2**40)]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=8),
    st.sampled_from(["../../etc/passwd", "/dev/zero", "\x00", "model", "0.5", "nan", "a" * 5000, "{{7*7}}"]),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all entries of nested data."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [each for key, value in items for each in ((*path, key), *places(value, (*path, key)))]


@st.composite
def mutated(draw: Callable[..., Any], document: Any) -> Any:
    """The data with one to three entries changed, removed, added or called otherwise."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        found = places(changed)
        if not found:
            break
        *parents, key = draw(st.sampled_from(found))
        holder = changed
        for parent in parents:
            holder = holder[parent]
        action = draw(st.sampled_from(["change", "change", "change", "remove", "rename", "add"]))
        if action == "change":
            holder[key] = draw(WEIRD)
        elif action == "remove":
            del holder[key]
        elif isinstance(holder, dict):
            value = holder.pop(key) if action == "rename" else draw(WEIRD)
            holder[draw(st.text(min_size=1, max_size=6))] = value
    return changed


def survives(work: Callable[[], object]) -> None:
    """A result, or an error with a message of one kind: anything else is a failure of the test.

    What is damaged gives a result as it is: the tests below begin with that, or every damage would be stopped by the
    same first check.
    """
    said = "a result"
    with suppress(VitshrinkError):
        try:
            work()
        except VitshrinkError as error:
            said = str(error)
            raise
    assert said.strip()
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def small(compressed: Callable[..., CompressionResult], folder: Path) -> Path:
    directory = compressed("ViTForImageClassification", method="curvature", keep=(0.7,)).directory
    assert directory is not None
    return Path(shutil.copytree(directory, folder / "small"))


def with_json(directory: Path, name: str, document: Any) -> Callable[[], object]:
    (directory / name).write_text(json.dumps(document))
    return lambda: load(directory)


def copied(source: Path, directory: Path) -> Path:
    """The directory, with a copy of a sound checkpoint the first time."""
    if not directory.exists():
        shutil.copytree(source, directory)
        load(directory)
    return directory


@fuzz
@given(data=st.data())
def test_a_config_of_a_dense_model(data: st.DataObject, vit_directory: Path, folder: Path) -> None:
    directory = copied(vit_directory, folder / "dense")
    document = json.loads((vit_directory / "config.json").read_text())
    survives(with_json(directory, "config.json", data.draw(mutated(document))))


@fuzz
@given(data=st.data())
def test_the_plan_in_the_config_of_a_compressed_model(data: st.DataObject, small: Path, folder: Path) -> None:
    directory = copied(small, folder / "plan")
    document = json.loads((small / "config.json").read_text())
    document["quantization_config"] = data.draw(mutated(document["quantization_config"]))
    survives(with_json(directory, "config.json", document))


ENTRIES = [
    {"rank": 4},
    {"rank": 4, "pivot": 3},
    {"structure": "headwise", "qk": 8, "value": 8},
    {"structure": "narrow", "inputs": 16},
    {"structure": "symmetric", "rank": 8},
    {"structure": "quantized", "bits": 8, "activations": "dynamic", "rank": 4},
    {"structure": "quantized-embedding", "bits": 8},
    {"structure": "tensor-tucker", "parts": 3, "heads": 2, "dims": 8, "inputs": 16},
    {"structure": "tensor-cp", "rank": 8},
    {"structure": "tensor-train", "parts": 3, "heads": 4, "inputs": 8},
    {"structure": "mixed-tokens", "budget": 8, "levels": 2, "scorer": "blur"},
    {"structure": "landmarks", "landmarks": 4, "special": 1, "form": "pooled"},
]


@settings(fuzz, max_examples=300)
@given(data=st.data())
def test_the_entry_of_a_structure(data: st.DataObject) -> None:
    entry = data.draw(mutated({"entry": data.draw(st.sampled_from(ENTRIES))}))
    survives(lambda: read(entry.get("entry")))


def test_those_entries_are_read() -> None:
    for entry in ENTRIES:
        assert describe(read(entry)) == entry


@fuzz
@given(data=st.data())
def test_the_header_of_a_weight_file(data: st.DataObject, vit_directory: Path, folder: Path) -> None:
    directory = copied(vit_directory, folder / "header")
    blob = (vit_directory / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    header, tensors = json.loads(blob[8 : 8 + length]), blob[8 + length :]

    def write(header: Any, said: Callable[[int], int] = lambda length: length) -> None:
        text = json.dumps(header).encode(errors="surrogatepass")
        (directory / "model.safetensors").write_bytes(struct.pack("<Q", said(len(text))) + text + tensors)

    write(header)
    load(directory)
    lie = st.sampled_from([lambda length: length, lambda length: length + 1, lambda _: 0, lambda _: 2**62])
    write(data.draw(mutated(header)), data.draw(lie))
    survives(lambda: load(directory))


@fuzz
@given(position=st.integers(0, 4000), value=st.binary(min_size=1, max_size=8), cut=st.integers(0, 60000))
def test_bytes_of_a_weight_file(position: int, value: bytes, cut: int, vit_directory: Path, folder: Path) -> None:
    directory = copied(vit_directory, folder / "bytes")
    blob = bytearray((vit_directory / "model.safetensors").read_bytes())
    blob[position : position + len(value)] = value
    (directory / "model.safetensors").write_bytes(blob[: len(blob) - cut] if cut % 2 else blob)
    survives(lambda: load(directory))


@fuzz
@given(data=st.data())
def test_an_index_of_shards(data: st.DataObject, vit_directory: Path, folder: Path) -> None:
    directory = folder / "index"
    if not directory.exists():
        shutil.copytree(vit_directory, directory)
        (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    names = list(examine(vit_directory).tensors)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    with_json(directory, "model.safetensors.index.json", index)()
    survives(with_json(directory, "model.safetensors.index.json", data.draw(mutated(index))))


def read_yaml(file: Path, document: Any, read: Callable[[Path], object]) -> object:
    file.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return read(file)


def recipe_of(file: Path) -> CompressConfig:
    return CompressConfig.from_mapping(read_recipe(file))


RECIPE = CompressConfig("model", "out", keep=(0.5,), calibration="images", options={"alpha": 0.5}).to_dict()


@fuzz
@given(data=st.data())
def test_a_recipe(data: st.DataObject, folder: Path) -> None:
    read_yaml(folder / "recipe.yaml", RECIPE, recipe_of)
    changed = data.draw(mutated(RECIPE))
    survives(lambda: read_yaml(folder / "recipe.yaml", changed, recipe_of))


SWEEP = {
    "output": "results",
    "defaults": {"samples": 8, "calibration": "images"},
    "matrix": {"model": [{"name": "a", "model": "m"}, "b"], "method": ["svd", "curvature"], "keep": [0.5, 0.7]},
    "exclude": [{"model": "a", "keep": 0.5}],
    "include": [{"keep": 0.7, "seed": 3}, {"name": "extra", "model": "x", "rank": 4}],
    "gates": {"max_kl": 0.5, "max_size": "9MB"},
    "time_limit": "2h",
}


@fuzz
@given(data=st.data())
def test_a_sweep(data: st.DataObject, folder: Path) -> None:
    read_yaml(folder / "sweep.yaml", SWEEP, read_sweep)
    changed = data.draw(mutated(SWEEP))
    survives(lambda: read_yaml(folder / "sweep.yaml", changed, read_sweep))


@fuzz
@given(text=st.text(alphabet=st.sampled_from("{}[]:,-&*!|>'\"%@` \n\tabc01"), max_size=60))
def test_text_that_is_meant_to_be_a_recipe(text: str, folder: Path) -> None:
    file = folder / "text.yaml"
    file.write_text(text, encoding="utf-8")
    survives(lambda: recipe_of(file))
    survives(lambda: read_sweep(file))


@fuzz
@given(data=st.data())
def test_a_data_recipe(data: st.DataObject, folder: Path) -> None:
    document = {"id": "owner/images", "split": "train", "kind": "image", "image_column": "image", "samples": 8}
    document |= {"header": False, "columns": ["image", "label"], "delimiter": "tab", "quoting": "none"}
    read_yaml(folder / "data.yaml", document, load_recipe)
    changed = data.draw(mutated(document))
    survives(lambda: read_yaml(folder / "data.yaml", changed, load_recipe))


TABLE_PARTS = (
    *("text", "label", "image", "file_name", "a", "1", "0", "1.5", "nan", "-1", "1e999", "null", "true", "é"),
    *(",", "\t", ";", "|", '"', "\n", "\r\n", " ", "{", "}", "[", "]", ":", "\ufeff", "\\u0000", "\\ud83d", "\x00"),
)


@settings(fuzz, max_examples=100)
@given(
    content=st.lists(st.sampled_from(TABLE_PARTS), max_size=25).map("".join),
    encoding=st.sampled_from(["utf-8", "utf-16", "latin-1"]),
    suffix=st.sampled_from([".csv", ".tsv", ".txt", ".json", ".jsonl", ".csv.gz"]),
    kind=st.sampled_from(["text", "image"]),
    keys=st.sampled_from(
        ["", "header: false", "header: true", "quoting: none", "header: false\ncolumns: [text, label]"]
    ),
)
def test_a_table(content: str, encoding: str, suffix: str, kind: Kind, keys: str, folder: Path) -> None:
    file = folder / f"table{suffix}"
    file.write_bytes(content.encode(encoding, errors="replace"))
    (folder / "table.yaml").write_text(f"kind: {kind}\npath: {file.name}\n{keys}\n")
    survives(lambda: open_samples(folder / "table.yaml" if keys else file, kind))
    survives(lambda: read_ground_truth(file, ["a.png", "b.png"]))
    survives(lambda: read_class_map(file))


@fuzz
@given(data=st.data())
def test_a_report(data: st.DataObject, small: Path) -> None:
    document = json.loads((small / "report.json").read_text())
    Report.from_json(json.dumps(document))
    changed = json.dumps(data.draw(mutated({name: document[name] for name in ("model", "task", "layers", "recipe")})))
    survives(lambda: Report.from_json(json.dumps(document | json.loads(changed))))
