"""A job's configuration: refused where it makes no sense, the same after a detour through YAML or a command line."""

import shlex
from pathlib import Path
from typing import Any, NoReturn

import click.testing
import pytest
import typer
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import vitshrink.jobs.compress as pipeline
from vitshrink.cli import checks
from vitshrink.cli.app import app
from vitshrink.config.fields import Options, entries_of, names_of
from vitshrink.config.frontier import FrontierJob
from vitshrink.config.job import JobOptions
from vitshrink.config.options import (
    CompressConfig,
    EvalJob,
    ExportJob,
    FinetuneConfig,
    FinetuneJob,
    InspectJob,
    parse_option,
    parse_quantity,
    read_recipe,
    share_of,
)
from vitshrink.config.quantize import QuantizeJob
from vitshrink.config.size import SizeOptions
from vitshrink.errors import UsageError


def config(**entries: Any) -> CompressConfig:
    sizes = {"keep", "target_params", "target_size", "rank"}
    return CompressConfig(
        **({"model": "m", "output": "o"} | ({} if sizes & entries.keys() else {"keep": (0.5,)}) | entries)
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("22M", 22_000_000),
        ("90MB", 90_000_000),
        ("1.5 GiB", 3 * 2**29),
        ("12kb", 12_000),
        ("64KiB", 65_536),
        ("123456", 123_456),
        (" 0.5m ", 500_000),
        ("1.005k", 1005),
        ("8.2MB", 8_200_000),
        ("0.29 G", 290_000_000),
    ],
)
def test_quantities_are_read_with_their_unit(text: str, expected: int) -> None:
    assert parse_quantity(text, "--target-size") == expected


@pytest.mark.parametrize("text", ["", "22X", "M", "-5M", "0", "0MB", "0.0001k", "1e6", "12 12", "nan", "inf"])
def test_a_quantity_that_cannot_be_read_names_the_flag(text: str) -> None:
    with pytest.raises(UsageError, match="--target-params"):
        parse_quantity(text, "--target-params")


def test_a_share_is_taken_as_it_is_written() -> None:
    assert [share_of(share, 100) for share in (0.29, 0.57, 0.58, 0.999)] == [29, 57, 58, 99]


@pytest.mark.parametrize("keep", [0.0, 1.0, -0.5, 1.5, float("nan"), float("inf")])
def test_a_fraction_outside_of_zero_and_one_is_refused(keep: float) -> None:
    with pytest.raises(UsageError, match=r"--keep .*above 0 and below 1"):
        config(keep=(keep,))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"keep": ()}, "none was"),
        ({"keep": (0.5,), "rank": 3}, "--keep and --rank were given"),
        ({"target_params": "1M", "target_size": "1MB"}, "--target-params and --target-size were given"),
    ],
)
def test_exactly_one_size_is_needed(sizes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        config(**sizes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 0),
        ("rank", -1),
        ("rank_multiple", 0),
        ("samples", 0),
        ("batch_size", 0),
        ("eval_limit", 0),
        ("max_length", 0),
        ("holdout", -1),
        ("max_bad_samples", -1),
    ],
)
def test_a_number_out_of_range_names_its_flag(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} {value}: must"):
        config(**{name: value})


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"dtype": "fp16"}, "--dtype fp16.*float16"),
        ({"layers": "atention"}, "--layers atention.*Did you mean 'attention'"),
        ({"keep": (0.5, 0.6, 0.5)}, "twice"),
        ({"target_size": "9 bananas"}, "--target-size.*9 bananas"),
        (
            {"keep": (), "rank": 3, "rank_multiple": 8},
            "--rank 3 is not a multiple of --rank-multiple 8: use --rank 8",
        ),
        ({"keep": (), "rank": 20, "rank_multiple": 8}, "--rank 20 is not a multiple .*: use --rank 16 or --rank 24"),
    ],
)
def test_a_choice_that_does_not_exist_is_told_from_those_that_do(entries: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        config(**entries)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"keep": 10**400}, "keep: 1000.* does not fit; expected a number"),
        ({"kep": 0.5}, "unknown entry 'kep'. Did you mean 'keep'"),
        ({"keep": "half"}, "keep: 'half' does not fit; expected a number"),
        ({"keep": 0.5, "samples": 1.5}, "samples: 1.5 does not fit; expected a whole number"),
        ({"keep": 0.5, "samples": True}, "samples: True does not fit"),
        ({"keep": 0.5, "offline": "maybe"}, "offline: 'maybe' does not fit; expected true or false"),
        ({"keep": 0.5, "calibration": ["a"]}, "calibration: .* expected text"),
        ({"keep": 0.5, "options": "alpha"}, "options: 'alpha' does not fit"),
        ({"keep": 0.5, "method": None}, "method: None does not fit"),
    ],
)
def test_an_entry_of_a_recipe_that_does_not_fit_is_named(entries: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=f"r.yaml: {said}"):
        CompressConfig.from_mapping({"model": "m", "output": "o"} | entries, "r.yaml")


@pytest.mark.parametrize("missing", ["model", "output"])
def test_a_missing_model_or_output_is_named(missing: str) -> None:
    entries = {"model": "m", "output": "o", "keep": 0.5}
    entries.pop(missing)
    with pytest.raises(UsageError, match=f"'{missing}'.*is missing"):
        CompressConfig.from_mapping(entries)


def test_a_recipe_may_be_written_as_people_write_yaml() -> None:
    text = "model: m\noutput: 7\nkeep: 0.5\ninclude: attention\ntarget-params:\nsamples: 3\noptions: {alpha: 1}"
    found = CompressConfig.from_mapping(yaml.safe_load(text))
    assert found == config(output="7", include=("attention",), samples=3, options={"alpha": 1})


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("precision: no", "precision", "no"),
        ("finetune: {precision: no, epochs: 1e1}", "finetune", FinetuneConfig(precision="no", epochs=10.0)),
        ("calibration_split: on", "calibration_split", "on"),
        ("label_column: y", "label_column", "y"),
        ("text_column: 12:30", "text_column", "12:30"),
        ("calibration: 2024-01-02", "calibration", "2024-01-02"),
        ("calibration: 007", "calibration", "007"),
        ("calibration: 0x10", "calibration", "0x10"),
        ("calibration: 1_000", "calibration", "1_000"),
        ("calibration: 1.10", "calibration", "1.10"),
        ("calibration: 1e5", "calibration", "1e5"),
        ("calibration: 'null'", "calibration", "null"),
        ("calibration: null", "calibration", None),
        ("seed: 0x10", "seed", 16),
        ("samples: 1e2", "samples", 100),
        ("save_every: 1e2", "save_every", 100.0),
        ("offline: yes", "offline", True),
        ("thumbnails: off", "thumbnails", False),
        ("options: {alpha: 1e-1, name: no}", "options", {"alpha": 0.1, "name": "no"}),
    ],
)
def test_a_recipe_says_what_is_written_there(line: str, name: str, value: Any, tmp_path: Path) -> None:
    """Not what an old version of YAML makes of it."""
    file = tmp_path / "job.yaml"
    file.write_text(f"model: m\noutput: o\nkeep: 0.5\n{line}\n")
    found = CompressConfig.from_mapping(read_recipe(file))
    assert getattr(found, name) == value
    assert type(getattr(found, name)) is type(value)
    file.write_text(found.to_yaml())
    assert CompressConfig.from_mapping(read_recipe(file)) == found
    assert CompressConfig.from_mapping(yaml.safe_load(found.to_yaml())) == found, "an older version reads the same"


def test_an_option_of_training_is_text_where_text_is_wanted() -> None:
    words = ["compress", "m", "o", "--keep", "0.5", "--finetune", "distill"]
    for option in ("data=1.10", "split=1e5", "precision=no", "augment=off", "epochs=1e1"):
        words += ["--finetune-option", option]
    (found,), _ = job_of(words)
    assert found.finetune == FinetuneConfig(data="1.10", split="1e5", precision="no", augment=False, epochs=10.0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- a\n- b", "must hold entries"),
        ("keep: 0.5\nkeep: 0.7", "'keep' is given twice"),
        ("keep: !!timestamp 2024-13-45", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("", "must hold entries"),
        ("a: [", "not valid YAML"),
        (b"\xff\xfe\x00", "cannot"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named(content: str | bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=said) as caught:
        read_recipe(file)
    assert str(file) in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml"):
        read_recipe(tmp_path / "nowhere.yaml")


words = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=12)
plain = words.filter(lambda text: not text.startswith("-") and text.strip())
fractions = st.floats(0, 1, exclude_min=True, exclude_max=True, width=64)
jobs = st.builds(
    config,
    model=plain,
    output=plain,
    keep=st.lists(fractions, min_size=1, max_size=3, unique=True).map(tuple),
    calibration=st.none() | plain,
    include=st.lists(plain, max_size=2).map(tuple),
    samples=st.integers(1, 10**6),
    max_bad_samples=st.none() | st.integers(0, 5),
    seed=st.integers(0, 2**40),
    offline=st.booleans(),
    overwrite=st.booleans(),
    dtype=st.none() | st.sampled_from(["float32", "float16", "bfloat16"]),
    options=st.dictionaries(
        st.from_regex("[a-z]{1,5}", fullmatch=True),
        st.integers() | fractions | st.booleans() | st.sampled_from(["abs-max", "1", "null", '"x"', "a=b"]),
        max_size=2,
    ),
)


@given(jobs)
def test_a_recipe_written_and_read_is_the_same_job(job: CompressConfig) -> None:
    assert CompressConfig.from_mapping(yaml.safe_load(job.to_yaml())) == job


PROGRAM = typer.main.get_command(app)  # made once, and not for every job


@settings(deadline=None)
@given(jobs)
def test_the_command_line_of_a_job_asks_for_the_same_job(job: CompressConfig) -> None:
    seen: list[CompressConfig] = []

    def take(wanted: CompressConfig, _observer: object) -> list[Any]:
        seen.append(wanted)
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "compress", take)
        for early in ("check_methods", "check_models"):  # neither is there
            patch.setattr(checks, early, lambda _job: None)
        result = click.testing.CliRunner().invoke(PROGRAM, [*shlex.split(job.command())[1:], "--quiet"])
    assert result.exit_code == 0, result.stderr
    assert seen == [job]


@pytest.mark.parametrize(("text", "value"), [("0.3", 0.3), ("abs-max", "abs-max"), ("true", True), ('"1"', "1")])
def test_an_option_is_json_where_it_can_be(text: str, value: Any) -> None:
    assert parse_option(text) == value


def test_gradients_of_samples_are_not_taken_in_fp16() -> None:
    with pytest.raises(UsageError, match=r"--precision fp16: .* range of float32"):
        CompressConfig("model", "out", keep=(0.5,), precision="fp16")
    assert CompressConfig("model", "out", keep=(0.5,), precision="bf16").precision == "bf16"


# Old names


def job_of(words: list[str]) -> tuple[list[CompressConfig], str]:
    """The jobs that a command line asks for, and what it says on stderr."""
    seen: list[CompressConfig] = []

    def take(wanted: CompressConfig, _observer: object) -> NoReturn:
        seen.append(wanted)
        raise typer.Exit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "compress", take)
        for early in ("check_methods", "check_models"):  # neither is there
            patch.setattr(checks, early, lambda _job: None)
        result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    return seen, result.stderr


def test_the_old_name_of_a_bound_works_and_warns(tmp_path: Path) -> None:
    words = ["compress", "m", "o", "--calibration", "c"]
    (new,), silent = job_of([*words, "--max-changed", "2"])
    assert (new.max_changed, silent) == (2.0, "")
    (old,), said = job_of([*words, "--max-drop", "2"])
    assert old == new
    assert "warning: the command line: 'max_drop' is the old name of 'max_changed'" in said
    recipe = tmp_path / "old.yaml"
    recipe.write_text("model: m\noutput: o\ncalibration: c\nmax-drop: 2")
    (read,), said = job_of(["compress", "--config", str(recipe)])
    assert read == new
    assert "old.yaml: 'max-drop' is the old name of 'max_changed'" in said
    with pytest.warns(FutureWarning, match="'max-drop' is the old name of 'max_changed'"):
        assert CompressConfig.from_mapping(yaml.safe_load(recipe.read_text())) == new
    shown = CliRunner().invoke(app, ["compress", "--help"], env={"COLUMNS": "200"}).stdout
    assert "--max-changed" in shown
    assert "--max-drop" not in shown


def test_the_recipe_of_an_old_result_loads_without_a_word(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\noutput: o\nkeep: [0.5]\nmax_drop: null\nmax_kl: null")
    (found,), said = job_of(["compress", "--config", str(recipe)])
    assert (found, said) == (CompressConfig("m", "o", keep=(0.5,)), "")


def test_another_size_replaces_that_of_a_recipe_by_its_old_name_too(tmp_path: Path) -> None:
    recipe = tmp_path / "old.yaml"
    recipe.write_text("model: m\noutput: o\ncalibration: c\nmax_drop: 2")
    (found,), _ = job_of(["compress", "--config", str(recipe), "--keep", "0.5"])
    assert (found.max_changed, found.keep) == (None, (0.5,))


def test_an_entry_under_both_of_its_names_is_refused() -> None:
    entries = {"model": "m", "output": "o", "calibration": "c", "max_drop": 1, "max_changed": 2}
    with pytest.raises(UsageError, match=r"r\.yaml: 'max_drop' is the old name of 'max_changed', which is also given"):
        CompressConfig.from_mapping(entries, "r.yaml")


# Groups


UNSORTED = ("objective", "teacher", "finetune")
"""Options that come first, under no heading."""

PATHS: dict[str, Any] = {"model": "m", "output": "o"}

JOBS = (CompressConfig, EvalJob, ExportJob, FinetuneConfig, FinetuneJob, FrontierJob, InspectJob, QuantizeJob)


@pytest.mark.parametrize("job", JOBS)
def test_every_option_says_what_it_is_for(job: type[Options]) -> None:
    for entry in entries_of(job):
        assert entry.option.help or entry.option.inlined, entry.name
        assert entry.option.panel or entry.option.positional or len(entries_of(job)) < 10 or entry.name in UNSORTED


def test_a_function_may_ask_for_one_group() -> None:
    def asked(size: SizeOptions) -> list[str]:
        return size.sizes

    assert asked(config(rank=3)) == ["--rank"]
    assert asked(SizeOptions(keep=(0.5,))) == ["--keep"]


def test_what_makes_no_difference_to_a_result_is_said_at_the_option() -> None:
    nothing = names_of(CompressConfig, lambda option: option.changes == "nothing")
    report = names_of(CompressConfig, lambda option: option.changes == "report")
    assert set(nothing) == {"output", "cache", "offline", "overwrite", "dry_run", "save_every"}
    evaluation = {entry.name for entry in entries_of(CompressConfig) if entry.name.startswith("eval")}
    assert set(report) == {"workers", "latency", "thumbnails"} | evaluation


@pytest.mark.parametrize(
    ("job", "entries", "said"),
    [
        (
            QuantizeJob,
            {"model": "m", "output": "o", "weights": "int3"},
            "cannot be stored as 'int3'. Did you mean 'int8'",
        ),
        (QuantizeJob, {"model": "m", "output": "o", "batch_size": 0}, "--batch-size 0: must be at least 1"),
        (EvalJob, {"model": "m"}, "'data', the samples, is missing"),
        (EvalJob, {"model": "m", "data": "d", "preprocess": "tim"}, "--preprocess tim: unknown. Did you mean 'timm'"),
        (InspectJob, {"model": "m", "max_bad_samples": -1}, "--max-bad-samples -1: must not be negative"),
        (
            ExportJob,
            {"model": "m", "output": "o", "to": "onnx", "tolerance": 0},
            "--tolerance 0.0: give a positive number",
        ),
    ],
)
def test_every_job_is_checked_like_a_compression(job: type[JobOptions], entries: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        job.from_mapping(entries)


def test_columns_of_a_rounding_by_data_are_those_of_both_sets() -> None:
    entries = {"model": "m", "output": "o", "calibration": "c", "bits": 4.0, "text_column": "t", "label_column": "l"}
    found = QuantizeJob(**entries).compression()
    assert (found.text_column, found.eval_text_column, found.eval_label_column) == ("t", "t", "l")
    assert found.label_column is None, "calibration data need none"
    other = QuantizeJob(**entries | {"eval_text_column": "e", "max_accuracy_drop": 1.0, "bits": None}).compression()
    assert (other.text_column, other.eval_text_column, other.label_column) == ("t", "e", "l")
    assert other.stores == "bits"
