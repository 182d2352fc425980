"""``compress`` in two real processes that share the work: the result is that of one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_processes import run_together, start_together

from vitshrink.compression.compressor import Compressor
from vitshrink.compression.findings import Findings
from vitshrink.config.options import CompressConfig
from vitshrink.config.quantize import QuantizeJob
from vitshrink.jobs.compress import compress
from vitshrink.jobs.quantize import quantize_checkpoint
from vitshrink.models.checkpoint import load, save
from vitshrink.runtime import checksums
from vitshrink.runtime.observer import Job

pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys, torch
from vitshrink.runtime import processes
from vitshrink.compression.compressor import Compressor
from vitshrink.config.options import CompressConfig
from vitshrink.errors import VitshrinkError
from vitshrink.jobs.compress import compress
from vitshrink.report import figures
figures.available = lambda: False
torch.set_num_threads(1)
processes.join("cpu")
kept = []
original = Compressor.learn
def remember(self, job):
    kept.append(original(self, job))
    return kept[-1]
Compressor.learn = remember
for number, entries in enumerate(json.loads(sys.argv[1])):
    try:
        compress(CompressConfig.from_mapping(entries))
        if kept:
            found = kept.pop()
            # parts of attentions have losses alone
            layers = {site: (getattr(each, "up", each.loss), each.loss) for site, each in found.layers.items()}
            torch.save((dict(found.stats), layers), f"{sys.argv[2]}/{number}-{processes.rank()}.pt")
        print("done")
    except VitshrinkError as error:
        print(f"{type(error).__name__} {error.exit_code}: {error}")
processes.leave()
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setattr("vitshrink.report.figures.available", lambda: False)


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative to the largest entry."""
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-300))


def test_the_result_is_that_of_one_process(
    checkpoint: Callable[[str], Path],
    flat_images: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unequal shares, and none at all for one of the two; then jobs that fail in the first process only."""
    vit, bert = str(checkpoint("ViTForImageClassification")), str(checkpoint("BertForSequenceClassification"))
    images = {"model": vit, "calibration": str(flat_images), "holdout": 4, "keep": [0.8, 0.6]}
    texts = {"model": bert, "calibration": str(text_file), "holdout": 4, "keep": [0.7]}
    jobs: list[dict[str, Any]] = [
        images | {"method": "curvature", "refine": 1, "samples": 20, "batch_size": 4},
        texts | {"method": "whitened", "samples": 6, "batch_size": 8},
        images | {"method": "qk-joint", "layers": "attention", "keep": [0.9], "samples": 12, "batch_size": 4},
    ]
    kept: list[Findings] = []
    original = Compressor.learn

    def remember(self: Compressor, own: Job) -> Findings:
        kept.append(original(self, own))
        return kept[-1]

    monkeypatch.setattr(Compressor, "learn", remember)
    for number, job in enumerate(jobs):
        compress(CompressConfig.from_mapping(job | {"output": str(tmp_path / f"one-{number}")}))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    wanted = [job | {"output": str(tmp_path / f"two-{number}")} for number, job in enumerate(jobs)]
    refused = texts | {"output": str(tmp_path / "taken")}
    failing = texts | {"output": str(tmp_path / "failed"), "calibration": "no/such/folder"}
    done = run_together("-c", PROGRAM, json.dumps([*wanted, refused, failing]), str(tmp_path))
    assert [process.returncode for process in done] == [0, 0], [process.stderr for process in done]
    first, second = (process.stdout.splitlines() for process in done)
    assert first[:3] == second[:3] == ["done"] * 3
    assert [lines[3].partition(":")[0] for lines in (first, second)] == ["OutputError 1", "OtherProcessError 1"]
    assert first[3].partition(":")[2] == second[3].partition(":")[2]
    assert all(lines[4].startswith("DataError 1: ") for lines in (first, second))

    for number, factors in enumerate(kept):
        found = [torch.load(tmp_path / f"{number}-{rank}.pt", weights_only=False) for rank in range(2)]
        for layer, want in factors.stats.items():
            for field in ("mean", "gram", "output_gram", "gradient_gram", "input_gradient_gram", "abs_mean", "abs_max"):
                if getattr(want, field) is None:
                    continue
                here, there = (getattr(each[0][layer], field) for each in found)
                assert torch.equal(here, there), "the same bits in every process"
                assert largest_difference(here, getattr(want, field)) < 1e-13, "float64 tolerance"
            assert found[0][0][layer].tokens == want.tokens
        for layer, want in factors.layers.items():
            (here, loss), (there, _) = (each[1][layer] for each in found)
            assert torch.equal(here, there)
            assert largest_difference(loss, want.loss) < 1e-9
    for number in range(len(jobs)):
        for path in (tmp_path / f"one-{number}").rglob("model.safetensors"):
            other = tmp_path / f"two-{number}" / path.relative_to(tmp_path / f"one-{number}")
            one, two = load_file(path), load_file(other)
            assert not checksums.broken_files(other.parent)
            for key, tensor in one.items():
                torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=1e-5)
            figures = [json.loads((each.parent / "report.json").read_text()) for each in (path, other)]
            kl, same = (each["evaluation"]["fidelity"]["kl"] for each in figures)
            assert kl == pytest.approx(same, rel=1e-3)
    left = {path.name for path in tmp_path.iterdir() if path.suffix != ".pt"}
    assert left == {"taken", *(f"{name}-{number}" for name in ("one", "two") for number in range(len(jobs)))}


TRAINING = """
import json, os, sys, torch
from vitshrink.runtime import processes
from vitshrink.config.options import CompressConfig, FinetuneJob
from vitshrink.errors import VitshrinkError
from vitshrink.jobs.finetune import finetune_checkpoint
from vitshrink.jobs.compress import compress
from vitshrink.report import figures
figures.available = lambda: False
torch.set_num_threads(1)
processes.join("cpu")
opened = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
for entries in json.loads(sys.argv[1]):
    job = FinetuneJob.from_mapping if "teacher" in entries else CompressConfig.from_mapping
    try:
        result = finetune_checkpoint(job(entries)) if "teacher" in entries else compress(job(entries))[0]
        report = result.report
        found = report.to_dict()
        print(json.dumps([found["latency"], found["environment"]["device"], found["recovery"]]))
    except VitshrinkError as error:
        print(json.dumps(f"{type(error).__name__} {error.exit_code}: {error}"))
print(json.dumps([path for path in opened if ".vitshrink-" in path]))
processes.leave()
"""


def test_one_process_times_and_all_train_and_know_what_went_wrong(
    vit_directory: Path, flat_images: Path, tmp_path: Path
) -> None:
    """``finetune`` after ``compress``; then a model that cannot be saved, and a target that may not be replaced."""
    small = compress(CompressConfig(str(vit_directory), str(tmp_path / "small"), keep=(0.8,), method="svd"))[
        0
    ].directory
    assert small is not None
    model = load(small)
    with torch.no_grad():
        model.vit.layernorm.bias[0] = 1e5  # not in half precision
    save(model, tmp_path / "large")
    shutil.copy(vit_directory / "preprocessor_config.json", tmp_path / "large")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    training = {"teacher": str(vit_directory), "data": str(flat_images), "eval": str(flat_images), "device": "auto"}
    training |= {"epochs": 1, "batch_size": 4}
    jobs: list[dict[str, Any]] = [
        {
            "model": str(vit_directory),
            "output": str(tmp_path / "timed"),
            "keep": [0.8],
            "method": "svd",
            "latency": [2],
        },
        training | {"model": str(small), "output": str(tmp_path / "out"), "checkpoints": str(tmp_path / "state")},
        training | {"model": str(tmp_path / "large"), "output": str(tmp_path / "half"), "dtype": "float16"},
        training | {"model": str(small), "output": str(tmp_path / "taken")},
        training | {"model": str(small), "output": str(tmp_path / "none"), "data": "no/such/folder"},
    ]
    done = run_together("-c", TRAINING, json.dumps(jobs))
    assert [process.returncode for process in done] == [0, 0], [process.stderr for process in done]
    first, second = ([json.loads(line) for line in process.stdout.splitlines()] for process in done)
    assert first[0][0] == second[0][0], "the times of one process, which the other waited for"
    assert first[0][0]["dense"]["batch_size"] == 2
    (_, device, recovery), (_, other_device, other) = first[1], second[1]
    assert (device, other_device) == ("cpu", "cpu")
    assert recovery["settings"]["processes"] == 2
    assert (recovery["before"], recovery["after"]) == (other["before"], other["after"])
    assert [lines[2].partition(":")[0] for lines in (first, second)] == ["NumericsError 1", "OtherProcessError 1"]
    assert [lines[3].partition(":")[0] for lines in (first, second)] == ["OutputError 1", "OtherProcessError 1"]
    for number in (2, 3):
        assert first[number].partition(":")[2] == second[number].partition(":")[2]
    assert all(lines[4].startswith("DataError 1: ") for lines in (first, second))
    assert first[5]
    assert not [path for path in second[5] if str(tmp_path) in path], "what the other writes may be on another machine"
    assert not checksums.broken_files(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"small", "large", "taken", "timed", "out"}


ROUNDING = """
import json, sys, torch
from vitshrink.config.quantize import QuantizeJob
from vitshrink.jobs.quantize import quantize_checkpoint
from vitshrink.report import figures
from vitshrink.runtime import processes
figures.available = lambda: False
torch.set_num_threads(1)
processes.join("cpu")
report = quantize_checkpoint(QuantizeJob(*sys.argv[1:3], eval=sys.argv[3], device="cpu")).report
print(json.dumps([report.to_dict()[entry] for entry in ("evaluation", "latency", "bytes")]))
processes.leave()
"""


def test_integers_are_measured_together_and_written_once(
    vit_directory: Path, learned_images: Path, tmp_path: Path
) -> None:
    alone = quantize_checkpoint(
        QuantizeJob(str(vit_directory), str(tmp_path / "alone"), eval=str(learned_images), device="cpu")
    )
    done = run_together("-c", ROUNDING, str(vit_directory), str(tmp_path / "out"), str(learned_images))
    assert [process.returncode for process in done] == [0, 0], [process.stderr for process in done]
    first, second = (json.loads(process.stdout) for process in done)
    assert first == second
    evaluation = alone.report.to_dict()["evaluation"]
    assert first[0]["fidelity"]["kl"] == pytest.approx(evaluation["fidelity"]["kl"], rel=1e-3)
    assert first[0]["compressed"]["correct"] == evaluation["compressed"]["correct"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("alone", "out")]
    assert weights[0] == weights[1]
    assert not checksums.broken_files(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "out"}


def test_where_one_process_is_killed_the_other_ends(vit_directory: Path, flat_images: Path, tmp_path: Path) -> None:
    """Without a launcher, which would end the others itself."""
    job = ["compress", str(vit_directory), str(tmp_path / "out"), "--keep", "0.7", "--calibration", str(flat_images)]
    first, second = start_together("-m", "vitshrink", *job, "--samples", "20", "--holdout", "4")
    try:
        while not list(tmp_path.glob(".out.vitshrink-*")):
            assert first.poll() is None
            time.sleep(0.01)
        second.kill()
        _, said = first.communicate(timeout=120)
    finally:
        first.kill()
        second.kill()
        second.communicate()
    assert second.returncode == -signal.SIGKILL
    assert first.returncode == 1, said
    assert "error: another process of this job has ended" in said
    assert list(tmp_path.iterdir()) == []


def test_the_launcher_of_accelerate_starts_it(vit_directory: Path, tmp_path: Path) -> None:
    launcher = shutil.which("accelerate", path=str(Path(sys.executable).parent))
    if launcher is None:
        pytest.skip("accelerate's launcher is not beside this Python")
    flags = [
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    command = ["-m", "vitshrink", "compress", str(vit_directory), "out", "--keep", "0.8", "--method", "svd", "--quiet"]
    done = subprocess.run(
        [launcher, "launch", *flags, *command],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not checksums.broken_files(tmp_path / "out")
