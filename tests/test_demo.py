"""The demo: the reload check and the table; the whole of it in a short form."""

import re
from pathlib import Path

import pytest

from vitshrink.errors import OutputError
from vitshrink.jobs import demo, demo_parts
from vitshrink.jobs.demo_reload import check_reload
from vitshrink.jobs.digits import HELD_OUT, train_digits_model, write_digits
from vitshrink.methods import attention_methods, available_methods


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
    with pytest.raises(OutputError, match=f"report says {HELD_OUT + 1}"):
        check_reload(tmp_path / "reload.py", images, {model: HELD_OUT + 1})


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_reloaded_is_an_error(images: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputError, match="exit code 1"):
        check_reload(tmp_path / "reload.py", images, {tmp_path / "empty": 1})


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
    kinds = [report.kind for report in reports]
    assert [kind for kind in kinds if "bits" not in kind][:6] == ["int8", "int4", "svd", "whitened", "narrow", "narrow"]
    assert [report.bytes.compressed <= size for report, size in zip(reports, (100e3, 60e3), strict=False)] == [
        True,
        True,
    ]
    by_rank = [report for report in reports if report.kind in ("svd", "whitened")]
    assert all(report.parameters.kept <= demo_parts.KEEP for report in by_rank)
    assert all(report.latency_ratio for report in reports)

    (shown,) = (line for line in lines if "| vitshrink" in line)
    table = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(table) == 3 + len(reports)
    assert len({len(line) for line in table}) == 1
    markdown = result.comparison.read_text(encoding="utf-8")
    assert all(line in markdown for line in table)
    assert markdown.count("report.html") == len(reports)
    for directory in result.reports:
        assert (directory / "report.html").is_file()
        assert (directory / "report.json").is_file()
    page = result.comparison.with_suffix(".html").read_text(encoding="utf-8")
    assert "time of a batch of 64" in page


@pytest.mark.parametrize("runtime", [None, "onnxruntime"])
def test_every_kind_is_done_or_said_to_be_left_out(runtime: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_parts, "static_runtime", lambda: runtime)
    done, missing = [str(part) for part in demo_parts.parts(("svd",))], demo_parts.left_out(("svd",))
    assert all(": " in reason for reason in missing)
    said = " ".join([*done, *missing])
    for method in {*available_methods(), *attention_methods()}:
        assert re.search(rf"(--method|,) {method}\b", said), method
    kinds = ("--target-size", "--weights int4", "--weights int8", "--activations static", "--forms narrow")
    for kind in (*kinds, "--tokens merge", "--tokens mixed", "--landmarks", "--target-latency", "--finetune"):
        assert kind.removeprefix("--activations ") in said, kind
    assert any("static" in part for part in done) == (runtime is not None)


def test_a_warning_reaches_the_reader() -> None:
    lines: list[str] = []
    watcher = demo.WarningsOnly(lines.append)
    with watcher.stage("Calibrating", 3) as advance:
        advance(1)
        watcher.warn("block 3 stays dense")
    assert lines == ["  warning: block 3 stays dense"]
