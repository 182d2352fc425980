"""What needs no model answers without importing torch, and says the same as what does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitshrink.cli import catalog
from vitshrink.compression.allocation import ALLOCATIONS
from vitshrink.compression.repairs import COMPENSATIONS
from vitshrink.config import method
from vitshrink.methods import attention_methods, available_methods, find_method

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "datasets", "numpy")
SMALLER = ("compress", "./missing", "out", "--keep", "0.5")


def asked(*words: str) -> tuple[int, str]:
    """The exit code of a command line and what it says, after it has been seen that nothing heavy was imported."""
    script = f"""
import sys
from vitshrink.cli import main
try:
    main()
finally:
    print("imported:", *sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, env=environment, check=False
    )
    said, _, imported = done.stderr.rpartition("imported:")
    assert imported.split() == []
    return done.returncode, done.stdout + said


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["--help"], 0, "compress"),
        (["--version"], 0, "vitshrink"),
        (["methods"], 0, "curvature"),
        (["compress", "--help"], 0, "--target-params"),
        (["sweep", "--help"], 0, "--max-latency-ratio"),
        ([*SMALLER, "--unknown"], 2, "No such option"),
        (["compress", "a", "b", "--keep", "2"], 2, "--keep 2.0: give the fraction"),
        (["compress", "a", "b"], 2, "choose a size with"),
        (["compress", "a", "b", "--keep", "0.5", "--layers", "atention"], 2, "Did you mean 'attention'"),
        ([*SMALLER, "--method", "svdd"], 2, "unknown method 'svdd'. Did you mean 'svd'?"),
        ([*SMALLER, "--method", "svd", "--allocation", "enrgy"], 2, "unknown allocation 'enrgy'"),
        ([*SMALLER, "--method", "svd", "--compensation", "bais"], 2, "unknown compensation 'bais'"),
        ([*SMALLER, "--method", "asvd", "--option", "alhpa=1"], 2, "Did you mean 'alpha'?"),
        ([*SMALLER, "--method", "svd", "--option", "alpha=1"], 2, "method 'svd' has no options"),
        ([*SMALLER, "--method", "svd"], 1, "no such folder: './missing'"),
        (["compress", "me/missing", "out", "--keep", "0.5", "--offline"], 1, "the local Hub cache has no such model"),
        (["eval", "./missing", "--data", "./photos"], 1, "no such folder: './missing'"),
        (["finetune", "./missing", "out"], 2, "--data is missing"),
        (["quantize", "./missing", "out", "--weights", "int3"], 2, "weights cannot be stored as 'int3'"),
        (["frontier", "./missing"], 2, "pass --calibration"),
        (["inspect", "./missing", "--samples", "0"], 2, "--samples 0: must be at least 1"),
        (["export", "./missing", "out"], 2, "'to', the form: onnx, openvino, torch or dense, is missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_needs_no_model_does_not_wait_for_torch(words: list[str], code: int, expected: str) -> None:
    found, said = asked(*words)
    assert (found, expected in said) == (code, True), said


def test_the_catalog_tells_what_the_methods_tell() -> None:
    read = {name: (facts.needs, facts.allocation, facts.compensation) for name, facts in catalog.methods().items()}
    assert list(read) == [*available_methods(), *attention_methods()]
    for name, facts in catalog.methods().items():
        live = find_method(name)
        assert read[name] == (live.needs.value, live.allocation, live.compensation)
        assert (facts.summary, dict(facts.options)) == (live.summary, live.options)


def test_the_names_that_are_shown_are_those_there_are() -> None:
    assert set(method.ALLOCATIONS) == set(ALLOCATIONS)
    assert set(method.COMPENSATIONS) == set(COMPENSATIONS)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("--layers a", {"attention", "all"}), ("--method s", {"svd"}), ("--allocation e", {"energy"})],
)
def test_choices_are_completed(typed: str, expected: set[str]) -> None:
    from typer.main import get_command

    from vitshrink.cli.app import app

    flag, incomplete = typed.split()
    command = get_command(app).commands["compress"]  # type: ignore[attr-defined]
    (parameter,) = (each for each in command.params if flag in each.opts)
    context = command.make_context("compress", ["a", "b"], resilient_parsing=True)
    assert {item.value for item in parameter.shell_complete(context, incomplete)} == expected
