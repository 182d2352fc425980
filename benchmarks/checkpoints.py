"""What compression leaves of several checkpoints, each by the measure of its head, as a Markdown table.

    python benchmarks/checkpoints.py --checkpoint MODEL UNLABELED TEST --checkpoint MODEL2 UNLABELED2 TEST2 \\
        --keep 0.7 0.5 --bits 4 3 --samples 96 --limit 200 --results checkpoints.json
    python benchmarks/checkpoints.py --results checkpoints.json

Each row is a job of ``vitshrink compress``, and dense and compressed model answer the same samples of TEST. Figures are
kept in --results: rows that are there are not run again, and the second command only prints.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import Results
from tables import print_circumstances, print_head, print_row

from vitshrink.config.options import CompressConfig
from vitshrink.errors import TargetError
from vitshrink.jobs.compress import compress
from vitshrink.report.record import Report
from vitshrink.runtime.modes import threads

DIVERGENCES = {"kl": "KL", "relative_error": "error"}
AGREEMENTS = {"agreement": "prediction", "neighbor_agreement": "neighbors", "prediction_spearman": "order"}
"""Figures of a fidelity, and how a cell names them; the first that a head has is shown."""


def run(checkpoint: Sequence[str], size: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one job; what stops it is its reason."""
    model, calibration, test = checkpoint
    with tempfile.TemporaryDirectory() as folder:
        config = CompressConfig(
            model,
            str(Path(folder) / "out"),
            calibration=calibration,
            samples=args.samples,
            holdout=0,
            eval=test,
            eval_limit=args.limit,
            batch_size=args.batch_size,
            seed=args.seed,
            offline=True,
            **size,
        )
        try:
            (result,) = compress(config)
        except TargetError as error:
            return {"skipped": " ".join(str(error).split())}
    return figures_of(result.report)


def figures_of(report: Report) -> dict[str, Any]:
    evaluation, nbytes = report.evaluation, report.bytes
    assert evaluation is not None
    assert nbytes is not None
    fidelity = evaluation.fidelity
    assert fidelity is not None
    scores = (evaluation.dense, evaluation.compressed)
    return {
        "task": evaluation.task,
        "parameters": report.parameters.kept,
        "bytes": nbytes.kept,
        "samples": evaluation.samples,
        "metric": evaluation.metric,
        "scores": [None if each is None else each.score(evaluation.metric) for each in scores],
        "divergence": _first(fidelity, DIVERGENCES),
        "agreement": _first(fidelity, AGREEMENTS),
        "seconds": sum(report.timings.values()),
    }


def _first(fidelity: object, names: dict[str, str]) -> tuple[str, float] | None:
    found = ((word, getattr(fidelity, name)) for name, word in names.items())
    return next((pair for pair in found if pair[1] is not None), None)


def show(results: Results) -> None:
    """The table, and below it the rows that are missing from it, with the reasons."""
    print_circumstances("What compression leaves of real checkpoints", **results.circumstances)
    print_head(["checkpoint", "size", "measure", "parameters", "bytes", "dense", "compressed", "distance", "same"], 3)
    for name, row in results.rows.items():
        if "skipped" in row:
            continue
        shares = [f"{row[each]:.3f}" for each in ("parameters", "bytes")]
        scores = ["–" if score is None else f"{score:.4f}" for score in row["scores"]]
        distance, same = (row[each] or ("–", float("nan")) for each in ("divergence", "agreement"))
        measure = f"{row['metric'] or 'none: no labels'}, {row['samples']} samples"
        cells = [*scores, f"{distance[0]} {distance[1]:.3g}", f"{same[0]} {same[1]:.3f}"]
        print_row([*name.split(": "), measure, *shares, *cells])
    for name, row in results.rows.items():
        if "skipped" in row:
            print(f"\n{name}: {row['skipped']}")


def circumstances(args: argparse.Namespace) -> dict[str, Any]:
    """What all rows of a table have in common."""
    return {
        "calibration": f"{args.samples} samples, unlabeled, seed {args.seed}",
        "evaluation": f"at most {args.limit} samples, the same for dense and compressed",
        "method": "curvature for --keep (ranks), integers for --bits; nothing is trained",
        "columns": "shares of the dense model's parameters and bytes; KL in nats, errors as a share of the spread",
    }


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument(
        "--checkpoint",
        nargs=3,
        action="append",
        default=[],
        metavar=("MODEL", "UNLABELED", "TEST"),
        help="a directory, samples to calibrate on, and samples to test on; repeat it",
    )
    known.add_argument("--keep", type=float, nargs="*", default=[0.7, 0.5], help="shares of the parameters")
    known.add_argument("--bits", type=float, nargs="*", default=[4.0, 3.0], help="bits of a weight")
    known.add_argument("--samples", type=int, default=96, help="calibration samples")
    known.add_argument("--limit", type=int, default=200, help="test samples")
    known.add_argument("--seed", type=int, default=0)
    known.add_argument("--batch-size", type=int, default=16)
    known.add_argument("--threads", type=int)
    known.add_argument("--results", type=Path, help="file (JSON) that keeps the figures; alone: its table")
    return known


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    results = Results.of(args.results, circumstances(args) if args.checkpoint else None)
    sizes = [("keep", {"keep": (share,)}, share) for share in args.keep]
    sizes += [("bits", {"bits": bits}, bits) for bits in args.bits]
    with threads(args.threads):
        for checkpoint in args.checkpoint:
            for kind, size, number in sizes:
                name = f"{Path(checkpoint[0]).name}: {kind} {number:g}"
                if name not in results.rows:
                    print(f"{name} …", file=sys.stderr, flush=True)
                    results.add(name, run(checkpoint, size, args))
                    print(f"{name}: {results.rows[name]}", file=sys.stderr, flush=True)
    show(results)


if __name__ == "__main__":
    main()
