"""What each technique keeps and costs on one checkpoint, without and with a short recovery: one table.

Every row is a job of ``vitshrink compress``, written, read again and measured as the tool does it. Figures are kept in
--results, so that a run that was stopped goes on, and rows of several runs make one table.

    python benchmarks/techniques.py --model MODEL --calibration UNLABELED --eval LABELED --results tiny.json \\
        --keep 0.93 --tokens 100 148 --landmarks 49 --recovery 1 --stop-after 10
    python benchmarks/techniques.py --results tiny.json
"""

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results import Results
from tables import print_circumstances, print_head, print_row
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from vitshrink.config.options import CompressConfig, DataConfig, FinetuneConfig
from vitshrink.data import Preprocessor, SampleSet
from vitshrink.data.opening import open_data
from vitshrink.errors import VitshrinkError
from vitshrink.evaluation.measurement import measure_each
from vitshrink.evaluation.quality import Fidelity
from vitshrink.jobs.compress import compress
from vitshrink.models.checkpoint import load
from vitshrink.models.loading import load_dense
from vitshrink.models.resolution import set_resolution
from vitshrink.models.tasks import task_of
from vitshrink.runtime.observer import Job, Silent

LAYERS = ("svd", "asvd", "pca", "whitened", "mixed-rank", "curvature")
ATTENTIONS = ("qk-joint", "vo-joint", "heads-joint", "cholesky")
TENSORS = {
    "tucker": {"form": "tucker"},
    "tucker of 3 blocks": {"form": "tucker", "blocks": 3},
    "cp": {"form": "cp"},
    "tt": {"form": "tt"},
}
OUTPUTS = ("pca", "whitened")
OUTPUT = r"o_proj$|attention\.output\.dense$"
COLUMNS = ("technique", "parameters", "MACs", "time", "top-1", "KL", "top-1 recovered", "KL recovered")


def techniques(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Rows by name: the entries of a config that differ from row to row."""
    found: dict[str, dict[str, Any]] = {}
    for fraction in given.keep:
        size = {"keep": (fraction,)}
        for method in (*LAYERS, *ATTENTIONS):
            found[f"{method} {fraction:g}"] = {"method": method, **size}
        for form, options in TENSORS.items():
            found[f"tensor {form} {fraction:g}"] = {"method": "tensor", "options": options, **size}
        for method in OUTPUTS:
            found[f"output projections, {method} {fraction:g}"] = {"method": method, "include": (OUTPUT,), **size}
    for budget in given.tokens:
        for scorer in given.scorers:
            tokens = {"tokens": "mixed", "token_budget": budget, "token_scorer": scorer}
            found[f"{budget} tokens, {scorer}"] = tokens
            if scorer == given.scorers[0]:
                for fraction in given.keep:
                    found[f"{budget} tokens, curvature {fraction:g}"] = {**tokens, "keep": (fraction,)}
    for landmarks in given.landmarks:
        for form in given.forms:
            found[f"{landmarks} landmarks, {form}"] = {"landmarks": landmarks, "landmark_form": form}
    return found


def show(results: Results) -> None:
    known = dict(results.circumstances)
    resolution = known.pop("resolution")
    where = "" if resolution is None else f" at {resolution} pixels"
    print_circumstances(f"Techniques on {known.pop('model')}{where}", **known)
    shown = len(COLUMNS) if any(name.endswith(RECOVERED) for name in results.rows) else COLUMNS.index("top-1 recovered")
    print_head(COLUMNS[:shown])
    for name in results.rows:
        if not name.endswith(RECOVERED):
            print_row(cells(name, results.rows[name], results.rows.get(name + RECOVERED))[:shown])


RECOVERED = ", recovered"


def cells(name: str, figures: Mapping[str, Any], recovered: Mapping[str, Any] | None) -> list[str]:
    shares = [f"{figures[key]:.3f}" if key in figures else "–" for key in ("parameters", "macs", "time")]
    scores = [
        f"{found[key]:.3f}" if found and found.get(key) is not None else "–"
        for found in (figures, recovered)
        for key in ("top1", "kl")
    ]
    return [name, *shares, *scores]


@dataclass
class Bench:
    """The dense model and the samples that all rows are measured on."""

    given: argparse.Namespace
    results: Results
    dense: nn.Module
    preprocessor: Preprocessor
    samples: SampleSet

    @classmethod
    def of(cls, given: argparse.Namespace, results: Results) -> "Bench":
        source = load_dense(given.model, offline=True)
        if given.resolution is not None:
            set_resolution(source.model, given.resolution)
        preprocessor = Preprocessor.from_checkpoint(
            source.directory, source.family.modality, offline=True, resolution=given.resolution
        )
        samples = open_data(DataConfig(given.eval), source, offline=True).at_most(given.limit, 0)
        kept = None if results.file is None else results.file.with_suffix(".dense.pt")
        return cls(given, results, Remembered(source.model, kept), preprocessor, samples)

    def run(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """The rows that are not known yet, until the time is over."""
        begun, waiting = time.monotonic(), [name for name in rows if name not in self.results.rows]
        while waiting and time.monotonic() - begun < 60 * self.given.stop_after:
            name, start = waiting.pop(0), time.monotonic()
            try:
                figures = self._row(rows[name])
            except VitshrinkError as error:
                figures = {"error": str(error)}
            self.results.add(name, figures)
            print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        for name in waiting:
            print(f"{name}: not run, run again to go on", file=sys.stderr)

    def _row(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Figures of one job, and of what it wrote."""
        given = self.given
        with tempfile.TemporaryDirectory() as directory:
            output = str(Path(directory) / "out")
            common = {
                "calibration": given.calibration,
                "samples": given.samples,
                "holdout": 0,
                "resolution": given.resolution,
                "latency": tuple(given.latency),
                "offline": True,
            }
            (result,) = compress(CompressConfig(given.model, output, **{**common, **entries}))
            report, model = result.report, load(output, dtype=torch.float32)
        timed = report.latency.by_batch_size
        (measured,) = measure_each(
            [model],
            self.samples,
            self.preprocessor,
            Job(Silent()),
            task=task_of(model),
            baseline=self.dense,
            device=model.device,
            batch_size=32,
        )
        evaluation, fidelity = measured.evaluation, measured.evaluation.fidelity or Fidelity()
        qualities = {"dense": evaluation.dense, "compressed": evaluation.compressed}
        top1 = {role: None if quality is None else quality.score("top1") for role, quality in qualities.items()}
        if "dense" not in self.results.rows:
            self.results.add("dense", {"parameters": 1.0, "macs": 1.0, "time": 1.0, "top1": top1["dense"], "kl": 0.0})
        figures = {
            "parameters": report.parameters.kept,
            "macs": report.macs.kept,
            "time": report.latency_ratio,
            "times": {each.batch_size: each.compressed.median for each in timed},
            "seconds": sum(report.timings.values()),
            "top1": top1["compressed"],
            "kl": fidelity.kl,
            "agreement": fidelity.agreement,
        }
        if report.recovery is not None:
            figures |= {"epochs": report.recovery.history[-1].epoch, "best_step": report.recovery.best_step}
        return figures


class Remembered(nn.Module):
    """A model that is asked the same for every row, and answers each question once; ``file`` keeps its answers."""

    def __init__(self, model: PreTrainedModel, file: Path | None) -> None:
        super().__init__()
        self.model, self.config, self.file = model, model.config, file
        self.answers: dict[str, Tensor] = {}
        if file is not None and file.exists():
            self.answers = torch.load(file, weights_only=True)

    def forward(self, **inputs: Tensor) -> Any:
        digest = hashlib.sha256()
        for name, tensor in sorted(inputs.items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        key = digest.hexdigest()
        if key not in self.answers:
            self.answers[key] = self.model(**inputs).logits
            if self.file is not None:
                torch.save(self.answers, self.file)
        return ImageClassifierOutput(logits=self.answers[key])


def circumstances(given: argparse.Namespace) -> dict[str, Any]:
    """What all rows of a table have in common."""
    return {
        "model": Path(given.model).name,
        "resolution": given.resolution,
        "calibration": f"{given.samples} samples of {Path(given.calibration).name}",
        "evaluation": f"{'all' if given.limit is None else given.limit} samples of {Path(given.eval).name}",
        "recovery": f"label-free distillation, {given.recovery:g} epochs of {given.recovery_samples} such samples",
        "time": f"of a batch of {given.latency[0]}",
        "columns": "fractions of the dense model's; KL(dense ‖ compressed) in nats",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--calibration", help="unlabeled samples")
    parser.add_argument("--eval", help="labeled samples")
    parser.add_argument("--results", type=Path, help="file (JSON) that keeps the figures; alone: its table")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--limit", type=int, help="evaluate on this many")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.93], help="of the whole model's parameters")
    parser.add_argument("--tokens", type=int, nargs="*", default=[], help="patches an image, for image models")
    parser.add_argument("--scorers", nargs="+", default=["blur", "features"])
    parser.add_argument("--landmarks", type=int, nargs="*", default=[], help="of attention maps, for image models")
    parser.add_argument("--forms", nargs="+", default=["pooled", "nystrom"], help="of such maps")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--recovery", type=float, default=1, metavar="EPOCHS", help="of training; 0: rows without it")
    parser.add_argument("--recovery-samples", type=int, default=500, help="to train on, of the calibration data")
    parser.add_argument(
        "--latency", type=int, nargs="+", default=[1], help="batch sizes to time; the table has the first"
    )
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="rows whose name contains one of these")
    parser.add_argument("--skip", nargs="+", metavar="TEXT", default=[], help="rows whose name contains one of these")
    parser.add_argument("--stop-after", type=float, default=float("inf"), metavar="MINUTES", help="begin no row later")
    given = parser.parse_args(arguments)
    if not (given.model and given.calibration and given.eval):
        show(Results.of(given.results, None))
        return
    results = Results.of(given.results, circumstances(given))
    rows = techniques(given)
    if given.recovery:
        training = {
            "finetune": FinetuneConfig(data=given.calibration, epochs=given.recovery, samples=given.recovery_samples)
        }
        rows |= {name + RECOVERED: entries | training for name, entries in rows.items()}
    chosen = {
        name: row
        for name, row in rows.items()
        if (not given.only or any(text in name for text in given.only)) and not any(text in name for text in given.skip)
    }
    Bench.of(given, results).run(chosen)
    show(results)


if __name__ == "__main__":
    main()
