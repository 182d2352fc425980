"""What fast and thorough mean."""

from typing import Any

import pytest

from vitshrink.compression.choices import Choices
from vitshrink.compression.effort import DEFAULT, FAST, THOROUGH, Part, effort_of
from vitshrink.config.options import CompressConfig
from vitshrink.errors import UsageError


def config(**options: Any) -> CompressConfig:
    return CompressConfig("model", "output", keep=(0.5,), calibration="images", **options)


def test_a_fast_job_refines_and_measures_nothing() -> None:
    choices = Choices.of(config(fast=True))
    assert (choices.rounds, choices.allocation, choices.compensation) == (0, "loss", "bias")


def test_a_thorough_job_does_more_of_everything() -> None:
    assert Choices.of(config(thorough=True)).rounds > Choices.of(config()).rounds
    assert THOROUGH.measured > DEFAULT.measured
    assert THOROUGH.steps > DEFAULT.steps
    assert THOROUGH.repaired.of(512) == 512 >= DEFAULT.repaired.of(512)
    assert [effort_of(config(**given)) for given in ({}, {"fast": True}, {"thorough": True})] == [
        DEFAULT,
        FAST,
        THOROUGH,
    ]


def test_rounds_that_are_asked_for_are_taken() -> None:
    assert Choices.of(config(refine=5)).rounds == 5


@pytest.mark.parametrize("effort", ["fast", "thorough"])
def test_a_named_effort_has_its_own_rounds(effort: str) -> None:
    with pytest.raises(UsageError, match=f"--{effort} already sets --refine"):
        config(refine=5, **{effort: True})


def test_fast_and_thorough_are_opposites() -> None:
    with pytest.raises(UsageError, match="--thorough"):
        config(fast=True, thorough=True)


@pytest.mark.parametrize(("samples", "seen"), [(40, 40), (128, 64), (512, 128)])
def test_a_part_of_the_samples_has_a_least_size(samples: int, seen: int) -> None:
    assert Part(0.25, 64).of(samples) == seen
