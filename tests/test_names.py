"""Names of files, folders and classes that are no UTF-8 or hold what a terminal, a page or a table would obey."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tiny
import yaml
from click.testing import Result
from typer.testing import CliRunner

from vitshrink.cli.app import app
from vitshrink.config.names import quoted, shown, shown_text
from vitshrink.config.options import CompressConfig
from vitshrink.jobs.sweep.junit import junit_xml
from vitshrink.jobs.sweep.outcome import Status
from vitshrink.report import figures

LATIN = "caf\udce9"
"""``caf\\xe9`` in Latin-1, as Python reads it from a disk."""

HOSTILE = ("\x1b[31mred", "[red]x", "<b>&", "a|b", "new\nline", "q\"'q", "-dash", "e\U0001f600", "tail\\", "n" * 240)

SMALL = ("--keep", "0.8", "--method", "svd")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "available", lambda: False)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def terminal(result: Result) -> str:
    """What a terminal would get, which obeys nothing in it."""
    text = result.stdout + result.stderr
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", text)
    return text


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of all these names, and a broken one."""
    folder = tiny.write_images(tmp_path / "photos", len(HOSTILE) + 2)
    for file, name in zip(sorted(folder.iterdir()), (LATIN, *HOSTILE), strict=False):
        file.rename(folder / f"{name}.png")
    (folder / f"broken_{LATIN}\x1b[1m[red]<b>|.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("caf\udce9", "caf\\xe9"),
        ("caf\udcc3\udca9", "café"),  # in a locale that is not UTF-8
        ("\ud83d", "\\ud83d"),  # half of an emoji
        ("a\nb\tc\r\x1b[0m\x7f\x9b", "a\\nb\\tc\\r\\x1b[0m\\x7f\\x9b"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("ünïcode 👨‍👩‍👧 [red] <b>", "ünïcode 👨‍👩‍👧 [red] <b>"),
    ],
)
def test_what_is_no_plain_text_is_shown_escaped(name: str, said: str) -> None:
    assert shown(name) == said
    assert shown(said) == said
    assert shown_text("one\n\ttwo\udcff") == "one\n\ttwo\\xff"


@pytest.mark.parametrize("name", [LATIN, *HOSTILE, "caf\udcc3\udca9", "o'\udce9\\n"])
def test_a_command_can_be_copied_into_a_shell(name: str) -> None:
    assert "compress ./-m ./-o " in CompressConfig("-m", "-o", keep=(0.5,)).command()
    words = CompressConfig("m", "o", keep=(0.5,), calibration=name).command()
    assert shown(words) == words
    printed = subprocess.run(["bash", "-c", f"printf %s {quoted(name)}"], capture_output=True, check=True).stdout
    assert printed == os.fsencode(name)


def test_a_job_works_on_images_of_any_name_and_shows_them_escaped(
    vit_directory: Path, photos: Path, tmp_path: Path
) -> None:
    data = photos.rename(tmp_path / f"photos_{LATIN}")
    output = tmp_path / "out"
    table = tmp_path / f"{LATIN}.csv"
    flags = ("--calibration", data, "--samples", "4", "--holdout", "16", "--thumbnails", "--csv", table)
    result = run("compress", vit_directory, output, *SMALL, *flags)
    assert result.exit_code == 0, result.stderr
    assert "broken_caf\\xe9\\x1b[1m[red]<b>|.png is not an image" in terminal(result)
    for name in ("report.json", "report.md", "report.html", "README.md"):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", (output / name).read_text(encoding="utf-8"))
    report = json.loads((output / "report.json").read_text())
    assert report["evaluation"]["source"].endswith("photos_caf\\xe9")
    keys = {entry["sample"] for entry in report["evaluation"]["disagreements"]}
    assert keys <= {shown(name) for name in os.listdir(data)}
    assert "<b>&.png" not in (output / "report.html").read_text()
    with table.open(newline="") as file:
        assert next(csv.DictReader(file))["data"].endswith("photos_caf\\xe9")
    assert run("eval", vit_directory, "--data", data, "--baseline", output, "--json").exit_code == 0
    assert run("report", output, "--html", tmp_path / f"{LATIN}.html").exit_code == 0


def test_a_recipe_leads_back_to_data_that_is_not_utf8(vit_directory: Path, photos: Path, tmp_path: Path) -> None:
    data = photos.rename(tmp_path / f"photos_{LATIN}")
    assert run("compress", vit_directory, tmp_path / "out", *SMALL, "--eval", data).exit_code == 0
    recipe = tmp_path / "out" / "recipe.yaml"
    assert yaml.safe_load(recipe.read_text(encoding="utf-8"))["eval"] == str(data)
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert run("compress", "--config", recipe, "--overwrite").exit_code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights


def test_texts_in_a_file_that_is_not_utf8_are_read(bert_directory: Path, tmp_path: Path) -> None:
    file = tiny.write_text(tmp_path / f"{LATIN}.txt", 16)
    result = run("compress", bert_directory, tmp_path / "out", *SMALL, "--calibration", file, "--holdout", "8")
    assert result.exit_code == 0, result.stderr


def test_classes_and_labels_that_are_not_utf8_are_matched_by_their_bytes(
    vit_directory: Path, learned_images: Path, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(learned_images, tmp_path / "images"))
    lines = []
    for index, name in enumerate(tiny.IMAGE_CLASSES):
        if (images / name).exists():
            (images / name).rename(images / f"{LATIN}{index}|<b>")
            lines.append(f"{LATIN}{index}|<b>\t{index}\n")
    classes, labels = tmp_path / "classes.txt", tmp_path / "labels.txt"
    classes.write_bytes(os.fsencode("".join(lines)))
    result = run("compress", vit_directory, tmp_path / "out", *SMALL, "--eval", images, "--class-map", classes)
    assert result.exit_code == 0, result.stderr
    (tmp_path / "flat").mkdir()
    shutil.copy(next(images.rglob("*.png")), tmp_path / "flat" / f"{LATIN}.png")
    labels.write_bytes(b"caf\xe9.png 1\n")
    result = run("eval", vit_directory, "--data", tmp_path / "flat", "--labels", labels, "--json")
    assert json.loads(result.stdout)["evaluation"]["samples"] == 1


@pytest.mark.parametrize("image", ["a\\u0000b.png", "\\ud83d.png"])
def test_a_name_in_a_table_that_no_file_can_have_is_a_bad_sample(
    vit_directory: Path, flat_images: Path, tmp_path: Path, image: str
) -> None:
    shutil.copy(sorted(flat_images.iterdir())[0], tmp_path / "0.png")
    table = tmp_path / "table.jsonl"
    table.write_text(f'{{"image": "{image}"}}\n{{"image": "0.png"}}\n')
    result = run("eval", vit_directory, "--data", table, "--baseline", vit_directory, "--json")
    assert result.exit_code == 0, result.stderr
    assert list(json.loads(result.stdout)["bad_samples"]) == ["row 1"]


def test_a_model_or_output_that_other_libraries_cannot_open_is_refused_before_any_work(
    vit_directory: Path, photos: Path, tmp_path: Path
) -> None:
    model, output, fine = tmp_path / f"model_{LATIN}", tmp_path / LATIN, tmp_path / "fine"
    shutil.copytree(vit_directory, model)
    (tmp_path / "sweep.yaml").write_text(
        f"matrix: {{keep: [0.8]}}\ndefaults: {{model: {vit_directory}, method: svd}}\n"
    )
    data = ("--calibration", photos)
    for arguments in (
        ("compress", model, fine, *SMALL, *data),
        ("compress", vit_directory, output, *SMALL, *data),
        ("compress", vit_directory, output / "below", *SMALL, *data),
        ("compress", vit_directory, fine, *SMALL, *data, "--cache", output),
        ("finetune", vit_directory, fine, "--data", photos, "--checkpoints", output),
        ("quantize", vit_directory, output),
        ("export", vit_directory, output, "--to", "torch"),
        ("eval", model, "--data", photos),
        ("inspect", model),
        ("sweep", tmp_path / "sweep.yaml", "--output", output),
    ):
        result = run(*arguments)
        assert result.exit_code in (1, 2)
        assert "caf\\xe9" in terminal(result)
        assert "Use another name" in result.stderr
        assert "Reading" not in result.stderr
    assert not output.exists()
    assert not fine.exists()


def test_shards_that_datasets_cannot_open_are_refused_by_name(
    vit_directory: Path, flat_images: Path, tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / LATIN
    folder.mkdir()
    images = [{"bytes": file.read_bytes(), "path": None} for file in sorted(flat_images.iterdir())[:3]]
    pq.write_table(pa.table({"image": images}), tmp_path / "train.parquet")
    shutil.move(tmp_path / "train.parquet", folder)
    result = run("eval", vit_directory, "--data", folder, "--baseline", vit_directory)
    assert result.exit_code == 1
    assert "caf\\xe9: its path, or a name in it, is not UTF-8" in terminal(result)


def test_a_missing_folder_of_any_name_is_named_on_one_plain_line(vit_directory: Path, tmp_path: Path) -> None:
    for name in ("[red]x", "\x1b[31mx", LATIN):
        missing = tmp_path / name
        for command in ("verify", "report", "inspect", "sweep"):
            assert shown(name)[:4] in terminal(run(command, missing))
        assert shown(name)[:4] in terminal(run("eval", vit_directory, "--data", missing))


def test_an_output_like_markup_is_printed_as_it_is(vit_directory: Path, flat_images: Path, tmp_path: Path) -> None:
    output = tmp_path / "[red]out"
    result = run("compress", vit_directory, output, "--keep", "0.8", "--keep", "0.7", "--method", "svd")
    assert "[red]out/comparison.html" in terminal(result)
    result = run(
        "finetune",
        output / "keep-0.8",
        tmp_path / "[bold]f",
        "--data",
        flat_images,
        "--teacher",
        vit_directory,
        "--epochs",
        "1",
    )
    assert "[bold]f" in terminal(result)


def test_junit_holds_any_message() -> None:
    row = {"job": "j", "status": Status.GATE, "message": "caf\udce9 \x1b[1m \ufffe <b>", "seconds": 1.0}
    failure = ElementTree.fromstring(junit_xml([row], {}))[0][0][0]
    assert failure.text == "caf\\xe9 \\x1b[1m \\ufffe <b>"


@pytest.mark.slow
def test_a_posix_locale_is_no_hindrance(vit_directory: Path, photos: Path, tmp_path: Path) -> None:
    """With a name that would be text elsewhere, and with a terminal that knows ASCII alone."""
    data = photos.rename(tmp_path / "phötos")
    flags = ("--calibration", data, "--samples", "4", "--holdout", "16", "--csv", tmp_path / "table.csv")

    def python(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        command = [sys.executable, "-m", "vitshrink", "compress", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False)

    done = python(vit_directory, tmp_path / "out", *SMALL, *flags)
    assert done.returncode == 0, done.stderr
    assert "broken_caf\\xe9" in done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["evaluation"]["source"].endswith("phötos")
    refused = python(vit_directory, tmp_path / "öut", *SMALL)
    assert refused.returncode == 1
    assert "set PYTHONUTF8=1" in refused.stderr


def test_every_recipe_and_card_is_markdown_that_stays_text(vit_directory: Path, tmp_path: Path) -> None:
    model = shutil.copytree(vit_directory, tmp_path / "a|b_*c* <b>&amp; ~~x~~ $y$")
    assert run("compress", model, tmp_path / "out", *SMALL).exit_code == 0
    heading = next(line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if line.startswith("# "))
    assert heading.startswith("# a\\|b\\_\\*c\\* \\<b\\>\\&amp; \\~\\~x\\~\\~ \\$y\\$,")
