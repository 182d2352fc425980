"""``vitshrink frontier``: what it promises of sizes, and that the commands it prints build them."""

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from vitshrink.cli.app import app
from vitshrink.report import figures
from vitshrink.report.frontier import Frontier, Point, knee_of

FEW = ("--samples", "16", "--holdout", "8", "--points", "7", "--measured", "3")
Survey = Callable[..., Result]


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(figures, "available", lambda: False)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def survey(masked_lm_directory: Path, text_file: Path) -> Survey:
    """Of a tiny BERT, at few sizes."""
    return lambda *flags: run("frontier", masked_lm_directory, "--calibration", text_file, *FEW, *flags)


def document(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_losses_fall_with_the_size_and_some_are_measured(survey: Survey) -> None:
    found = document(survey("--json"))
    points = found["points"]
    sizes, predicted = ([point[name] for point in points] for name in ("target_bytes", "predicted"))
    assert len(sizes) <= 7
    assert sizes == sorted(set(sizes))
    assert predicted == sorted(predicted, reverse=True)
    measured = [point for point in points if "fidelity" in point]
    assert {points[0]["target_size"], points[-1]["target_size"]} <= {point["target_size"] for point in measured}
    assert 3 <= len(measured) <= 4 < len(points)
    losses = [point["fidelity"]["kl"] for point in measured]
    assert losses == sorted(losses, reverse=True)
    assert all(0.9 * point["target_bytes"] < point["bytes"] <= point["target_bytes"] for point in measured)
    assert (found["forms"], found["measure"], found["samples"], found["holdout"]) == ("bits", "kl", 16, 8)


def test_the_knee_is_marked_and_measured(survey: Survey) -> None:
    points = document(survey("--json"))["points"]
    number = knee_of([point["target_bytes"] for point in points], [point["predicted"] for point in points])
    assert number is not None
    assert [point["knee"] for point in points] == [index == number for index in range(len(points))]
    assert "fidelity" in points[number]


def test_the_printed_command_builds_a_model_of_the_size_and_the_loss(
    survey: Survey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    points = [point for point in document(survey("--json"))["points"] if "fidelity" in point]
    for point in (points[0], points[-1]):
        program, *words = shlex.split(point["command"])
        assert program == "vitshrink"
        built = run(*words, "--json")
        assert built.exit_code == 0, built.stderr
        (file,) = tmp_path.glob(f"*-{point['target_size']}/model.safetensors")
        assert 0.9 * point["target_bytes"] < file.stat().st_size <= point["bytes"]
        fidelity = json.loads(built.stdout)["evaluation"]["fidelity"]
        assert fidelity["kl"] == pytest.approx(point["fidelity"]["kl"], rel=1e-3)
        assert fidelity["agreement"] == point["fidelity"]["agreement"]


def test_a_table_has_a_row_and_a_command_for_every_size_that_was_built(survey: Survey) -> None:
    result = survey()
    assert result.exit_code == 0
    commands = [line for line in result.stdout.splitlines() if line.startswith("vitshrink compress ")]
    heading, *lines = result.stdout.splitlines()
    assert heading.split()[:4] == ["size", "of", "the", "source"]
    assert 3 <= len(commands) <= 4
    for line, command in zip(lines, commands, strict=False):
        size = shlex.split(command)[shlex.split(command).index("--target-size") + 1]
        assert line.startswith(f"{size[:-2]} {size[-2:]} ")
    assert sum(line.endswith(" knee") for line in lines) == 1
    assert "knee: " in result.stdout
    assert "measured on 8 held-out samples" in result.stdout


@pytest.mark.parametrize("drawn", [True, False])
def test_a_directory_gets_the_figures_with_a_picture_where_it_can_be_drawn(
    survey: Survey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: bool
) -> None:
    monkeypatch.setattr(figures, "available", lambda: drawn)
    folder = tmp_path / "new" / "sizes"
    found = document(survey("--json", "--output", folder))
    written = json.loads((folder / "frontier.json").read_text())
    assert written["points"] == found["points"]
    page = (folder / "frontier.html").read_text()
    assert all(point["command"].split(" --")[0] in page for point in found["points"] if "fidelity" in point)
    assert (folder / "frontier.svg").exists() == drawn
    assert ("<svg" in page, "needs matplotlib" in page) == (drawn, not drawn)
    if drawn:
        assert "knee: " in (folder / "frontier.svg").read_text()


def test_ranks_are_surveyed_too(survey: Survey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = document(survey("--json", "--forms", "rank", "--measured", "1"))
    assert found["forms"] == "rank"
    (point, *_) = (point for point in found["points"] if "fidelity" in point)
    built = run(*shlex.split(point["command"])[1:], "--json")
    assert built.exit_code == 0, built.stderr
    assert json.loads(built.stdout)["evaluation"]["fidelity"]["kl"] == pytest.approx(point["fidelity"]["kl"], rel=1e-3)
    (file,) = tmp_path.glob("*/model.safetensors")
    assert file.stat().st_size <= point["target_bytes"]


def test_features_are_measured_by_their_relative_error(checkpoint: Callable[[str], Path], text_file: Path) -> None:
    result = run("frontier", checkpoint("BertModel"), "--calibration", text_file, *FEW)
    assert result.exit_code == 0, result.stderr
    assert "predicted squared error  relative error" in result.stdout
    assert "same prediction" not in result.stdout


@pytest.mark.parametrize("flags", [("--measured", "0"), ("--holdout", "0")])
def test_predictions_alone_build_nothing(survey: Survey, flags: tuple[str, ...]) -> None:
    found = document(survey("--json", *flags))
    assert found["holdout"] == 0
    assert not any({"fidelity", "bytes"} & point.keys() for point in found["points"])
    shown = survey(*flags)
    assert "not measured" in shown.stdout
    assert shown.stdout.count("vitshrink compress") == len(found["points"])


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--points", "2"), 2, "--points 2: must be at least 3"),
        (("--measured", "-1"), 2, "--measured -1: must not be negative"),
        (("--forms", "ranks"), 2, "Did you mean 'rank'"),
        (("--calibration", "./nowhere"), 1, "./nowhere"),
        (("--exclude", "nothing like it"), 2, "matches none of the 12 layers"),
        (("--output", "/dev/null/below"), 1, "--output /dev/null/below"),
    ],
)
def test_a_mistake_is_one_sentence(survey: Survey, flags: tuple[str, ...], code: int, said: str) -> None:
    result = survey(*flags)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_the_knee_is_told_or_that_there_is_none() -> None:
    points = tuple(Point(f"{size}MB", size * 10**6, 8.0, 1 / size, "", knee=size == 2) for size in (1, 2, 3))
    facts = ("1", "model", "data", 16, 8, 0, "bits", "kl", 100, 400)
    found = Frontier(*facts, points, "the point that is asked for", {}, ())
    assert found.remarks.endswith("; knee: 2MB, the point that is asked for")
    without = replace(found, points=points[::2])
    assert without.remarks.endswith("; no knee (the point that is asked for)")


def test_samples_are_asked_for(vit_directory: Path) -> None:
    result = run("frontier", vit_directory)
    assert result.exit_code == 2
    assert "pass --calibration" in result.stderr


def test_compress_without_a_size_tells_how_to_find_one(vit_directory: Path, flat_images: Path) -> None:
    result = run("compress", vit_directory, "out", "--calibration", flat_images)
    assert result.exit_code == 2
    assert "choose a size with" in result.stderr
    assert f"`vitshrink frontier {vit_directory} --calibration {flat_images}`" in result.stderr
    assert "frontier" not in run("compress", vit_directory, "out", "--keep", "0.5", "--rank", "2").stderr


def test_the_knee_is_where_the_loss_stops_falling_fast() -> None:
    losses = [math.exp(-each) for each in (0, 4, 8, 9, 10)]
    assert knee_of([1, 2, 3, 4, 5], losses) == 2
    assert knee_of([1, 2, 3, 4, 5], [math.exp(-each) for each in range(5)]) is None
    assert knee_of([1, 2], [1, 0.5]) is None
    assert knee_of([1, 2, 3], [1, 0.5, 0]) is None
