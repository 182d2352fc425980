"""The demo: the reload check and the table; the whole of it in a short form."""

from pathlib import Path

import pytest

from vitshrink.errors import OutputError
from vitshrink.jobs import demo
from vitshrink.jobs.digits import train_digits_model, write_digits


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder / "val"


@pytest.fixture(scope="module")
def model(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has hardly learned anything."""
    output = tmp_path_factory.mktemp("model")
    train_digits_model(images, output, epochs=1)
    return output


@pytest.mark.slow
def test_an_accuracy_that_the_fresh_process_does_not_find_is_an_error(
    images: Path, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match=f"report says {demo.HELD_OUT + 1}"):
        demo.check_reload(tmp_path / "reload.py", images, {model: demo.HELD_OUT + 1})


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_reloaded_is_an_error(images: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputError, match="exit code 1"):
        demo.check_reload(tmp_path / "reload.py", images, {tmp_path / "empty": 1})


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="choose another"):
        demo.run_demo(tmp_path, lambda _: None)
    assert (tmp_path / "model" / "thesis.txt").read_text() == "years of work"


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        demo.run_demo(tmp_path / "out", lambda _: None)


@pytest.mark.slow
def test_the_whole_demo_replaces_an_earlier_one(tmp_path: Path) -> None:
    """A short training: what is compared is poor, but everything that the long one does is done."""
    output = tmp_path / "demo output"
    (output / "compressed" / "svd").mkdir(parents=True)
    (output / demo.MARKER).touch()
    lines: list[str] = []
    result = demo.run_demo(output, lines.append, epochs=2, methods=("svd", "whitened"))
    reports = list(result.reports.values())
    assert {report.method for report in reports} == {"svd", "whitened"}
    assert all(report.parameters.kept <= demo.KEEP for report in reports)
    correct = [report.evaluation.compressed.correct for report in reports if report.evaluation]
    assert correct == sorted(correct, reverse=True)

    compared, left_out = next(line for line in lines if line.startswith("Comparing")).split("; not part of the demo: ")
    assert compared == "Comparing the methods svd, whitened"
    assert left_out == "asvd, cholesky, curvature, heads-joint, mixed-rank, pca, qk-joint, tensor, vo-joint."
    assert str(result.comparison) in lines[-1]
    table = [line for line in lines[-1].splitlines() if line.startswith("|")]
    assert len(table) == 5
    assert len({len(line) for line in table}) == 1
    page = result.comparison.read_text(encoding="utf-8")
    assert all(line in page for line in table)
    assert page.count("report.md") == 2
    for directory in result.reports:
        assert (directory / "report.md").is_file()
        assert (directory / "report.json").is_file()


def test_a_warning_reaches_the_reader() -> None:
    lines: list[str] = []
    watcher = demo.WarningsOnly(lines.append)
    with watcher.stage("Calibrating", 3) as advance:
        advance(1)
        watcher.warn("block 3 stays dense")
    assert lines == ["  warning: block 3 stays dense"]
