"""What each technique keeps and costs on one checkpoint: methods for layers and attentions, and mixed tokens.

Every row is a job of ``vitshrink compress``, written, read again and measured as the tool does it; nothing is kept.

    python benchmarks/techniques.py --model MODEL --calibration UNLABELLED --eval LABELLED --keep 0.93
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tables import print_circumstances, print_head, print_row

from vitshrink.config import CompressConfig
from vitshrink.errors import VitshrinkError
from vitshrink.pipeline import compress
from vitshrink.report import Report

LAYERS = ("svd", "pca", "whitened", "curvature")
ATTENTIONS = ("qk-joint", "vo-joint", "heads-joint", "cholesky")
OUTPUTS = {
    "attention output, pca": {"method": "pca", "include": (r"o_proj$|attention\.output\.dense$",)},
    "attention output, whitened": {"method": "whitened", "include": (r"o_proj$|attention\.output\.dense$",)},
}


def techniques(keep: Sequence[float], budgets: Sequence[int], scorers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Rows by name: the entries of a config that differ from row to row."""
    found: dict[str, dict[str, Any]] = {}
    for fraction in keep:
        for method in (*LAYERS, *ATTENTIONS):
            found[f"{method} {fraction:g}"] = {"method": method, "keep": (fraction,)}
        for name, entries in OUTPUTS.items():
            found[f"{name} {fraction:g}"] = {**entries, "keep": (fraction,)}
    for budget in budgets:
        for scorer in scorers:
            tokens = {"tokens": "mixed", "token_budget": budget, "token_scorer": scorer}
            found[f"{budget} tokens, {scorer}"] = tokens
            if scorer == scorers[0]:
                for fraction in keep:
                    found[f"{budget} tokens, curvature {fraction:g}"] = {**tokens, "keep": (fraction,)}
    return found


def row(name: str, report: Report) -> list[str]:
    evaluation: Mapping[str, Any] = report.evaluation or {}
    dense, small = (report.latency[role]["median"] for role in ("dense", "compressed"))
    score = (evaluation.get("compressed") or {}).get("top1")
    kl = (evaluation.get("fidelity") or {}).get("kl")
    return [
        name,
        f"{report.parameters['kept']:.3f}",
        f"{report.macs['kept']:.3f}",
        f"{small / dense:.2f}",
        "–" if score is None else f"{score:.3f}",
        "–" if kl is None else f"{kl:.3f}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True, help="unlabelled samples")
    parser.add_argument("--eval", help="labelled samples; without them the fidelity on held-out calibration samples")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--limit", type=int, help="evaluate on this many")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.93], help="of the whole model's parameters")
    parser.add_argument("--tokens", type=int, nargs="*", default=[], help="patches an image, for image models")
    parser.add_argument("--scorers", nargs="+", default=["blur", "features"])
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="rows whose name contains one of these")
    given = parser.parse_args(arguments)
    common = {
        "calibration": given.calibration,
        "samples": given.samples,
        "eval": given.eval,
        "eval_limit": given.limit,
        "resolution": given.resolution,
    }
    shown = False
    for name, entries in techniques(given.keep, given.tokens, given.scorers).items():
        if given.only and not any(text in name for text in given.only):
            continue
        print(name, file=sys.stderr)
        with tempfile.TemporaryDirectory() as directory:
            config = CompressConfig(given.model, str(Path(directory) / "out"), **{**common, **entries})
            try:
                (result,) = compress(config)
            except VitshrinkError as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
        evaluation: Mapping[str, Any] = result.report.evaluation or {}
        if not shown:
            top1 = (evaluation.get("dense") or {}).get("top1")
            print_circumstances(
                f"Techniques on {Path(given.model).name}",
                calibration=f"{given.samples} samples of {Path(given.calibration).name}",
                evaluation=f"{evaluation.get('samples')} samples; dense top-1 {'–' if top1 is None else f'{top1:.3f}'}",
                columns="fractions of the dense model's; time of one sample; KL(dense ‖ compressed) in nats",
            )
            print_head(["technique", "parameters", "MACs", "time", "top-1", "KL"])
            shown = True
        print_row(row(name, result.report))


if __name__ == "__main__":
    main()
