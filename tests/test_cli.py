"""The command line: what it prints where, its exit codes, and that a stopped run leaves nothing behind."""

import inspect
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import typer
import yaml
from click.testing import Result
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

import vitshrink.jobs.compress as pipeline
from vitshrink import __version__
from vitshrink.cli import checks, console
from vitshrink.cli.app import app
from vitshrink.cli.compress import compress_command
from vitshrink.config.options import RENAMED, CompressConfig
from vitshrink.jobs.compress import CompressionResult
from vitshrink.methods import available_methods
from vitshrink.report import figures, report_schema

Compressed = Callable[..., CompressionResult]
CLASSIFIER = "ViTForImageClassification"


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns, whatever the terminal in which the tests run; and no figures, which take long to draw."""
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(figures, "available", lambda: False)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def shrink(vit_directory: Path, tmp_path: Path) -> Callable[..., Result]:
    """``shrink("--keep", "0.8")``: svd of the tiny ViT into ``tmp_path / "out"``, which needs no data."""

    def compress(*flags: str | Path, output: str = "out") -> Result:
        size = () if {"--keep", "--rank", "--target-params", "--target-size"} & set(flags) else ("--keep", "0.8")
        return run("compress", vit_directory, tmp_path / output, "--method", "svd", *size, *flags)

    return compress


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


# What is printed where


def test_a_job_prints_its_progress_to_stderr_and_its_result_to_stdout(
    shrink: Callable[..., Result], flat_images: Path, tmp_path: Path
) -> None:
    result = shrink("--calibration", flat_images, "--samples", "8", "--compensation", "bias", "--holdout", "8")
    assert result.exit_code == 0
    for line in ("Loading the model", "Reading calibration data (8)", "Factorizing (12)", "Evaluating (8)"):
        assert line in result.stderr.splitlines()
    assert re.search(r"^Parameters +24.0 k +19.2 k$", result.stdout, re.MULTILINE)
    assert "KL(dense" in result.stdout
    assert str(tmp_path / "out") in result.stdout
    assert "\x1b" not in result.stdout + result.stderr
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml"} <= files(tmp_path / "out")
    assert {"README.md", "report.json", "report.md", "report.html"} <= files(tmp_path / "out")


def test_json_is_all_there_is_on_stdout(shrink: Callable[..., Result], tmp_path: Path) -> None:
    result = shrink("--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads((tmp_path / "out" / "report.json").read_text())
    assert not result.stderr
    several = shrink("--json", "--keep", "0.7", "--keep", "0.6", output="several")
    assert [0.6 < report["parameters"]["kept"] <= 0.7 for report in json.loads(several.stdout)] == [True, False]


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_quiet_says_nothing_but_errors(shrink: Callable[..., Result], dry: tuple[str, ...]) -> None:
    result = shrink("--quiet", *dry)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    failed = shrink("--quiet", "--keep", "7")
    assert failed.exit_code == 2
    assert failed.stderr.startswith("error: --keep 7")


def test_a_dry_run_prints_the_plan_and_writes_nothing(shrink: Callable[..., Result], tmp_path: Path) -> None:
    result = shrink("--dry-run", output="new/out")
    assert result.exit_code == 0
    assert not list(tmp_path.iterdir())
    planned = re.findall(
        r"^(vit\.layers\.\S+) +(\d+ × \d+) +(\d+|dense) +([\d,]+) +(\d+)% +([\d.]+)$", result.stdout, re.M
    )
    assert len(planned) == 12
    as_json = json.loads(shrink("--dry-run", "--json", output="new/out").stdout)
    assert [(layer["name"], f"{layer['parameters']:,}") for layer in as_json["layers"]] == [
        (row[0], row[3]) for row in planned
    ]
    assert as_json["bytes"] == as_json["macs"] == {}


def test_the_schema_of_reports_needs_no_directory() -> None:
    shown = CliRunner().invoke(app, ["report", "--schema"])
    assert shown.exit_code == 0
    assert json.loads(shown.stdout) == report_schema()


def test_a_directory_name_is_printed_as_it_is(shrink: Callable[..., Result], tmp_path: Path) -> None:
    result = shrink(output="[bold]it's ünïcode[/bold] :smile:")
    assert str(tmp_path / "[bold]it's ünïcode[/bold] :smile:") in result.stdout


def test_nothing_is_wider_than_a_narrow_terminal(
    shrink: Callable[..., Result],
    compressed: Compressed,
    vit_directory: Path,
    learned_images: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = compressed(CLASSIFIER, method="svd").directory
    assert small is not None
    evaluation = ("eval", small, "--baseline", vit_directory, "--data", learned_images)
    commands: list[Callable[[], Result]] = [
        lambda: shrink("--dry-run", "--keep", "0.8", "--keep", "0.7"),
        lambda: run(*evaluation),
        lambda: run("inspect", vit_directory),
        lambda: run("methods"),
    ]
    for command in commands:
        monkeypatch.delenv("COLUMNS", raising=False)
        wide = command()
        monkeypatch.setenv("COLUMNS", "40")
        narrow = command()
        assert wide.exit_code == narrow.exit_code == 0
        assert max(map(len, narrow.stdout.splitlines())) <= 40
        assert "…" not in narrow.stdout + wide.stdout
        said = re.sub(r"\s", "", narrow.stdout)
        repeated = re.sub(r"Peak memory.*", "", wide.stdout)  # that of another run
        assert all(figure in said for figure in re.findall(r"[\d.,]*\d", repeated))


def test_an_error_fits_on_any_terminal_in_one_line(
    shrink: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The terminal wraps it; a line break of our own would spoil copying a path out of it."""
    monkeypatch.setenv("COLUMNS", "40")
    result = shrink("--include", "nonsense")
    assert result.exit_code == 2
    assert [line[:6] for line in result.stderr.splitlines()] == ["Loadin", "error:"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("color", [True, False])
def test_a_terminal_gets_bars_that_vanish_and_colors_unless_not_wanted(
    shrink: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, color: bool
) -> None:
    if not color:
        monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal()
    monkeypatch.setattr(console, "errors", Console(file=terminal, highlight=False, width=60))
    assert shrink().exit_code == 0
    assert "Factorizing" in terminal.getvalue()
    assert "12/12" in terminal.getvalue()
    assert "warning: the result is not evaluated" in re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.getvalue())
    assert bool(re.search(r"\x1b\[[\d;]*3\d[\d;]*m", terminal.getvalue())) == color


def test_the_time_that_is_left_follows_from_the_steps_that_are_done() -> None:
    now = 0.0
    progress = Progress(get_time=lambda: now, auto_refresh=False)
    progress.add_task("Calibrating", total=12)
    (task,) = progress.tasks
    now = 60.0
    assert str(console.TimeLeft().render(task)) == "0:01:00", "nothing is known yet"
    progress.advance(task.id, 3)
    assert str(console.TimeLeft().render(task)) == "0:03:00 left"


def test_every_flag_is_an_entry_of_a_recipe_and_the_other_way_round() -> None:
    flags = set(inspect.signature(compress_command).parameters)
    own = {"context", "config", "csv", "quiet", "as_json", "push_to_hub", "private"}
    renamed = {"eval_data": "eval", "option": "options", "finetune_option": "finetune"} | RENAMED
    assert {renamed.get(flag, flag) for flag in flags - own} == {field.name for field in fields(CompressConfig)}


GROUP: Any = typer.main.get_command(app)


@pytest.mark.parametrize("command", GROUP.commands)
def test_every_command_has_help_for_every_flag(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    said = re.sub(r"[^\w.-]", "", result.stdout)
    for parameter in GROUP.commands[command].params:
        if not parameter.hidden:
            assert parameter.help, parameter.name
            assert re.sub(r"[^\w.-]", "", parameter.help) in said, parameter.name
    assert GROUP.commands[command].help


def test_the_version_is_shown() -> None:
    assert run("--version").stdout == f"vitshrink {__version__}\n"


def test_no_command_shows_the_help_and_an_unknown_one_the_nearest() -> None:
    assert "compress" in run().output
    assert run().exit_code == 2
    assert "Did you mean" in run("compres").output


def test_methods_lists_every_method() -> None:
    result = run("methods")
    assert result.exit_code == 0
    assert set(available_methods()) <= set(re.findall(r"^\S+", result.stdout, re.MULTILINE))
    assert "  tensor: form=tucker, iterations=5, blocks=1" in result.stdout.splitlines()


# Recipes


def test_the_recipe_beside_the_weights_can_be_run_again_as_it_is(
    shrink: Callable[..., Result], flat_images: Path, tmp_path: Path
) -> None:
    flags = ("--calibration", flat_images, "--samples", "12", "--compensation", "residual", "--seed", "4")
    assert shrink(*flags, "--exclude", "q_proj", "--dtype", "float16").exit_code == 0
    out, recipe = tmp_path / "out", tmp_path / "out" / "recipe.yaml"
    first, written = weights(out), recipe.read_bytes()
    assert run("compress", "--config", recipe).exit_code == 1  # it exists
    out.rename(tmp_path / "kept")
    again = run("compress", "--config", tmp_path / "kept" / "recipe.yaml")
    assert again.exit_code == 0, again.stderr
    assert weights(out) == first
    assert recipe.read_bytes() == written


def test_a_recipe_can_be_run_over_its_own_output(shrink: Callable[..., Result], tmp_path: Path) -> None:
    assert shrink().exit_code == 0
    first = weights(tmp_path / "out")
    assert run("compress", "--config", tmp_path / "out" / "recipe.yaml", "--overwrite").exit_code == 0
    assert weights(tmp_path / "out") == first
    assert files(tmp_path) >= {"out"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_flags_go_before_a_recipe_and_a_size_replaces_another(vit_directory: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "job.yaml"
    entries = {"model": str(vit_directory), "output": str(tmp_path / "a"), "method": "svd", "keep": [0.8], "seed": 1}
    recipe.write_text(yaml.safe_dump(entries | {"layers": "mlp"}))
    result = run("compress", vit_directory, tmp_path / "b", "--config", recipe, "--rank", "5", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert {layer["rank"] for layer in report["layers"]} == {5}
    assert len(report["layers"]) == 4
    assert report["recipe"]["seed"] == 1
    assert report["recipe"]["keep"] == []
    assert not (tmp_path / "a").exists()


def test_a_dry_run_can_be_asked_for_in_a_recipe(vit_directory: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "job.yaml"
    entries = {"model": str(vit_directory), "output": str(tmp_path / "out"), "method": "svd", "keep": 0.8}
    recipe.write_text(yaml.safe_dump(entries | {"dry-run": True}))
    result = run("compress", "--config", recipe)
    assert result.exit_code == 0
    assert "vit.layers.0.attention.q_proj" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]


@pytest.mark.parametrize(
    ("content", "said"),
    [("kep: 0.5", "unknown entry 'kep'. Did you mean 'keep'"), ("[1", "not valid YAML"), ("- 1", "must hold entries")],
)
def test_a_bad_recipe_is_a_usage_error_that_names_the_file(content: str, said: str, tmp_path: Path) -> None:
    recipe = tmp_path / "job.yaml"
    recipe.write_text(content)
    result = run("compress", "m", "o", "--keep", "0.5", "--config", recipe)
    assert result.exit_code == 2
    assert said in result.stderr
    assert str(recipe) in result.stderr


# Errors and exit codes


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--keep", "1.5"), 2, "--keep 1.5"),
        (("--keep", "nan"), 2, "--keep nan"),
        (("--keep", "half"), 2, "--keep"),
        (("--keep", "0.01"), 2, "cannot reach"),
        (("--keep", "0.5", "--rank", "2"), 2, "exactly one of"),
        (("--target-size", "lots"), 2, "--target-size"),
        (("--rank", "0"), 2, "--rank 0: must be at least 1"),
        (("--method", "svdd"), 2, "Did you mean 'svd'"),
        (("--method", "whitened"), 2, "pass --calibration"),
        (("--layers", "heads"), 2, "--layers heads"),
        (("--include", "(("), 2, "not a valid regular expression"),
        (("--exclude", "nothing like it"), 2, "matches none of the 12 layers"),
        (("--option", "alpha"), 2, "write name=value"),
        (("--option", "alpha=1"), 2, "has no options"),
        (("--dtype", "int8"), 2, "--dtype int8"),
        (("--device", "gpu"), 2, "--device gpu"),
        (("--config", "nowhere.yaml"), 2, "nowhere.yaml"),
        (("--kep", "0.5"), 2, "--kep"),
        (("--calibration", "./nowhere"), 1, "./nowhere"),
        (("--eval", "./nowhere"), 1, "./nowhere"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    shrink: Callable[..., Result], tmp_path: Path, flags: tuple[str, ...], code: int, said: str
) -> None:
    result = shrink(*flags)
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert not result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["model", "output"])
def test_a_forgotten_argument_is_named(missing: str) -> None:
    result = run("compress", *(["./a"] if missing == "output" else []), "--keep", "0.5")
    assert result.exit_code == 2
    assert f"'{missing}'" in result.stderr


def _truncate(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def _gpt2(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_truncate, "model.safetensors is not a readable safetensors file"),
        (_gpt2, "GPT2LMHeadModel (model type 'gpt2') is not supported: it is a decoder"),
        (lambda model: (model / "config.json").write_text("{"), "config.json"),
        (lambda model: (model / "config.json").unlink(), "has no config.json"),
        (shutil.rmtree, "model"),
    ],
    ids=["truncated", "unsupported", "config not JSON", "no config", "nothing there"],
)
@pytest.mark.parametrize("command", ["compress", "inspect", "eval"])
def test_a_model_that_cannot_be_used_is_an_error_without_a_traceback(
    command: str, damage: Callable[[Path], Any], said: str, tmp_path: Path, flat_images: Path
) -> None:
    model = tiny.write(CLASSIFIER, tmp_path / "model")
    damage(model)
    rest = {"compress": [tmp_path / "out", "--keep", "0.8", "--method", "svd"], "eval": ["--data", flat_images]}
    result = run(command, model, *rest.get(command, []))
    assert result.exit_code == 1
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert {path.name for path in tmp_path.iterdir()} <= {"model"}
    debugged = run("--debug", command, model, *rest.get(command, []))
    assert debugged.exit_code == 1
    assert "Traceback" in debugged.stderr
    assert said in debugged.stderr


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (RuntimeError("a bug"), 1, "unexpected RuntimeError: a bug. This is a bug in vitshrink"),
        (MemoryError(), 1, "out of memory: lower --batch-size or --samples"),
        (torch.OutOfMemoryError("2 GiB"), 1, "out of memory: lower --batch-size or --samples. 2 GiB"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
        (console.Terminated(), 143, "terminated; nothing was written"),
    ],
)
def test_whatever_happens_ends_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, said: str
) -> None:
    def fail(*_: Any) -> None:
        raise raised

    monkeypatch.setattr(checks, "check_models", lambda _job: None)
    monkeypatch.setattr(pipeline, "compress", fail)
    result = run("compress", "a", "b", "--keep", "0.5")
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_an_output_that_exists_is_kept_unless_it_may_be_replaced(shrink: Callable[..., Result], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert shrink().exit_code == 0
    first = weights(out)
    refused = shrink("--keep", "0.7")
    assert refused.exit_code == 1
    assert "pass --overwrite" in refused.stderr
    assert weights(out) == first
    failed = shrink("--keep", "0.7", "--overwrite", "--eval", "./nowhere")
    assert failed.exit_code == 1
    assert weights(out) == first
    (out / "stale").touch()
    assert shrink("--keep", "0.7", "--overwrite").exit_code == 0
    assert len(weights(out)) < len(first)
    assert not (out / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_vitshrink_did_not_write_is_never_replaced(shrink: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("more of it")
    for output in ("out", "file"):
        result = shrink("--overwrite", output=output)
        assert result.exit_code == 1
        assert "choose another output" in result.stderr
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "more of it"


# Other commands


def test_inspect_lists_every_layer_with_and_without_data(vit_directory: Path, flat_images: Path) -> None:
    plain = run("inspect", vit_directory, "--layers", "mlp")
    assert plain.exit_code == 0
    assert len(re.findall(r"^vit\.layers", plain.stdout, re.MULTILINE)) == 4
    assert "fraction of the plain squared spectrum" in plain.stdout
    weighted = run("inspect", vit_directory, "--calibration", flat_images, "--samples", "8", "--json")
    layers = json.loads(weighted.stdout)
    assert len(layers) == 12
    assert all(0 < energy <= 1 for layer in layers for energy in layer["energy"].values())
    assert all(1 <= layer["effective_rank"] <= min(layer["shape"]) for layer in layers)


@pytest.mark.parametrize("flags", [("--layers", "foo"), ("--samples", "0"), ("--include", "zzz"), ("--device", "gpu")])
def test_inspect_refuses_what_makes_no_sense(vit_directory: Path, flags: tuple[str, ...]) -> None:
    result = run("inspect", vit_directory, *flags)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.fixture
def published(compressed: Compressed, tmp_path: Path) -> list[Path]:
    """Two results in directories of their own, whose model cards somebody has edited."""
    copies = []
    for method in ("svd", "whitened"):
        directory = compressed(CLASSIFIER, method=method).directory
        assert directory is not None
        copies.append(Path(shutil.copytree(directory, tmp_path / method)))
        (copies[-1] / "README.md").write_text("mine")
    return copies


def contents(*directories: Path) -> dict[Path, tuple[bytes, int]]:
    found = [path for directory in directories for path in directory.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


@pytest.mark.parametrize("page", [True, False])
def test_a_comparison_changes_nothing_in_what_it_compares(published: list[Path], tmp_path: Path, page: bool) -> None:
    (published[0] / "report.md").unlink()
    (published[1] / "report.md").write_text("mine as well")
    before = contents(*published)
    result = run("report", *published, *(("--html", tmp_path / "both.html") if page else ()))
    assert result.exit_code == 0
    assert [line.split("|")[2].strip().split(",")[0] for line in result.stdout.splitlines()[2:]] == ["svd", "whitened"]
    assert contents(*published) == before
    assert not page or "whitened" in (tmp_path / "both.html").read_text()
    assert run("report", published[0], "--html", tmp_path / "one.html").exit_code == 0
    assert contents(*published) == before


def test_a_report_is_rendered_again_beside_a_card_that_stays(published: list[Path]) -> None:
    directory = published[0]
    before = contents(directory)
    (directory / "report.md").unlink()
    (directory / "report.html").write_text("old")
    assert run("report", directory).exit_code == 0
    after = contents(directory)
    assert {path.name for path in before if after[path] != before[path]} == {"report.md", "report.html"}
    assert before[directory / "report.md"][0] == after[directory / "report.md"][0]
    (directory / "README.md").unlink()
    assert run("report", directory).exit_code == 0
    assert "compressed with vitshrink" in (directory / "README.md").read_text()
    assert run("verify", directory).exit_code == 0


@pytest.mark.parametrize(
    ("page", "said"),
    [("no/such/page.html", "there is no folder"), (".", "Is a directory"), ("/dev/full", "No space left on device")],
)
def test_a_page_that_cannot_be_written_is_an_error_that_says_why(
    published: list[Path], tmp_path: Path, page: str, said: str
) -> None:
    result = run("report", *published, "--html", tmp_path / page)
    assert result.exit_code == 1
    assert re.match(r"error: cannot write .*\.\n", result.stderr)
    assert said in result.stderr


def test_a_page_does_not_take_the_place_of_a_device_or_a_link(published: list[Path], tmp_path: Path) -> None:
    (tmp_path / "link.html").symlink_to(tmp_path / "page.html")
    assert run("report", *published, "--html", tmp_path / "link.html").exit_code == 0
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "page.html").is_file()
    (tmp_path / "null").symlink_to("/dev/null")
    assert run("report", *published, "--html", tmp_path / "null").exit_code == 0
    assert Path("/dev/null").is_char_device()


def test_a_report_of_nothing_is_an_error(tmp_path: Path) -> None:
    missing = run("report", tmp_path / "nowhere")
    assert missing.exit_code == 1
    assert "nowhere" in missing.stderr


# Real processes


def start(tmp_path: Path, stop_at: str, *arguments: str | Path) -> "subprocess.Popen[str]":
    """The command in a process of its own that says "here" and waits at a step of the job."""
    script = f"""
import signal, sys, time, vitshrink.jobs.result as result
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
def wait(*_, **__):
    print("here", flush=True)
    time.sleep(60)
result.{stop_at} = wait
from vitshrink.cli import main
main()
"""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )


@pytest.mark.slow
def test_an_interrupted_or_terminated_run_leaves_nothing(vit_directory: Path, tmp_path: Path) -> None:
    """While the weights lie in the staging directory, for one; before anything was written, for the other."""
    flags = ("--keep", "0.8", "--method", "svd")
    runs = [
        (start(tmp_path, "verify", "compress", vit_directory, "a/out", *flags), signal.SIGINT, 130, "interrupted"),
        (start(tmp_path, "verify", "compress", vit_directory, "b/out", *flags), signal.SIGTERM, 143, "terminated"),
    ]
    for process, number, code, said in runs:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        assert list(tmp_path.glob("*/.out.vitshrink-*/model.safetensors"))
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == code
        assert stderr.splitlines()[-1] == f"error: {said}; nothing was written."
        assert "Traceback" not in stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_work_leaves_no_traceback(number: signal.Signals) -> None:
    """When the interpreter ends it calls much that knows of no signal."""
    script = f"""
import atexit, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(os.kill, os.getpid(), {int(number)})
from vitshrink.cli import main
main()
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.run(
        [sys.executable, "-c", script, "methods"], capture_output=True, text=True, env=environment, check=False
    )
    assert (process.returncode, process.stderr) == (-number, "")
    assert "curvature" in process.stdout


def test_a_real_process_keeps_json_pure_where_color_is_forced(vit_directory: Path, tmp_path: Path) -> None:
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "vitshrink",
            "compress",
            vit_directory,
            "out",
            "--keep",
            "0.8",
            "--method",
            "svd",
            "--json",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": str(Path(__file__).parents[1]), "FORCE_COLOR": "1", "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["method"] == "svd"
    assert "\x1b" not in process.stdout + process.stderr
