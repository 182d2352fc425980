"""Time against quality: ours and the peers, each in the runtime that it is made for, timed in turn in one run.

    python benchmarks/latency.py --model MODEL --calibration UNLABELED --eval LABELED --samples 64 \\
        --work deit-tiny-latency --picture deit-tiny-latency.svg
    python benchmarks/latency.py --random --samples 8 --blocks 4 --work vit-b-latency    # ViT-B/16, random, time alone
    python benchmarks/latency.py --work deit-tiny-latency --picture deit-tiny-latency.svg

Models are built once, into --work, with what they lose; a run that was stopped goes on there. Then all of
them are timed in one run, in turn, the shortest pass of each: again whenever something was built, or with --again. The
third command only prints. Texts are timed on the same samples in batches as they come, and in batches of one length.
With --fixed, OpenVINO knows the number of images in a batch, of all models alike, as with ``export --batch-size``. With
--recover, there are also merged tokens that were distilled from the dense model, on all the samples without labels.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bytes as byte_table
import torch
from job import random_vit
from latency_rows import BASELINE, Bench, Row, rows_of
from peers.registry import Material
from picture import draw_times
from results import Results
from tables import print_circumstances, print_head, print_row
from torch import Tensor, nn

from vitshrink.config.options import FinetuneConfig
from vitshrink.data.opening import CalibrationData
from vitshrink.errors import VitshrinkError
from vitshrink.models import cost
from vitshrink.models.example import example_inputs
from vitshrink.models.exported import KINDS
from vitshrink.models.loading import held
from vitshrink.models.onnx_model import OnnxModel
from vitshrink.models.openvino_model import SUFFIX as IR_SUFFIX
from vitshrink.runtime.modes import threads
from vitshrink.runtime.records import plain

TEXTS = 64
"""Texts that are timed, in batches."""

FIGURES = {"kl": ".2g", "agreement": ".3f"}
"""Of an evaluation, and how they are written."""

TIMES = {False: "of the clock", True: "of the processor"}

Batches = Sequence[Mapping[str, Tensor]]


def build(bench: Bench, rows: Sequence[Row], results: Results, work: Path) -> bool:
    """Build what is not there, and judge it; what stops a row becomes its reason. Whether anything was built."""
    built = False
    for row in rows:
        if "skipped" not in results.rows.get(row.name, {"skipped": "not yet"}):
            continue
        print(f"{row.name} …", file=sys.stderr, flush=True)
        folder, built = work / "".join(c if c.isalnum() else "-" for c in row.name), True
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with redirect_stdout(sys.stderr):  # some packages tell their progress where the table goes
                file = None if row.build is None else row.build(bench, folder)
                figures = {} if file is None else _judged(bench, _opened(bench, row, file))
        except (ImportError, VitshrinkError) as error:
            results.add(row.name, {"skipped": str(error)})
        except Exception as error:
            if row.name.startswith("ours") and "NNCF" not in row.name:
                raise
            results.add(row.name, {"skipped": f"{type(error).__name__}: {error}"})
        else:
            results.add(row.name, figures | {"file": None if file is None else str(file.relative_to(work))})
    return built


def _opened(bench: Bench, row: Row, file: Path | None) -> nn.Module:
    if file is None:
        assert row.run is not None
        return row.run(bench.dense)
    dense = bench.dense
    return OnnxModel(KINDS[file.suffix].open(file), dense.config, type(dense).__name__).eval()


def _judged(bench: Bench, model: nn.Module) -> dict[str, Any]:
    if bench.table is None:
        return {}
    found = bench.table.evaluate(model)
    figures = {} if found.fidelity is None else plain(found.fidelity)
    return {name: figures[name] for name in FIGURES if figures.get(name) is not None}


class Through(nn.Module):
    """A model that is run over batches: a pass of all of them."""

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        super().__init__()
        self.model, self.batches = model, batches

    def forward(self) -> None:
        for batch in self.batches:
            self.model(**batch)


def workloads(bench: Bench, batch_sizes: Sequence[int]) -> dict[str, Batches]:
    """What is timed: a random batch of images of each size, or texts in batches, by length and as they come."""
    if bench.dense.main_input_name == "pixel_values":
        return {f"batch of {size}": [example_inputs(bench.dense, size)] for size in batch_sizes}
    assert bench.table is not None
    texts, found = bench.table.samples.at_most(TEXTS, 0), {}
    for size in batch_sizes:
        for how, in_order in (("by length", False), ("as they come", True)):
            if size > 1 or in_order:
                batches = bench.table.preprocessor.preprocessor.batches(texts, size, in_order=in_order)
                name = f"batch of {size}, {how}" if size > 1 else "batch of 1"
                found[name] = [batch.inputs for batch in batches]
    return found


def time_all(bench: Bench, rows: Sequence[Row], results: Results, work: Path, args: argparse.Namespace) -> None:
    """All models of the table in turn, and the shortest pass of each in milliseconds."""
    known = {row.name: row for row in rows}
    clock = time.process_time if args.cpu_time else time.perf_counter
    there = {name: found for name, found in results.rows.items() if "skipped" not in found and name in known}
    for load, batches in workloads(bench, args.batches).items():
        fixed = args.fixed and "pixel_values" in batches[0]
        name = f"{load}, fixed" if fixed else load
        print(f"timing {name} …", file=sys.stderr, flush=True)
        models = {}
        for each, found in there.items():
            file = None if found["file"] is None else work / found["file"]
            if fixed and file is not None and file.suffix == IR_SUFFIX:
                file = _fixed(file, batches[0]["pixel_values"])
            models[each] = Through(_opened(bench, known[each], file), batches).eval()
        taken = cost.passes(models, {each: {} for each in models}, repeats=args.repeats, clock=clock)
        for each, seconds in taken.items():
            times = results.rows[each].get("times", {}) | {name: 1000 * min(seconds) / len(batches)}
            results.add(each, results.rows[each] | {"times": times})


def _fixed(file: Path, pixels: Tensor) -> Path:
    """The same IR for batches of one size, written once."""
    import openvino

    found = file.with_name(f"{file.stem}-{len(pixels)}{IR_SUFFIX}")
    if not found.exists():
        model = openvino.Core().read_model(file)
        model.reshape(list(pixels.shape))
        openvino.save_model(model, found, compress_to_fp16=False)
    return found


def show(results: Results) -> None:
    """The table, as multiples of PyTorch's time, and the rows that are missing from it, with the reasons."""
    known = dict(results.circumstances)
    print_circumstances(f"Time against quality: {known.pop('model')}", **known)
    done = {name: row for name, row in results.rows.items() if row.get("times")}
    if not done:
        raise SystemExit("nothing was timed yet.")
    baseline = done[BASELINE]["times"]
    print_head(["variant", "KL", "same prediction", *(head for name in baseline for head in (f"{name}, ms", "time"))])
    for name, row in done.items():
        figures = [format(row[key], form) if key in row else "–" for key, form in FIGURES.items()]
        times = [(row["times"].get(each), baseline[each]) for each in baseline]  # some rows may have come later
        cells = ["–" if taken is None else f"{taken / by:.2f}" for taken, whole in times for by in (1.0, whole)]
        print_row([name, *figures, *cells])
    for name, row in results.rows.items():
        if "skipped" in row:
            print(f"\n{name}: skipped, {' '.join(row['skipped'].split())}")


def opened(args: argparse.Namespace, work: Path) -> Bench:
    """The bench of a model, or of random weights and random pixels."""
    if not args.random:
        table = byte_table.Bench.open(args, work)
        recover = None
        if args.recover:
            rate, augment = args.learning_rate, args.augment
            recover = FinetuneConfig(data=args.calibration, epochs=args.recover, learning_rate=rate, augment=augment)
        return Bench(table.material, table, args.fractions, False, args.latencies, max(args.batches), recover)
    model = random_vit(args.blocks)
    pixels = example_inputs(model, args.samples)
    batch: Any = SimpleNamespace(inputs=pixels, mask=None, keys=list(range(args.samples)))
    calibration: Any = SimpleNamespace(batches=[batch])
    calibrations: dict[int, CalibrationData] = {0: calibration}
    source = held(model, torch.float32)
    material = Material(source, "random", "random pixels", args.samples, calibrations, (), work)
    return Bench(material, None, args.fractions, True)


def circumstances(args: argparse.Namespace) -> dict[str, Any]:
    """What all rows of a table have in common."""
    known = {
        "model": f"ViT-B/16, random, {args.blocks} blocks" if args.random else Path(args.model).name,
        "calibration": f"{args.samples} samples",
        "evaluation": "none" if args.random else f"{args.limit or 'all'} samples of {Path(args.eval).name}",
        "threads": args.threads,
        "time": f"{TIMES[args.cpu_time]}, shortest pass of each, all in turn in one run; as a multiple of PyTorch's",
        "merged tokens": "fractions of the operations",
    }
    if args.latencies:
        known |= {"--target-latency": "of the dense model's time in the same runtime, for the largest batch"}
    packages = ("nncf", "openvino", "onnxruntime")
    return known | {"peers": ", ".join(f"{each} {byte_table.version(each)}" for each in packages)}


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument("--model", help="dense checkpoint: a directory or a Hub id")
    known.add_argument("--random", action="store_true", help="ViT-B/16 with random weights instead, for time alone")
    known.add_argument("--blocks", type=int, default=12, help="of the random model (default: 12)")
    known.add_argument("--calibration", help="samples to calibrate on, as for vitshrink compress")
    known.add_argument("--eval", help="samples to test on")
    known.add_argument("--samples", type=int, default=64, help="calibration samples (default: 64)")
    known.add_argument("--limit", type=int, help="test samples (default: all)")
    known.add_argument("--fractions", type=float, nargs="*", default=[0.77, 0.67, 0.5], metavar="F")
    known.add_argument(
        "--latencies", type=float, nargs="*", default=[], metavar="S", help="of --target-latency, for the largest batch"
    )
    known.add_argument("--recover", type=float, metavar="EPOCHS", help="of distillation, after merging tokens")
    known.add_argument("--learning-rate", type=float, help="of --recover")
    known.add_argument("--no-augment", dest="augment", action="store_false", help="with --recover: samples as they are")
    known.add_argument("--fixed", action="store_true", help="batches of images of one size in OpenVINO")
    known.add_argument("--batches", type=int, nargs="+", default=[1, 8], metavar="N")
    known.add_argument("--rows", nargs="+", default=["*"], metavar="PATTERN", help="rows of such names")
    known.add_argument("--again", action="store_true", help="time again, though nothing was built")
    known.add_argument("--repeats", type=int, default=15)
    known.add_argument("--cpu-time", action="store_true", help="time of the processor, not of the clock: one thread")
    known.add_argument("--threads", type=int, default=1)
    known.add_argument("--batch-size", type=int, default=32, help="of the evaluation")
    known.add_argument("--max-length", type=int)
    known.add_argument("--offline", action="store_true")
    known.add_argument("--work", type=Path, required=True, help="folder that keeps models and figures")
    known.add_argument("--picture", type=Path, help="file (SVG, PNG …) to draw time against KL into")
    known.set_defaults(seeds=[0], sizes=())
    return known


def measured(args: argparse.Namespace) -> Results:
    args.work.mkdir(parents=True, exist_ok=True)
    results = Results.of(args.work / "results.json", circumstances(args))
    with threads(args.threads):
        bench = opened(args, args.work)
        rows = [row for row in rows_of(bench) if byte_table.matches([row.name], args.rows) or row.name == BASELINE]
        if build(bench, rows, results, args.work) or args.again:
            time_all(bench, rows, results, args.work, args)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    known = parser()
    args = known.parse_args(arguments)
    given = [args.model, args.calibration, args.eval]
    if any(given) and not (all(given) and not args.random):
        known.error("--model, --calibration and --eval go together, or --random takes their place")
    try:
        results = measured(args) if args.random or all(given) else Results.of(args.work / "results.json", None)
        show(results)
        if args.picture is not None:
            draw_times(results.rows, args.picture)
    except (VitshrinkError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
