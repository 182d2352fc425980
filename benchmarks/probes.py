"""What the curvature of a sentence encoder should follow: its final vectors, its hidden states, or a mix of both.

    python benchmarks/probes.py --model all-minilm --calibration UNLABELED --eval PAIRS --sizes 8MB 6MB \\
        --shares 0 0.2 0.5 0.8 1 --seeds 0 1 2 --results probes.json
    python benchmarks/probes.py --results probes.json

A share of 0 follows the final vectors alone, 1 the hidden states alone. Each model is made by ``vitshrink.compress``
and judged on the same pairs, by the squared error of the final vectors and by Spearman. --probes is the number of
directions in which gradients are taken. Figures are kept in --results: those that are there are not measured again,
and the second command only prints.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from results import Results
from tables import mean_and_deviation, print_circumstances, print_head, print_row
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink import compress
from vitshrink.config.options import DataConfig
from vitshrink.data import Batch, Preprocessor
from vitshrink.data.opening import open_data
from vitshrink.evaluation.measurement import side
from vitshrink.evaluation.metrics import spearman
from vitshrink.models.fidelity import feature_rows
from vitshrink.models.loading import LoadedModel, load_dense
from vitshrink.models.readings import Sentences
from vitshrink.runtime.modes import threads
from vitshrink.statistics import functionals

DENSE = "dense"
FIGURES = {"error": ".4f", "spearman": ".4f"}
"""How they are printed."""


@dataclass(frozen=True)
class Bench:
    """The dense model, the two sides of the test pairs, and their scores."""

    loaded: LoadedModel
    pairs: Sequence[Sequence[Batch]]
    scores: Tensor

    @torch.inference_mode()
    def vectors(self, model: PreTrainedModel) -> list[Tensor]:
        """Of both sides, (pairs, width)."""

        def of(batch: Batch) -> Tensor:
            return self.loaded.embedding(model(**batch.inputs).last_hidden_state, batch.mask)

        return [torch.cat([of(batch) for batch in batches]) for batches in self.pairs]

    def figures(self, small: PreTrainedModel, dense: Sequence[Tensor]) -> dict[str, float]:
        found = self.vectors(small)
        error = sum(float((one - other).square().sum()) for one, other in zip(found, dense, strict=True))
        return {
            "error": error / sum(float(each.square().sum()) for each in dense),
            "spearman": spearman(self.loaded.embedding.compare(*found), self.scores),
        }


@dataclass(frozen=True, eq=False)
class Mixed(Sentences):
    """The vector of a sentence beside its hidden states, in shares of the squares of both."""

    share: float = 0.0

    def rows(self, outputs: Any, batch: Any) -> Tensor:
        vectors, hidden = super().rows(outputs, batch), feature_rows(outputs["last_hidden_state"], batch.mask)
        alike = torch.nn.functional.normalize(hidden, dim=-1) * vectors.norm(dim=-1, keepdim=True)
        return torch.cat([(1 - self.share) ** 0.5 * vectors, self.share**0.5 * alike.to(vectors)], -1)


@contextmanager
def following(loaded: LoadedModel, share: float, probes: int) -> Iterator[None]:
    """Inside, gradients are those of the mix, in so many directions."""
    mixed = Mixed(loaded.embedding, share)
    with patch.object(Sentences, "probes", probes), patch.object(functionals, "reading_of", lambda _model: mixed):
        yield


def bench_of(args: argparse.Namespace) -> Bench:
    loaded = load_dense(args.model)
    preprocessor = Preprocessor.from_checkpoint(loaded.directory, "text", config=loaded.model.config)
    test = open_data(DataConfig(args.eval), loaded, offline=False, labeled=True).at_most(args.limit, 0)
    both = (side(test, first=first) for first in (True, False))
    pairs = [list(preprocessor.batches(sentences, args.batch_size, in_order=True)) for sentences in both]
    labels = [float(label) for batch in pairs[0] for label in batch.labels if label is not None]
    return Bench(loaded, pairs, torch.tensor(labels))


def run(args: argparse.Namespace, results: Results) -> None:
    bench = bench_of(args)
    dense = bench.vectors(bench.loaded.model)
    results.add(DENSE, bench.figures(bench.loaded.model, dense))
    for seed, share, size in itertools.product(args.seeds, args.shares, args.sizes):
        name = f"{size}, {share:g}, {args.probes}, seed {seed}"
        if name in results.rows:
            continue
        ranks = {"keep": float(size), "probes": args.probes} if size[-1] != "B" else {}
        choice: dict[str, Any] = ranks or {"target_size": size, "forms": "bits"}
        with following(bench.loaded, share, args.probes):
            small = compress(
                bench.loaded.model,
                args.calibration,
                samples=args.samples,
                holdout=0,
                batch_size=args.batch_size,
                seed=seed,
                **choice,
            )
        results.add(name, bench.figures(small.model.float(), dense))
        print(f"{name}: {results.rows[name]}", file=sys.stderr, flush=True)


def show(results: Results) -> None:
    print_circumstances("What the curvature of a sentence encoder follows", **results.circumstances)
    print(f"Dense: Spearman {results.rows[DENSE]['spearman']:.4f}\n")
    print_head(["size", "share of the hidden states", "probes", "seeds", "error of the vectors", "Spearman"], 3)
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for name, row in results.rows.items():
        if name == DENSE:
            continue
        groups.setdefault(tuple(name.split(", ")[:3]), []).append(row)
    for size_share_probes, rows in sorted(groups.items(), reverse=True):
        cells = [mean_and_deviation([row[each] for row in rows], form) for each, form in FIGURES.items()]
        print_row([*size_share_probes, str(len(rows)), *cells])


def circumstances(args: argparse.Namespace) -> dict[str, Any]:
    """What all rows have in common."""
    return {
        "model": Path(args.model).name,
        "calibration": f"{args.samples} samples of {Path(args.calibration).name}, batches of {args.batch_size}",
        "evaluation": f"at most {args.limit} pairs of {Path(args.eval).name}",
        "error": "squared error of the final vectors, as a share of their squares; ± deviation over the seeds",
    }


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument("--model")
    known.add_argument("--calibration")
    known.add_argument("--eval", help="pairs with scores")
    known.add_argument("--sizes", nargs="+", default=["8MB", "6MB"], help="bytes, or shares of the parameters (0.7)")
    known.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.2, 0.5, 0.8, 1.0])
    known.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    known.add_argument("--probes", type=int, default=1, help="directions of a sample's vector")
    known.add_argument("--samples", type=int, default=64)
    known.add_argument("--limit", type=int, default=500, help="test pairs")
    known.add_argument("--batch-size", type=int, default=16)
    known.add_argument("--threads", type=int)
    known.add_argument("--results", type=Path, help="file (JSON) that keeps the figures; alone: its table")
    return known


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    measures = None not in (args.model, args.calibration, args.eval)
    results = Results.of(args.results, circumstances(args) if measures else None)
    if measures:
        with threads(args.threads):
            run(args, results)
    show(results)


if __name__ == "__main__":
    main()
