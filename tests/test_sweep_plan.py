"""From a file to jobs: the matrix, its exceptions, and what makes no sense."""

import os
from dataclasses import Field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import pytest
import tiny
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitshrink.config.options import SIZES, CompressConfig
from vitshrink.errors import UsageError
from vitshrink.jobs.sweep import SweepPlan, fingerprints, read_sweep
from vitshrink.jobs.sweep.fingerprint import is_same
from vitshrink.jobs.sweep.plan import OWN
from vitshrink.methods import attention_methods, available_methods

DATA = {"calibration": "images"}


def plan(tmp_path: Path, *, options: dict[str, Any] | None = None, **entries: Any) -> SweepPlan:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"output": "results", "defaults": DATA, **entries}, sort_keys=False))
    return read_sweep(file, **(options or {}))


def names(found: SweepPlan) -> list[str]:
    return [job.name for job in found.jobs]


def test_every_combination_is_a_job_with_a_directory_of_its_own(tmp_path: Path) -> None:
    found = plan(tmp_path, matrix={"model": ["a/vit", "b/deit"], "method": ["svd", "curvature"], "keep": [0.7, 0.5]})
    assert len(found.jobs) == 8
    assert names(found)[:3] == ["vit-svd-keep-0.7", "vit-svd-keep-0.5", "vit-curvature-keep-0.7"]
    first = found.jobs[0].config
    assert (first.model, first.method, first.keep, first.calibration) == ("a/vit", "svd", (0.7,), "images")
    assert first.output == "results/vit-svd-keep-0.7/model"
    assert {job.config.cache for job in found.jobs} == {"results/cache"}


def test_a_value_may_stand_for_several_entries(tmp_path: Path) -> None:
    models = [
        {"name": "pets", "model": "m/pets", "calibration": "pets/train", "eval": "pets/val"},
        {"model": "m/cars", "calibration": "cars"},
    ]
    found = plan(tmp_path, matrix={"model": models, "size": [{"keep": 0.5}, {"target-size": "9MB"}]})
    assert names(found) == ["pets-keep-0.5", "pets-9MB", "cars-keep-0.5", "cars-9MB"]
    assert (found.jobs[1].config.target_size, found.jobs[1].config.eval) == ("9MB", "pets/val")
    assert found.jobs[2].config.eval is None


def test_exclude_takes_out_what_has_all_of_its_values(tmp_path: Path) -> None:
    matrix = {"model": [{"name": "one", "model": "m"}, "other"], "method": ["svd", "asvd"], "keep": [0.7, 0.5]}
    found = plan(tmp_path, matrix=matrix, exclude=[{"model": "one", "method": "svd"}, {"keep": 0.5, "method": "asvd"}])
    assert names(found) == ["one-asvd-keep-0.7", "other-svd-keep-0.7", "other-svd-keep-0.5", "other-asvd-keep-0.7"]


def test_include_adds_entries_where_they_fit_and_jobs_where_they_do_not(tmp_path: Path) -> None:
    found = plan(
        tmp_path,
        matrix={"model": ["vit"], "method": ["svd", "asvd"], "keep": [0.5]},
        include=[
            {"method": "asvd", "samples": 64},
            {"seed": 3},
            {"model": "vit", "method": "whitened", "keep": 0.9},
            {"name": "extra", "model": "vit", "method": "svd", "keep": 0.3},
        ],
    )
    assert names(found) == ["vit-svd-keep-0.5", "vit-asvd-keep-0.5", "vit-whitened-keep-0.9", "extra"]
    assert [job.config.samples for job in found.jobs] == [512, 64, 512, 512]
    assert [job.config.seed for job in found.jobs] == [3, 3, 0, 0]


def test_jobs_may_be_listed_without_a_matrix(tmp_path: Path) -> None:
    found = plan(tmp_path, include=[{"name": "a", "model": "m", "keep": 0.5}, {"name": "b", "model": "m", "rank": 8}])
    assert names(found) == ["a", "b"]


def test_bounds_are_shared_and_overridden_by_flags_and_jobs(tmp_path: Path) -> None:
    found = plan(
        tmp_path,
        matrix={"model": ["m"], "keep": [0.5, 0.9]},
        include=[{"keep": 0.9, "gates": {"max_kl": 0.1}}],
        gates={"max_kl": 1.0, "max_size": "10MB"},
        options={"gates": {"max_latency_ratio": 2.0}, "time_limit": "1.5h", "output": tmp_path / "elsewhere"},
    )
    assert [job.gates.max_kl for job in found.jobs] == [1.0, 0.1]
    assert {job.gates.max_latency_ratio for job in found.jobs} == {2.0}
    assert found.jobs[0].gates.max_size == 10_000_000
    assert found.time_limit == 5400
    assert found.output == tmp_path / "elsewhere"


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"matrix": {"model": ["m"], "keep": [0.5]}, "outptu": "x"}, "unknown entry 'outptu'"),
        ({"output": None, "matrix": {"model": ["m"]}}, "the output directory is missing"),
        ({}, "there is no job"),
        ({"matrix": {"model": ["m"], "keep": [0.5]}, "exclude": [{"keep": 0.5}]}, "there is no job"),
        ({"matrix": {"model": ["m"], "keep": [0.5]}, "exclude": [{"keep": 0.4}]}, "no combination matches"),
        ({"matrix": {"model": ["m"], "keep": [0.5]}, "exclude": [{"metod": "svd"}]}, "'metod' is not an axis"),
        ({"matrix": {"model": ["m"], "keep": []}}, "keep has no value"),
        ({"matrix": {"model": [["m"]], "keep": [0.5]}}, "is not a value"),
        ({"matrix": {"model": ["m"], "samples": [None], "keep": [0.5]}}, "is not a value"),
        ({"matrix": {"model": ["m"], "method": ["qk-joint"], "keep": [0.5]}, "defaults": {}}, "needs calibration data"),
        ({"matrix": {"model": ["m"], "keep": [0.5]}, "defaults": {"options": {"alfa": 1}, **DATA}}, "job .*alfa"),
        ({"matrix": ["m"]}, "must hold entries"),
        ({"include": {"model": "m"}}, "must list entries"),
        ({"matrix": {"model": ["m"]}}, "job m: choose a size with|choose a size with"),
        ({"matrix": {"model": ["m"], "keep": [0.5, 7]}}, "--keep 7"),
        ({"matrix": {"model": ["m"], "kep": [0.5]}}, "unknown entry 'kep'. Did you mean 'keep'"),
        ({"matrix": {"model": ["m"], "keep": [0.5], "output": ["x"]}}, "the sweep sets 'output' itself"),
        ({"matrix": {"model": ["a/m", "b/m"], "keep": [0.5]}}, "two jobs have the name 'm-keep-0.5'"),
        ({"matrix": {"model": ["m"], "size": [{"keep": [0.5, 0.6]}]}}, "several sizes as an axis"),
        ({"matrix": {"model": ["m"], "a": [{"keep": 0.5}], "b": [{"keep": 0.6}]}}, "two axes set 'keep'"),
        ({"matrix": {"model": ["m"], "keep": [0.5]}, "gates": {"max_drop": 1}}, "--max-drop needs labeled samples"),
        ({"matrix": {"model": ["m"], "keep": [0.5]}, "gates": {"max_dorp": 1}}, "unknown gate"),
        ({"matrix": {"model": ["m"], "keep": [0.5]}, "time_limit": "soon"}, "cannot read 'soon'"),
        ({"matrix": {"model": ["m"], "method": ["svdd"], "keep": [0.5]}}, "Did you mean 'svd'"),
        ({"matrix": {"model": ["m" * 300], "keep": [0.5]}}, "too long for a directory"),
        ({"matrix": {f"axis{i}": list(range(100)) for i in range(20)}}, "at most 1,000"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_job(entries: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        plan(tmp_path, **entries)


@settings(derandomize=True, deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(labels=st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_names_stay_within_the_output(tmp_path_factory: pytest.TempPathFactory, labels: list[str]) -> None:
    root = tmp_path_factory.mktemp("plans")
    try:
        found = plan(root, matrix={"model": [{"name": label, "model": "m"} for label in labels], "keep": [0.5]})
    except UsageError:
        return
    for name in names(found):
        assert Path(name).name == name
        assert not name.startswith((".", "-"))


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder with one of everything that a job may read."""
    root = tmp_path / "inputs"
    (root / "model" / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"):
        (root / "model" / name).write_text(f"the content of {name}")
    tiny.write_images(root / "data" / "train" / "cat", 3)
    tiny.write_images(root / "data" / "val" / "cat", 3, seed=1)
    tiny.write_images(root / "flat", 3, seed=2)
    tiny.write_images(root / "elsewhere", 2, seed=3)
    (root / "data" / "train" / "dog").symlink_to(root / "elsewhere")
    tiny.write_images(root / "described" / "train", 2, seed=4)
    (root / "described" / "metadata.csv").write_text("file_name,label\ntrain/000.png,cat\ntrain/001.png,dog\n")
    (root / "linked").symlink_to(root / "elsewhere" / "000.png")
    names = sorted(path.name for path in (root / "flat").iterdir())
    (root / "truth.txt").write_text("".join(f"{name} cat\n" for name in names))
    (root / "classes.json").write_text('{"cat": 3}')
    (root / "table.csv").write_text("image,label\nflat/" + names[0] + ",cat\nlinked,dog\n")
    (root / "recipe.yaml").write_text("kind: image\npath: table.csv\n")
    (root / "sentences.txt").write_text("one sentence\nanother sentence\n")
    return root


def changed(file: Path) -> None:
    """Other contents, of the same size and with the same time."""
    before, content = file.stat(), file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def fingerprint_of(tmp_path: Path, **entries: Any) -> str:
    (found,) = fingerprints([plan(tmp_path, defaults={}, include=[{"name": "job", **entries}]).jobs[0].config])
    return found


@pytest.mark.parametrize(
    ("entries", "read"),
    [
        ({}, "model/config.json"),
        ({}, "model/model.safetensors"),
        ({}, "model/tokenizer.json"),
        ({}, "model/1_Pooling/config.json"),
        ({"calibration": "data:train"}, "data/train/cat/*.png"),
        ({"calibration": "data", "calibration_split": "train"}, "data/train/cat/*.png"),
        ({"calibration": "data:train"}, "elsewhere/001.png"),
        ({"eval": "described:train"}, "described/metadata.csv"),
        ({"calibration": "table.csv"}, "table.csv"),
        ({"calibration": "table.csv"}, "flat/000.png"),
        ({"calibration": "table.csv"}, "elsewhere/000.png"),
        ({"calibration": "recipe.yaml"}, "table.csv"),
        ({"calibration": "recipe.yaml"}, "elsewhere/000.png"),
        ({"calibration": "sentences.txt"}, "sentences.txt"),
        ({"eval": "data:val"}, "data/val/cat/*.png"),
        ({"eval": "flat", "eval_labels": "truth.txt"}, "truth.txt"),
        ({"eval": "flat", "class_map": "classes.json"}, "classes.json"),
        ({"calibration": "flat", "finetune": {"data": "data:train"}}, "data/train/cat/*.png"),
    ],
)
def test_a_fingerprint_follows_the_contents_of_all_that_is_read(
    entries: dict[str, Any], read: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    job = {"model": "model", "keep": 0.5, "method": "svd", "compensation": "none", **entries}
    first = fingerprint_of(tmp_path, **job)
    changed(sorted(inputs.glob(read))[0])
    assert fingerprint_of(tmp_path, **job) != first


def test_a_fingerprint_follows_names_and_labels_and_nothing_else(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    job = {"model": "model", "keep": 0.5, "calibration": "data:train", "eval": "data:val"}

    def now(**others: Any) -> str:
        return fingerprint_of(tmp_path, **{**job, **others})

    first = now()
    assert now(cache=None, offline=True) == first
    others = [now(seed=1), now(method="svd"), now(keep=0.6), now(calibration="flat")]
    assert len({first, *others}) == 5
    for file in inputs.rglob("*"):
        os.utime(file)
    (inputs / "model" / ".git").mkdir()
    (inputs / "model" / ".git" / "index").write_text("changes with every look at it")
    changed(inputs / "truth.txt")
    assert now() == first
    (inputs / "data" / "val" / "cat").rename(inputs / "data" / "val" / "dog")
    relabeled = now()
    assert relabeled != first
    (inputs / "model" / "vocab.txt").write_text("a file more")
    assert now() not in (first, relabeled)


def test_what_lies_on_the_hub_counts_with_its_commit_where_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits: dict[str, str | None] = {"some/vit": "1a2b", "some/images": None}
    monkeypatch.setattr("vitshrink.jobs.sweep.fingerprint.revision", lambda name, _kind, **_options: commits[name])
    job = {"model": "some/vit", "keep": 0.5, "calibration": "some/images:train"}
    unknown = fingerprint_of(tmp_path, **job)
    commits["some/images"] = "3c4d"
    first = fingerprint_of(tmp_path, **job)
    commits["some/vit"] = "5e6f"
    pushed = fingerprint_of(tmp_path, **job)
    assert len({unknown, first, pushed}) == 3
    assert is_same(first, first)
    assert not is_same(first, pushed)
    assert is_same(unknown, first)
    assert is_same(pushed, unknown)
    assert not is_same(first, fingerprint_of(tmp_path, **job, seed=1))


def test_a_data_recipe_says_how_many_samples_where_the_sweep_does_not(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("kind: image\npath: .\nsamples: 31\nseed: 5\n")
    found = plan(tmp_path, defaults={"calibration": str(recipe)}, matrix={"model": ["m"], "keep": [0.5]})
    stated = plan(tmp_path, defaults={"calibration": str(recipe), "samples": 7}, matrix={"model": ["m"], "keep": [0.5]})
    assert [(job.config.samples, job.config.seed) for job in (*found.jobs, *stated.jobs)] == [(31, 5), (7, 5)]


def test_a_bound_on_predictions_and_one_on_accuracy_have_two_names(tmp_path: Path) -> None:
    """Under the old name an entry of a job still chooses its size, and says once that it does."""
    said: list[str] = []
    shared: dict[str, Any] = {"matrix": {"model": ["a", "b"]}, "gates": {"max_drop": 1}}
    new = plan(tmp_path, defaults={**DATA, "eval": "val", "max_changed": 2}, **shared, options={"warn": said.append})
    assert [(job.config.max_changed, job.gates.max_drop) for job in new.jobs] == [(2.0, 1.0)] * 2
    assert said == []
    old = plan(tmp_path, defaults={**DATA, "eval": "val", "max_drop": 2}, **shared, options={"warn": said.append})
    assert old == new
    (warning,) = said
    assert "sweep.yaml: 'max_drop' is the old name of 'max_changed'" in warning


@pytest.mark.parametrize("method", [*available_methods(), *attention_methods()])
def test_every_method_has_jobs(method: str, tmp_path: Path) -> None:
    found = plan(tmp_path, matrix={"model": ["m"], "method": [method], "keep": [0.5]})
    assert names(found) == [f"m-{method}-keep-0.5"]


JOBS: dict[str, list[Any]] = {
    "options": [{"alpha": 0.5}],
    "finetune": ["distill", {"objective": "supervised", "epochs": 2}],
    "target_params": ["2k"],
    "target_size": ["9MB"],
    "target_latency": ["5ms", 0.6],
    "latency_batch_size": [{"latency_batch_size": 8, "target_latency": "0.6", "keep": []}],
    "quantize": ["int8", "int4"],
    "tokens": [{"tokens": "mixed", "token_budget": 9}],
    "token_budget": [{"name": "few", "tokens": "mixed", "token_budget": 9}],
    "token_operations": [{"name": "fewer", "tokens": "merge", "token_operations": 0.6}],
    "token_levels": [{"token_levels": 3, "tokens": "mixed", "token_budget": 9}],
    "token_scorer": [{"token_scorer": "features", "tokens": "mixed", "token_budget": 9}],
    "landmarks": [{"name": "few", "landmarks": 4}, 4],
    "landmark_form": [{"landmark_form": "nystrom", "landmarks": 4}],
    "activations": [{"activations": "none", "quantize": "int8"}],
    "allocation": ["energy"],
    "compensation": ["bias"],
    "storage": ["factors"],
    "precision": ["bf16"],
    "layers": ["mlp"],
    "attention": ["eager"],
    "preprocess": ["timm"],
    "dtype": ["float16"],
    "method": ["asvd"],
    "forms": ["auto", {"forms": "bits", "method": "curvature", "keep": [], "target_size": "4MB"}],
    "bits": [{"bits": 3.5, "method": "curvature"}],
    "calibration": ["x"],
}
"""Values of the entries that take only some texts, or belong to others."""


def values_of(entry: Field[Any]) -> list[Any]:
    """Some that an entry of a job takes: all kinds that its type allows."""
    if entry.name in JOBS:
        return JOBS[entry.name]
    kinds = get_args(entry.type) if get_origin(entry.type) is UnionType else (entry.type,)
    examples: dict[Any, list[Any]] = {str: ["x"], int: [3], float: [0.5], bool: [True, False], NoneType: [None]}
    found = []
    for kind in kinds:
        (item,) = get_args(kind)[:1] if get_origin(kind) is tuple else (kind,)
        found += [[value] if item is not kind else value for value in examples[item]]
    return found


@pytest.mark.parametrize("entry", [f for f in fields(CompressConfig) if f.name not in OWN], ids=lambda f: f.name)
def test_every_entry_of_a_job_can_be_an_axis(entry: Field[Any], tmp_path: Path) -> None:
    base: dict[str, Any] = {**DATA, "model": "m", "method": "asvd", "keep": 0.5}
    for value in values_of(entry):
        if entry.name in SIZES and value is None:
            continue
        job = {key: given for key, given in base.items() if key != "keep" or entry.name not in SIZES}
        job.pop(entry.name, None)
        wanted = value if isinstance(value, dict) and (entry.name in value or "name" in value) else {entry.name: value}
        (found,) = plan(tmp_path, defaults=job, matrix={entry.name: [value]}).jobs
        asked = {key: given for key, given in wanted.items() if key != "name"}
        expected = CompressConfig.from_mapping({"cache": "results/cache", "output": "o", **job, **asked})
        assert replace(found.config, output="o", overwrite=False) == expected


def test_a_job_may_have_no_size(tmp_path: Path) -> None:
    entries = {"landmarks": [49], "model": ["m"]}
    (found,) = plan(tmp_path, matrix=entries).jobs
    assert (found.name, found.config.size) == ("landmarks-49-m", "landmarks 49")


def test_what_is_left_out_is_a_value_too(tmp_path: Path) -> None:
    found = plan(tmp_path, matrix={"model": ["m"], "keep": [0.5], "quantize": [None, "int8"]})
    assert names(found) == ["m-keep-0.5-quantize-none", "m-keep-0.5-int8"]
    assert [job.config.quantize for job in found.jobs] == [None, "int8"]


def test_a_data_recipe_that_cannot_be_read_is_a_matter_of_its_job(tmp_path: Path) -> None:
    found = plan(tmp_path, matrix={"model": ["m"], "keep": [0.5], "calibration": ["images", "no/such.yaml"]})
    assert [job.config.calibration for job in found.jobs] == ["images", "no/such.yaml"]


@pytest.mark.parametrize("model", ["m" * 5000, "nul\0byte", "~nobody/model"])
def test_a_job_that_cannot_be_looked_at_has_a_fingerprint_of_its_own(model: str, tmp_path: Path) -> None:
    job = plan(tmp_path, include=[{"name": "job", "model": "m", "keep": 0.5, "calibration": str(tmp_path)}]).jobs[0]
    strange = replace(job.config, model=model)
    first, second = fingerprints([job.config, strange]), fingerprints([job.config, strange])
    assert not set(first) & set(second), "nor has one whose data are not there"


def test_a_job_says_what_it_needs_of_a_machine(tmp_path: Path) -> None:
    matrix = {"model": ["a/vit", {"name": "big", "model": "b/vit", "resources": {"gpus": 0.5}}], "keep": [0.7, 0.5]}
    found = plan(tmp_path, matrix=matrix, resources={"cpus": 4, "memory": "2GiB"})
    assert [str(job.resources) for job in found.jobs][1:3] == [
        "4 CPU, 2.14748 GB of memory",
        "4 CPU, 0.5 GPU, 2.14748 GB of memory",
    ]
    assert plan(tmp_path, matrix=matrix).jobs[0].resources.cpus == 1


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"cpu": 1}, "unknown entry 'cpu'. Did you mean 'cpus'?"),
        ({"cpus": 0}, "cpus: 0 does not fit; give a number, above 0"),
        ({"gpus": "many"}, "gpus: 'many' does not fit; give a number, 0 or more"),
        ({"gpus": 1.5}, "gpus: 1.5 does not fit; above 1 give a whole number"),
        ({"memory": "lots"}, "memory: cannot read 'lots'"),
        (["cpus"], "resources must hold entries"),
    ],
)
def test_resources_that_make_no_sense_are_refused(entries: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        plan(tmp_path, matrix={"model": ["a/vit"], "keep": [0.5]}, resources=entries)


def test_an_output_by_url_has_its_jobs_and_its_cache_there(tmp_path: Path) -> None:
    options = {"output": "memory://bucket/nightly"}
    found = plan(tmp_path, matrix={"model": ["a/vit"], "keep": [0.5]}, options=options)
    config = found.jobs[0].config
    assert (config.output, config.cache) == (
        "memory://bucket/nightly/vit-keep-0.5/model",
        "memory://bucket/nightly/cache",
    )
