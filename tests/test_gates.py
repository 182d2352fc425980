"""Bounds on a compressed model: what keeps them, by how much they are missed, and what they cannot be held against."""

from dataclasses import fields
from typing import Any

import pytest

from vitshrink.config.options import FIDELITIES
from vitshrink.errors import GateError, UsageError
from vitshrink.evaluation.gates import Gates
from vitshrink.evaluation.quality import Accuracy, Difference, Evaluation, Fidelity, Interval


def evaluation(**entries: Any) -> Evaluation:
    return Evaluation(**{"task": "image-classification", "metric": "top1", "samples": 100} | entries)


def accuracy(top1: float) -> Accuracy:
    return Accuracy(top1=top1, correct=round(100 * top1), interval=Interval(0, 1))


def difference(drop: float) -> Difference:
    return Difference(drop=drop, drop_interval=Interval(-1, 1), p_value=1, significant=False, test="none")


FULL = evaluation(
    dense=accuracy(0.8),
    compressed=accuracy(0.75),
    fidelity=Fidelity(kl=0.3, agreement=49 / 50),
    difference=difference(0.8 - 0.75),
)


@pytest.mark.parametrize(
    "gates",
    [
        Gates(),
        Gates(min_accuracy=75),
        Gates(max_drop=5),
        Gates(max_changed=2),
        Gates(max_kl=0.3),
        Gates(min_accuracy=0, max_drop=100, max_kl=10),
    ],
)
def test_a_bound_that_is_met_passes(gates: Gates) -> None:
    gates.check(FULL)


@pytest.mark.parametrize(
    ("gates", "said"),
    [
        (Gates(min_accuracy=76), r"--min-accuracy 76 is missed by 1 \(75\)"),
        (Gates(max_drop=4), r"--max-drop 4 is missed by 1 \(5\)"),
        (Gates(max_changed=1), r"--max-changed 1 is missed by 1 \(2\)"),
        (Gates(max_kl=0.25), r"--max-kl 0.25 is missed by 0.05 \(0.3\)"),
        (Gates(min_accuracy=90, max_kl=0.1), r"--min-accuracy 90 .*; --max-kl 0.1 "),
    ],
)
def test_a_bound_that_is_missed_says_by_how_much(gates: Gates, said: str) -> None:
    with pytest.raises(GateError, match=said) as caught:
        gates.check(FULL)
    assert caught.value.exit_code == 3


def test_a_gain_passes_and_a_dense_model_can_be_gated() -> None:
    Gates(max_drop=0).check(evaluation(compressed=accuracy(0.9), difference=difference(-0.1)))
    with pytest.raises(GateError):
        Gates(min_accuracy=81).check(evaluation(dense=accuracy(0.8)))


@pytest.mark.parametrize(
    ("gates", "said"),
    [
        (Gates(min_accuracy=1), "--min-accuracy cannot be judged: the data have no labels"),
        (Gates(max_drop=1), "--max-drop cannot be judged: the data have no labels"),
        (Gates(max_kl=1), "--max-kl cannot be judged"),
        (Gates(max_changed=1), "--max-changed cannot be judged: the models do not predict classes"),
    ],
)
def test_a_bound_that_cannot_be_judged_is_no_pass(gates: Gates, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        gates.check(evaluation(metric=None))


@pytest.mark.parametrize("gates", [Gates(max_drop=1), Gates(max_kl=1)])
def test_a_comparison_without_baseline_is_refused_before_any_work(gates: Gates) -> None:
    with pytest.raises(UsageError, match="pass it as --baseline"):
        gates.require(baseline=None)
    gates.require(baseline="dense")
    Gates(min_accuracy=1).require(baseline=None)


def test_sizes_and_times_are_gates_too() -> None:
    verdicts = Gates(max_size=10_000_000, max_latency_ratio=0.8).judge(None, nbytes=8.5e6, latency_ratio=0.9)
    assert [verdict.passed for verdict in verdicts] == [True, False]
    assert str(verdicts[0]) == "--max-size 10 MB is kept with 1.5 MB to spare (8.5 MB)"
    assert str(verdicts[1]) == "--max-latency-ratio 0.8 is missed by 0.1 (0.9)"
    with pytest.raises(UsageError, match="--max-size cannot be judged"):
        Gates(max_size=1).check(FULL)
    with pytest.raises(UsageError, match="--max-drop cannot be judged: nothing was evaluated"):
        Gates(max_drop=1).check(None)


def test_gates_are_read_from_entries() -> None:
    gates = Gates.from_mapping({"max-drop": 1, "max_size": "90MB", "max_kl": None}, "gates.yaml")
    assert gates.to_dict() == {"max_drop": 1.0, "max_size": 90_000_000}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"max_dorp": 1}, "unknown gate 'max_dorp'"),
        ({"max_drop": "1"}, "max_drop: '1' does not fit"),
        ({"max_drop": True}, "does not fit"),
        ({"max_kl": float("nan")}, "--max-kl nan: give a number"),
        ({"max_size": "big"}, "cannot read 'big'"),
        (["max_drop"], "must hold bounds"),
        (None, "must hold bounds"),
    ],
)
def test_gates_that_make_no_sense_are_named(entries: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Gates.from_mapping(entries, "sweep.yaml: gates")


def test_every_bound_that_chooses_a_size_is_a_gate_of_the_same_name() -> None:
    assert set(FIDELITIES) <= {entry.name for entry in fields(Gates)}
