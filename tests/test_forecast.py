"""The time that is left of a job, foretold from the stages ahead of it and the pace of those behind."""

import random
from collections.abc import Iterator

import pytest

from vitshrink.cli import console
from vitshrink.runtime.forecast import Ahead, Forecast
from vitshrink.runtime.observer import Job


class Machine:
    """A clock that simulated stages move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.forecast = Forecast(lambda: self.now)

    def run(self, key: str, seconds: float, steps: int) -> Iterator[tuple[float, float | None]]:
        """A stage whose steps are alike: after each, when it is and what is said to be left."""
        self.forecast.begin(key, steps)
        for _ in range(steps):
            self.now += seconds / steps
            self.forecast.advance(1)
            yield self.now, self.forecast.left()
        self.forecast.end()
        yield self.now, self.forecast.left()


@pytest.mark.parametrize("seed", range(20))
def test_what_is_said_is_within_a_factor_of_two(seed: int) -> None:
    """Where the work of stages is known up to a third, and machines are up to a half slower at one kind of it."""
    draw = random.Random(seed)
    slow = {"passes": draw.uniform(1, 1.5), "algebra": draw.uniform(1, 1.5)}
    off = {key: draw.uniform(0.75, 4 / 3) for key in "abcd"}
    kinds = dict(zip("abcd", ("passes", "algebra", "passes", "algebra"), strict=True))
    keys = ["a", "b", *(draw.choice("abcd") for _ in range(6))]
    works = [draw.uniform(1, 10) for _ in keys]
    ahead = [Ahead(key, kinds[key], work, 20) for key, work in zip(keys, works, strict=True)]
    machine = Machine()
    machine.forecast.expect(ahead)
    assert machine.forecast.left() is None, "nothing is known yet"
    speed = draw.uniform(0.01, 100)
    seconds = [speed * slow[each.kind] * off[each.key] * each.work for each in ahead]
    whole = sum(seconds)
    for each, taken in zip(ahead, seconds, strict=True):
        for now, left in machine.run(each.key, taken, each.steps):
            if whole - now > 1e-3 * whole:
                assert left is not None
                assert 0.5 < left / (whole - now) < 2, (each.key, now / whole)
    assert machine.forecast.left() is None, "all is done"


def test_a_stage_that_is_not_needed_takes_no_time() -> None:
    machine = Machine()
    stages = [Ahead("calibrate", "passes", 9.0), Ahead("factorize", "algebra", 1.0), Ahead("save", "files", 1.0)]
    machine.forecast.expect(stages)
    *_, (_, left) = machine.run("factorize", 5.0, 4)
    assert left == pytest.approx(5)


def test_fewer_steps_are_less_work() -> None:
    machine = Machine()
    machine.forecast.expect([Ahead("a", "passes", 10.0, 10), Ahead("b", "passes", 10.0, 10)])
    *_, (_, left) = machine.run("a", 4.0, 5)
    assert left == pytest.approx(8), "half of the work took 4 seconds"


def test_steps_of_an_interrupted_job_took_no_time_in_this_one() -> None:
    machine = Machine()
    machine.forecast.expect([Ahead("a", "passes", 1.0, 10)])
    machine.forecast.begin("a", 10)
    machine.forecast.advance(6)
    for _ in range(2):
        machine.now += 3
        machine.forecast.advance(1)
    assert machine.forecast.left() == pytest.approx(6)
    machine.now += 1
    assert machine.forecast.left() == pytest.approx(5), "it counts down between steps, too"


def test_work_before_the_first_step_is_not_taken_for_its_pace() -> None:
    machine = Machine()
    machine.forecast.expect([Ahead("a", "passes", 10.0, 10), Ahead("b", "passes", 10.0, 10)])
    list(machine.run("a", 10.0, 10))
    machine.forecast.begin("b", 10)
    machine.now += 5
    machine.forecast.advance(1)
    assert machine.forecast.left() == pytest.approx(5), "as long as the stage before, until its steps tell"
    machine.now += 0.5
    machine.forecast.advance(1)
    assert machine.forecast.left() == pytest.approx(4)


def test_a_terminal_is_told_of_the_whole_job() -> None:
    observer = console.TerminalObserver(quiet=True)
    job = Job(observer)
    assert observer.left() is None
    job.expect([Ahead("a", "passes", 1.0, 2), Ahead("b", "passes", 3600.0, 2)])
    with job.stage("a", "A", 2) as advance:
        advance(1)
        assert observer.left() is not None
    assert job.branch().forecast is job.forecast
