"""Size against quality: ours and the peers, each in the bytes of its own files, in one table of one run.

    python benchmarks/bytes.py --model MODEL --calibration UNLABELED --eval LABELED --samples 256 \\
        --sizes 5.0MB 4.2MB 3.5MB 3.0MB 2.6MB 2.0MB --results deit-tiny.json --picture deit-tiny.svg
    python benchmarks/bytes.py --results deit-tiny.json --picture deit-tiny.svg

Every model answers the same samples after the same preprocessing, beside the dense model in float32. Figures are kept
in --results: rows that are there are not run again unless --again names them; the second command only prints.
"""

import argparse
import fnmatch
import importlib.metadata
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import torch
from peers.registry import PEERS, Built, Material, Peer, Row
from picture import draw_bytes
from remembered import ReadOnce, Remembered
from results import Results
from tables import mean_and_deviation, print_circumstances, print_head, print_row
from torch import nn

from vitshrink.config.options import DataConfig
from vitshrink.data import Preprocessor, SampleSet, overlap
from vitshrink.data.opening import open_data, read_calibration
from vitshrink.errors import VitshrinkError
from vitshrink.evaluation import Evaluation
from vitshrink.evaluation.measurement import measure
from vitshrink.models.loading import load_dense
from vitshrink.models.tasks import task_of
from vitshrink.runtime.observer import Job, Silent
from vitshrink.runtime.records import plain

FIDELITIES = {
    "kl": "KL",
    "agreement": "same prediction",
    "pooled_cosine": "pooled cosine",
    "prediction_spearman": "prediction spearman",
}
"""Figures of an evaluation that a table shows where there are any, and its headings."""


@dataclass
class Bench:
    """The data that all rows share, and how a model is measured on them."""

    material: Material
    samples: SampleSet
    preprocessor: ReadOnce
    baseline: nn.Module
    batch_size: int

    @classmethod
    def open(cls, args: argparse.Namespace, folder: Path) -> "Bench":
        source = load_dense(args.model, offline=args.offline)
        preprocessor = Preprocessor.from_checkpoint(
            source.directory, source.family.modality, max_length=args.max_length, offline=args.offline
        )
        samples = open_data(DataConfig(args.eval), source, offline=args.offline).at_most(args.limit, 0)
        unlabeled = open_data(DataConfig(args.calibration), source, offline=args.offline)
        options = {"samples": args.samples, "batch_size": args.batch_size}
        calibrations = {
            seed: read_calibration(unlabeled, preprocessor, Job(Silent()), seed=seed, **options) for seed in args.seeds
        }
        if shared := max(overlap(calibration.samples, samples) for calibration in calibrations.values()):
            print(f"warning: {shared} evaluation samples are among the calibration samples", file=sys.stderr)
        material = Material(source, args.model, args.calibration, args.samples, calibrations, args.sizes, folder)
        # masked-token figures hook into the model itself, so that its outputs cannot be played back
        baseline = source.model if source.task == "masked-lm" else Remembered(source.model)
        return cls(material, samples, ReadOnce(preprocessor), baseline, args.batch_size)

    def evaluate(self, model: nn.Module) -> Evaluation:
        source = self.material.source
        return measure(
            model,
            self.samples,
            self.preprocessor,  # type: ignore[arg-type]
            Job(Silent()),
            task=task_of(source.model),
            baseline=self.baseline,
            device=torch.device("cpu"),
            batch_size=self.batch_size,
            embedding=source.embedding,
            labeled=self.samples.labels_are is not None,
        ).evaluation

    def run(self, row: Row, seed: int) -> dict[str, Any]:
        """The figures of one row and seed."""
        with tempfile.TemporaryDirectory(dir=self.material.folder) as folder:
            started = time.perf_counter()
            with redirect_stdout(sys.stderr):  # some packages tell their progress where the table goes
                built: Built = row.build(self.material, seed, Path(folder))
            seconds = time.perf_counter() - started if built.seconds is None else built.seconds
            found = self.evaluate(built.model)
        figures = {} if found.fidelity is None else plain(found.fidelity)
        known = {name: figures[name] for name in FIDELITIES if figures.get(name) is not None}
        score = {"score": found.score, "metric": found.metric} if found.score is not None else {}
        return {"bytes": built.nbytes, "seconds": seconds, **known, **score}


def rows_of(sizes: Sequence[str], chosen: Sequence[str]) -> list[tuple[Peer, Row]]:
    """Rows whose peer's name or whose own matches one of the patterns."""
    rows = [(peer, row) for peer in PEERS.values() for row in peer.rows(sizes)]
    return [(peer, row) for peer, row in rows if matches((peer.name, row.name), chosen)]


def matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def run_rows(bench: Bench, rows: Sequence[tuple[Peer, Row]], results: Results, again: Sequence[str]) -> None:
    """Every row that is not known yet, or is wanted again; what stops one becomes its reason."""
    for peer, row in rows:
        if row.name in results.rows and not matches((peer.name, row.name), again):
            continue
        print(f"{row.name} …", file=sys.stderr, flush=True)
        seeds = list(bench.material.calibrations) if row.calibrated else list(bench.material.calibrations)[:1]
        try:
            found = [bench.run(row, seed) for seed in seeds]
        except ImportError as error:
            results.add(row.name, {"skipped": str(error)})
        except VitshrinkError as error:
            results.add(row.name, {"skipped": str(error)})
        except Exception as error:
            if not peer.packages:
                raise
            results.add(row.name, {"skipped": f"{type(error).__name__}: {error}"})
        else:
            results.add(row.name, {"stored": row.stored, "seeds": found})
        print(f"{row.name}: {results.rows[row.name]}", file=sys.stderr, flush=True)


def show(results: Results) -> None:
    """The table, and below it the rows that are missing from it, with the reasons."""
    known = dict(results.circumstances)
    print_circumstances(f"Bytes against quality: {known.pop('model')}", **known)
    done = {name: row for name, row in results.rows.items() if "seeds" in row}
    seen = [figures for row in done.values() for figures in row["seeds"]]
    fidelities = [name for name in FIDELITIES if any(name in figures for figures in seen)]
    metrics = {figures["metric"] for figures in seen if "metric" in figures}
    headings = [FIDELITIES[name] for name in fidelities]
    print_head(["variant", "stored", "bytes", *headings, *metrics, "seconds"], texts=2)
    for name, row in done.items():
        seeds = row["seeds"]
        # to three digits, since the divergences of a table differ by orders of magnitude
        cells = [mean_and_deviation([each.get(kind) for each in seeds], ".3g") for kind in fidelities if kind == "kl"]
        cells += [mean_and_deviation([each.get(kind) for each in seeds], ".4f") for kind in fidelities if kind != "kl"]
        cells += [mean_and_deviation([each.get("score") for each in seeds], ".4f")] * len(metrics)
        seconds = mean_and_deviation([each["seconds"] for each in seeds], ".1f")
        print_row([name, row["stored"], f"{max(each['bytes'] for each in seeds):,}", *cells, seconds])
    for name, row in results.rows.items():
        if "skipped" in row:
            print(f"\n{name}: skipped, {' '.join(row['skipped'].split())}")


def circumstances(args: argparse.Namespace, samples: SampleSet) -> dict[str, Any]:
    """What all rows of a table have in common."""
    packages = ("nncf", "openvino", "onnxruntime", "torchao")
    return {
        "model": Path(args.model).name,
        "calibration": f"{args.samples} samples of {Path(args.calibration).name}, unlabeled",
        "seeds": ", ".join(map(str, args.seeds)),
        "evaluation": f"{len(samples)} samples of {Path(args.eval).name}",
        "peers": ", ".join(f"{package} {version(package)}" for package in packages),
        "columns": "bytes of the files with the weights (OpenVINO: and the graph); KL(dense ‖ variant) in nats",
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument("--model", help="dense checkpoint: a directory or a Hub id")
    known.add_argument("--calibration", help="samples to calibrate on, as for vitshrink compress")
    known.add_argument("--eval", help="labeled samples to test on")
    known.add_argument("--samples", type=int, default=256, help="calibration samples (default: 256)")
    known.add_argument("--limit", type=int, help="test samples (default: all)")
    known.add_argument("--sizes", nargs="*", default=[], metavar="SIZE", help="of our rows, such as 3.5MB")
    known.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="calibration seeds")
    known.add_argument("--rows", nargs="+", default=["*"], metavar="PATTERN", help="peers or rows of such names")
    known.add_argument("--again", nargs="+", default=[], metavar="PATTERN", help="run these though --results has them")
    known.add_argument("--results", type=Path, help="file (JSON) that keeps the figures; alone: its table")
    known.add_argument("--picture", type=Path, help="file (SVG, PNG …) to draw bytes against KL into")
    known.add_argument("--batch-size", type=int, default=32)
    known.add_argument("--max-length", type=int)
    known.add_argument("--threads", type=int)
    known.add_argument("--offline", action="store_true")
    known.epilog = f"peers ({peers.__name__}/): {', '.join(PEERS)}"
    return known


def measured(args: argparse.Namespace) -> Results:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench.open(args, Path(folder))
        results = Results.of(args.results, circumstances(args, bench.samples))
        run_rows(bench, rows_of(args.sizes, args.rows), results, args.again)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    known = parser()
    args = known.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    given = [args.model, args.calibration, args.eval]
    if not all(given) and (any(given) or args.results is None):
        known.error("--model, --calibration and --eval say what to run; --results alone prints what was run")
    try:
        results = measured(args) if all(given) else Results.of(args.results, None)
        show(results)
        if args.picture is not None:
            draw_bytes(results.rows, args.picture)
    except VitshrinkError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
