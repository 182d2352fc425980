"""The whole job on an embedded example: train a small ViT, compress it with each method for linear layers, compare.

Needs no network and no files: the scanned digits ship inside scikit-learn.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

from vitshrink.config.options import CompressConfig
from vitshrink.errors import OutputError
from vitshrink.evaluation.quality import Accuracy
from vitshrink.jobs.compress import compress
from vitshrink.jobs.digits import CALIBRATION_IMAGES, EPOCHS, HELD_OUT, train_digits_model, write_digits
from vitshrink.methods import attention_methods, available_methods
from vitshrink.report import Report, render_comparison_html, write_text

KEEP = 0.5

MARKER = ".vitshrink-demo"

RELOAD_SCRIPT = '''\
"""Count what checkpoints, loaded with stock transformers calls, get right: reload.py IMAGES CHECKPOINT..."""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import vitshrink  # noqa: F401 (registers the checkpoint format)

folder, checkpoints = Path(sys.argv[1]), sys.argv[2:]
files = sorted(folder.glob("*/*.png"))
images = [Image.open(file).convert("RGB") for file in files]
correct = {}
for checkpoint in checkpoints:
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageClassification.from_pretrained(checkpoint).eval()
    with torch.inference_mode():
        logits = model(**processor(images, return_tensors="pt")).logits
    names = [model.config.id2label[index] for index in logits.argmax(dim=-1).tolist()]
    correct[checkpoint] = sum(name == file.parent.name for name, file in zip(names, files, strict=True))
json.dump(correct, sys.stdout)
'''


@dataclass(frozen=True)
class DemoResult:
    """The reports by output directory, best first, and the file that compares them."""

    reports: dict[Path, Report]
    comparison: Path


@dataclass(frozen=True)
class WarningsOnly:
    """Follows a job for its warnings; the jobs are too short for progress."""

    echo: Callable[[str], None]

    def stage(self, _title: str, _total: int | None = None) -> AbstractContextManager[Callable[[int], None]]:
        return nullcontext(lambda _steps: None)

    def warn(self, message: str) -> None:
        self.echo(f"  warning: {message}")


def run_demo(
    output: Path,
    echo: Callable[[str], None],
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    methods: Sequence[str] | None = None,
) -> DemoResult:
    """Train, compress with every method for linear layers (or ``methods``), reload in a fresh process, and compare.

    ``output`` is replaced when an earlier demo left it. ``echo`` receives the lines meant for the reader.
    Raises DependencyError without scikit-learn and OutputError when ``output`` holds something else or a
    reloaded checkpoint does not give the accuracy that its report states.
    """
    digits, model = output / "digits", output / "model"
    _prepare_output(output)
    write_digits(digits, seed=seed)
    echo(f"Training a ViT on the scanned digits of scikit-learn ({epochs} epochs) …")
    started = time.perf_counter()
    train_digits_model(digits / "train", model, seed=seed, epochs=epochs)
    echo(f"  {time.perf_counter() - started:.0f} s: {model}")

    methods = methods or available_methods()
    left_out = sorted({*available_methods(), *attention_methods()} - {*methods})
    echo(f"Comparing the methods {', '.join(methods)}; not part of the demo: {', '.join(left_out)}.")
    reports: dict[Path, Report] = {}
    for method in methods:
        echo(f"Compressing it to {KEEP:.0%} of its parameters: {method}")
        config = CompressConfig(
            model=str(model),
            output=str(output / "compressed" / method),
            method=method,
            keep=(KEEP,),
            calibration=str(digits / "calibration"),
            samples=CALIBRATION_IMAGES,
            eval=str(digits / "val"),
            seed=seed,
            offline=True,
        )
        for result in compress(config, WarningsOnly(echo)):
            assert result.directory is not None  # only a dry run has none
            reports[Path(result.directory)] = result.report

    echo("Reloading every checkpoint in a fresh process with stock transformers calls …")
    expected = {directory: _accuracies(report)[1].correct for directory, report in reports.items()}
    check_reload(output / "reload.py", digits / "val", expected)
    echo("  each gets as many images right as its report says")

    reports = dict(sorted(reports.items(), key=lambda item: _accuracies(item[1])[1].correct, reverse=True))
    table = comparison_table(list(reports.values()))
    comparison = output / "comparison.md"
    write_text(comparison, _comparison_page(table, reports))
    page = output / "comparison.html"
    write_text(page, render_comparison_html(list(reports.values())))
    echo(f"\n{table}\n\nReport: {comparison} and {page}; report.md and report.json lie beside the weights.")
    return DemoResult(reports, comparison)


def reload_correct(script: Path, images: Path, checkpoints: Iterable[Path]) -> dict[Path, int]:
    """Write ``script``, which uses stock transformers calls only, and run it in a new process.

    Returns how many of ``images/<class>/*.png`` each checkpoint gets right. Raises OutputError when the
    process fails.
    """
    script.write_text(RELOAD_SCRIPT, encoding="utf-8")
    command = [sys.executable, str(script), str(images), *map(str, checkpoints)]
    # the package's own folder, so that a source tree that is not installed works too
    import_path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": import_path}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise OutputError(
            f"{script} could not reload the checkpoints (exit code {process.returncode}):\n{process.stderr}"
        )
    return {Path(checkpoint): correct for checkpoint, correct in json.loads(process.stdout).items()}


def check_reload(script: Path, images: Path, expected: Mapping[Path, int]) -> None:
    """Raises OutputError when a checkpoint, reloaded in a new process, gets another number right than expected."""
    for checkpoint, correct in reload_correct(script, images, expected).items():
        if correct != expected[checkpoint]:
            raise OutputError(
                f"{checkpoint} gets {correct} images right in a fresh process, but its report says "
                f"{expected[checkpoint]}: do not use it, and please report this as a bug."
            )


def comparison_table(reports: Sequence[Report]) -> str:
    """A line for the dense model and for each report: Markdown, padded so that it reads well on a terminal too."""
    lines = [["method", "kept", "top-1", "95 % interval", "same as dense", "KL", "seconds"]]
    dense, _ = _accuracies(reports[0])
    lines.append(["(dense)", "100.0 %", f"{dense.top1:.4f}", _interval(dense), "100.0 %", "0.000", ""])
    for report in reports:
        _, scores = _accuracies(report)
        fidelity = report.evaluation and report.evaluation.fidelity
        assert fidelity is not None
        assert fidelity.agreement is not None
        lines.append(
            [
                report.method,
                f"{100 * report.parameters.kept:.1f} %",
                f"{scores.top1:.4f}",
                _interval(scores),
                f"{100 * fidelity.agreement:.1f} %",
                f"{fidelity.kl:.3f}",
                f"{sum(report.timings.values()):.1f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])


def _accuracies(report: Report) -> tuple[Accuracy, Accuracy]:
    """Of the dense and of the compressed model: the digits have labels, and both models were run on them."""
    assert report.evaluation is not None
    dense, compressed = report.evaluation.dense, report.evaluation.compressed
    assert isinstance(dense, Accuracy)
    assert isinstance(compressed, Accuracy)
    return dense, compressed


def _interval(scores: Accuracy) -> str:
    return f"{scores.interval.low:.3f} to {scores.interval.high:.3f}"


def _comparison_page(table: str, reports: Mapping[Path, Report]) -> str:
    links = "\n".join(
        f"- {report.method}: [report](compressed/{directory.name}/report.md)" for directory, report in reports.items()
    )
    return (
        "# Compression methods on the digits\n\n"
        "A ViT trained on the scanned digits of scikit-learn, compressed to "
        f"{KEEP:.0%} of its parameters\nwith {CALIBRATION_IMAGES} unlabeled training images. "
        f"Evaluated on {HELD_OUT} images that neither training nor\ncompression has seen. "
        "KL (nats) is the divergence from the dense model.\n\n"
        f"{table}\n\n{links}\n"
    )


def _prepare_output(output: Path) -> None:
    """Make ``output`` an empty demo folder; remove only what an earlier demo wrote."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file: choose another --output.")
    if output.is_dir() and any(output.iterdir()) and not (output / MARKER).is_file():
        raise OutputError(f"{output} is not empty and was not written by the demo: choose another --output.")
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / MARKER).touch()
        for part in ("digits", "model", "compressed"):
            if (output / part).exists():
                rmtree(output / part)
    except OSError as error:
        raise OutputError(f"cannot write the demo to {output}: {error}. Choose another --output.") from error
