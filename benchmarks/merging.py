"""What merged tokens lose, by how many are merged where: as measured losses say, and evenly, at the same operations.

The weights are the dense model's, unless biases are fitted. "evenly" merges as many patches in every block (token
merging as its paper has it), and keeps all that reach the last MLP. "evenly, the rest not computed" also gives up the
patches that no head reads.
The last table compares that with biases fitted to the dense model's answers, on other samples for each of --seeds.

    python benchmarks/merging.py --model MODEL --calibration UNLABELED --eval IMAGES
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch
from tables import mean_and_deviation, print_circumstances, print_head, print_row
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.compression.merging import SAMPLES, Trials, kept_within, measured_curves
from vitshrink.compression.repairs.merging import shift_merged
from vitshrink.config.options import DataConfig
from vitshrink.data import Preprocessor
from vitshrink.data.opening import open_data
from vitshrink.evaluation import evaluate
from vitshrink.evaluation.quality import Fidelity
from vitshrink.models import cost
from vitshrink.models.example import example_inputs
from vitshrink.models.families import passes_of
from vitshrink.models.loading import load_dense
from vitshrink.models.merged import Kept, Operations, merge_tokens, reads_special_only, special_tokens, tokens_of
from vitshrink.models.structures import merging
from vitshrink.models.targets import blocks_of
from vitshrink.models.tasks import task_of
from vitshrink.models.views import own, view_of
from vitshrink.runtime.device import find_device
from vitshrink.runtime.observer import Job, Silent
from vitshrink.statistics.reference import DenseOutputs

PAIR, MERGE = merging.pair, merging.merge


def pair_by_likeness(keys: Tensor, weights: Tensor, number: int) -> tuple[Tensor, Tensor]:
    return PAIR(keys, torch.ones_like(weights), number)


def merge_by_size(x: Tensor, sizes: Tensor, weights: Tensor, sources: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Means weighted by how many patches a token stands for."""
    return MERGE(x, sizes, sizes[:, -weights.shape[1] :, 0], sources, others)


def merge_alike(x: Tensor, sizes: Tensor, weights: Tensor, sources: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Means that count every token once, whatever it stands for."""
    return MERGE(x, sizes, torch.ones_like(weights), sources, others)


def merge_sizeless(x: Tensor, sizes: Tensor, weights: Tensor, sources: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that later attention takes for one patch each."""
    merged, found = MERGE(x, sizes, weights, sources, others)
    return merged, torch.ones_like(found)


def drop(x: Tensor, sizes: Tensor, weights: Tensor, sources: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The others as they were, and as large as if they had been merged."""
    return MERGE(x, sizes, weights.scatter(1, sources, 1e-6), sources, others)


CHANGES: Mapping[str, Mapping[str, Any]] = {
    "as the tool does it": {},
    "pairs by likeness alone": {"pair": pair_by_likeness},
    "means weighted by sizes": {"merge": merge_by_size},
    "means not weighted": {"merge": merge_alike},
    "no sizes at all": {"merge": merge_sizeless},
    "dropped, not merged": {"merge": drop},
}


def evenly(dense: PreTrainedModel, fraction: float, *, ends: bool) -> Kept | None:
    """As many patches less in every block as the operations ask for, one more in the first; None out of reach."""
    price, tokens, special, number = (
        Operations.of(dense),
        tokens_of(dense),
        special_tokens(dense),
        len(blocks_of(dense)),
    )
    budget = fraction * price.total(tokens, (tokens,) * number)
    for gone in range(number * (tokens - special)):
        kept, left = [], tokens
        for block in range(number):
            left -= min(gone // number + (block < gone % number), (left - special) // 2)
            kept.append(left)
        if ends:
            kept[-1] = special
        if price.total(tokens, kept) <= budget:
            return tuple(kept)
    return None


def schedules(dense: PreTrainedModel, curves: Sequence[Tensor], fraction: float) -> Iterator[tuple[str, Kept]]:
    if (kept := evenly(dense, fraction, ends=False)) is not None:
        yield "evenly", kept
    if reads_special_only(dense) and (kept := evenly(dense, fraction, ends=True)) is not None:
        yield "evenly, the rest not computed", kept
    yield "by measured losses", kept_within(dense, curves, fraction)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--limit", type=int, help="of the test samples; all if not given")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.77, 0.67, 0.5])
    parser.add_argument("--changes", type=float, nargs="*", default=[0.5], help="fractions at which steps are changed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=256, help="that biases are fitted to")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of the samples of biases")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)
    loaded = load_dense(args.model)
    dense = loaded.model.to(find_device(args.device))
    preprocessor = Preprocessor.from_checkpoint(loaded.directory, loaded.family.modality, config=dense.config)
    unlabeled = open_data(DataConfig(args.calibration), loaded, offline=False).select(SAMPLES, args.seed)
    curves = measured_curves(Trials.on(dense, list(preprocessor.batches(unlabeled, 32))), Job(Silent()))
    test = open_data(DataConfig(args.eval), loaded, offline=False).at_most(args.limit, 0)
    held_out, baseline = list(preprocessor.batches(test, 32)), DenseOutputs(dense)
    whole = cost.macs(dense, example_inputs(dense))

    def judged(model: PreTrainedModel) -> Fidelity:
        fidelity = evaluate(model, held_out, task=task_of(dense), baseline=baseline).fidelity
        assert fidelity is not None
        return fidelity

    def row(fraction: float, name: str, kept: Kept) -> None:
        model = view_of(dense)
        merge_tokens(model, kept)
        fidelity = judged(model)
        figures = (
            f"{cost.macs(model, example_inputs(dense)) / whole:.3f}",
            f"{fidelity.kl:.4f}",
            f"{fidelity.agreement:.3f}",
        )
        print_row([f"{fraction:g}", name, *figures, " ".join(map(str, kept))])

    print_circumstances(
        "Merged tokens",
        model=args.model,
        calibration=f"{len(unlabeled)} samples of {args.calibration}, seed {args.seed}",
        evaluation=f"{len(test)} samples of {args.eval}",
        figures="KL(dense ‖ merged), nats; share of the samples with the same prediction",
    )
    columns = ["budget", "merged", "operations", "KL", "same", "tokens kept by the blocks"]
    print_head(columns, 2)
    best: dict[float, Kept] = {}
    for fraction in dict.fromkeys([*args.fractions, *args.changes]):
        for name, kept in schedules(dense, curves, fraction):
            row(fraction, name, kept)
            best[fraction] = kept
    print()
    print_head(["budget", "changed", *columns[2:]], 2)
    for fraction in args.changes:
        for name, values in CHANGES.items():
            with patch.dict(vars(merging), values):
                row(fraction, name, best[fraction])
    if not args.seeds:
        return
    print()
    print_head(["budget", "biases fitted", "KL", "same"], 2)
    reference = DenseOutputs(dense, passes_of(dense, "auto"))
    samples = open_data(DataConfig(args.calibration), loaded, offline=False)
    calibrations = [list(preprocessor.batches(samples.select(args.samples, seed), 32)) for seed in args.seeds]
    for fraction in args.fractions:
        found = []
        for seed, batches in zip(args.seeds, calibrations, strict=True):
            model = own(view_of(dense))
            merge_tokens(model, best[fraction])
            shift_merged(model, reference, batches, Job(Silent()), seed=seed)
            found.append(judged(model))
        figures = [
            mean_and_deviation([getattr(each, figure) for each in found], form)
            for figure, form in (("kl", ".4f"), ("agreement", ".3f"))
        ]
        print_row([f"{fraction:g}", f"seeds {' '.join(map(str, args.seeds))}", *figures])


if __name__ == "__main__":
    main()
