"""A sample of what ``make outside`` tries, and that trying it can fail."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from outside.case import Case, draw, singles
from outside.data import Data
from outside.judgment import figure_problems, process_problems
from outside.oddity import ODDITIES
from outside.place import Place
from outside.process import Ended
from outside.zygote import Zygotes

SAMPLE = (*range(6), *range(7, 15), *range(16, 30))


@pytest.fixture(scope="module")
def zygotes() -> Iterator[Zygotes]:
    with Zygotes() as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("number", SAMPLE)
def test_a_case_drawn_by_its_number(number: int, zygotes: Zygotes) -> None:
    verdict = zygotes.judge(draw(number))
    assert not verdict.problems, f"{verdict.said}\nreproduce: python -m tests.outside --case {number}"


def test_a_number_is_always_the_same_case_and_its_text_says_which() -> None:
    for number in range(200):
        case = draw(number)
        assert case == draw(number) == Case.parse(str(case)) == Case.parse(str(number))


def test_every_oddity_is_tried_alone() -> None:
    assert {case.oddities for case in singles()} == {(name,) for name in ODDITIES}


@pytest.mark.parametrize(
    ("status", "stdout", "stderr", "kind"),
    [
        (1, "", "Traceback (most recent call last):\n  File x\nKeyError: 'a'\n", "traceback"),
        (1, "", "error: unexpected KeyError: 'a'. This is a bug: run …", "called a bug"),
        (-11, "", "", "killed"),
        (120, "", "error: ./file", "exit code"),
        (None, "", "", "hangs"),
        (1, "", "Loading\n", "silent"),
        (1, "", "error: something went wrong", "vague"),
        (0, "", "x.py:3: UserWarning: beware\n", "noise"),
        (2, "", "error: --keep 3: give a fraction", None),
        (0, "done", "", None),
    ],
)
def test_what_a_process_did_is_judged(status: int | None, stdout: str, stderr: str, kind: str | None) -> None:
    ended = Ended(["eval"], status, stdout, stderr, 0.1)
    kinds = {problem.partition(":")[0] for problem in process_problems(ended, Place(Path("/x")))}
    assert kinds == ({kind} if kind else set()) or kind in kinds


@pytest.mark.parametrize(
    ("evaluation", "bad", "kind"),
    [
        ({"samples": 5, "metric": "top1", "dense": {"top1": 1.0}}, 1, None),
        ({"samples": 6, "metric": "top1", "dense": {"top1": 1.0}}, 1, "samples"),
        ({"samples": 5, "metric": "top1", "dense": {"top1": 1.0}}, 0, "bad samples"),
        ({"samples": 5, "metric": "top1", "dense": {"top1": 0.8}}, 1, "accuracy"),
        ({"samples": 5, "metric": None, "dense": None}, 1, "labels"),
    ],
)
def test_figures_are_held_against_what_was_made(evaluation: dict[str, object], bad: int, kind: str | None) -> None:
    data = Data(Path("data"), [], good=5, bad=1, labeled=True, right=True, counted=True)
    document = {"evaluation": evaluation, "bad_samples": {str(number): "is bad" for number in range(bad)}}
    found = {problem.partition(":")[0] for problem in figure_problems(document, data)}
    assert found == ({kind} if kind else set())
