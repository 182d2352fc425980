"""Rows appended to one file by whoever comes along."""

import csv
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from vitshrink.errors import OutputError
from vitshrink.report import append_rows, check_appendable
from vitshrink.report.csv_file import COLUMNS


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_header_is_written_once_and_text_survives(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    append_rows(file, [{"model": 'a, "b"\nc', "kl": 0.25}])
    append_rows(file, [{"model": "x", "samples": 3}, {"model": "y"}])
    found = rows_of(file)
    assert [row["model"] for row in found] == ['a, "b"\nc', "x", "y"]
    assert (found[0]["kl"], found[0]["samples"], found[1]["samples"]) == ("0.25", "", "3")
    assert all(row["time"].endswith("+00:00") for row in found)


def append_many(folder: Path, name: str, start: Any) -> None:
    for number in range(100):
        start.wait()  # both meet a file that is not there yet
        append_rows(folder / f"{number}.csv", [{"model": name * 200, "samples": number}])
        append_rows(folder / "all.csv", [{"model": name * 200, "samples": number}])


def test_two_processes_lose_no_row(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")  # with everything imported
    start = fork.Barrier(2, timeout=60)
    running = [fork.Process(target=append_many, args=(tmp_path, name, start)) for name in "ab"]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    assert [process.exitcode for process in running] == [0, 0]
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 201
    found = rows_of(tmp_path / "all.csv")
    for name in "ab":
        own = [row["samples"] for row in found if row["model"] == name * 200]
        assert own == [str(i) for i in range(100)]
    assert {len((tmp_path / f"{i}.csv").read_text().splitlines()) for i in range(100)} == {3}


def test_a_line_that_a_killed_process_left_stays_alone(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    file.write_text(",".join(COLUMNS) + "\n2026-01-01,0.1.0,half")
    append_rows(file, [{"model": "whole"}])
    assert [row["model"] for row in rows_of(file)] == ["half", "whole"]


def test_what_cannot_be_appended_to_is_refused_before_any_work(tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("name,score\nx,1\n")
    for append in (check_appendable, lambda file: append_rows(file, [{}])):
        with pytest.raises(OutputError, match=r"other\.csv .*columns"):
            append(other)
        with pytest.raises(OutputError, match="cannot append"):
            append(tmp_path / "nowhere" / "results.csv")
        with pytest.raises(OutputError, match="cannot append"):
            append(tmp_path)
    assert other.read_text() == "name,score\nx,1\n"
    check_appendable(tmp_path / "new.csv")
    assert not (tmp_path / "new.csv").exists()
