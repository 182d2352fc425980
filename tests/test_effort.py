"""What fast and thorough mean."""

from typing import Any

import pytest

from vitshrink.compression.choices import Choices
from vitshrink.compression.effort import DEFAULT, FAST, THOROUGH, effort_of
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
    assert THOROUGH.repairs.steps > DEFAULT.repairs.steps > DEFAULT.light_repairs.steps
    assert THOROUGH.light == 0 < DEFAULT.light
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
