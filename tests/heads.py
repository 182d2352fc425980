"""What every head has to stand, whatever it is for: jobs from a file of samples to a report."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

from vitshrink import load
from vitshrink.cli.app import app
from vitshrink.data import Preprocessor, open_samples
from vitshrink.models.fidelity import Head
from vitshrink.models.readings import reading_of
from vitshrink.models.tasks import task_of
from vitshrink.statistics.functionals import random_functional

Found = dict[str, Any]


def run(*arguments: object, code: int = 0) -> str:
    """What the command line prints: to stdout, or to stderr where it has to fail."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def write_varied(name: str, directory: Path, head: str) -> Path:
    """A tiny checkpoint whose ``head`` answers differently from sample to sample."""
    tiny.write(name, directory)
    model = tiny.build(name)
    with torch.no_grad():
        model.get_submodule(head).weight.mul_(5)
    model.save_pretrained(directory)
    return directory


def evaluated(model: Path, data: Path, *flags: object) -> Found:
    found: Found = json.loads(run("eval", model, "--data", data, "--json", *flags))["evaluation"]
    return found


def compressed_and_measured(model: Path, data: Path, small: Path, *flags: object) -> Found:
    """Compress, and evaluate apart: the figures have to be those of the report."""
    run("compress", model, small, "--calibration", data, "--samples", 32, "--eval", data, "--keep", 0.8, *flags)
    report = json.loads((small / "report.json").read_text())
    found = evaluated(small, data, "--baseline", model)
    assert found["compressed"] == report["evaluation"]["compressed"]
    assert found["fidelity"] == report["evaluation"]["fidelity"]
    return found


def assert_a_bound_is_kept(model: Path, data: Path, small: Path, *bound: object) -> None:
    run("compress", model, small, "--calibration", data, "--samples", 24, "--holdout", 24, *bound)
    found = json.loads((small / "report.json").read_text())
    assert found["bytes"]["compressed"] < found["bytes"]["dense"]


def assert_training_helps(objective: str, model: Path, data: Path, folder: Path) -> None:
    """The held-out loss gets smaller."""
    run("compress", model, folder / "small", "--calibration", data, "--samples", 80, "--keep", 0.5, "--method", "svd")
    teacher = ("--teacher", model) if objective == "distill" else ()
    options = ("--objective", objective, "--epochs", 6)
    run("finetune", folder / "small", folder / "better", "--data", data, *teacher, *options)
    recovery = json.loads((folder / "better" / "report.json").read_text())["recovery"]
    assert recovery["after"] < recovery["before"]


def refused(model: Path, data: Path, *flags: object) -> str:
    """What `eval` says of data that it cannot use."""
    return " ".join(run("eval", model, "--data", data, *flags, code=1).split())


@torch.no_grad()
def read_alone_and_together(checkpoint: Path, data: Path, head: Head, count: int) -> tuple[PreTrainedModel, Any]:
    """Padding changes no divergence from another model, and a functional is one number a sample.

    Returns the model and the batch of all ``count`` samples.
    """
    model = load(checkpoint)
    task, other, reading = task_of(model), tiny.build(type(model).__name__, seed=1), reading_of(model)
    samples = open_samples(str(data), "text", layout=task)
    preprocessor = Preprocessor.from_checkpoint(checkpoint, "text", task=task)

    def divergences(batch: Any) -> torch.Tensor:
        return head.divergence(*(reading.rows(each(**batch.inputs), batch) for each in (model, other)))

    (together,) = preprocessor.batches(samples, count, in_order=True)
    alone = torch.cat([divergences(batch) for batch in preprocessor.batches(samples, 1, in_order=True)])
    torch.testing.assert_close(divergences(together), alone, atol=1e-5, rtol=1e-4)
    outputs = model(**together.inputs)
    functional = random_functional(model, outputs, together, torch.Generator().manual_seed(0))
    assert functional(outputs).shape == (count,)
    return model, together
