"""Would low rank help integers? What it could save at best, matrix by matrix, in the metric that rounding goes by.

Two questions: how many bytes a low-rank part beside the integers would save, and whether two factors alone ever lose
less than the integers that take as many bytes. Factors are taken to cost --bits a number and to lose nothing by it.

    python benchmarks/low_rank.py --model MODEL --calibration UNLABELED
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from tables import print_circumstances, print_head, print_row
from torch import Tensor

from vitshrink.compression.forms.coded import estimates, matrix_of
from vitshrink.compression.rounding import Metric
from vitshrink.config.options import DataConfig
from vitshrink.data import Preprocessor
from vitshrink.data.opening import open_data
from vitshrink.models.loading import load_dense
from vitshrink.models.targets import find_outside, find_targets
from vitshrink.statistics.sensitivity import collect_sensitivity

BALANCINGS = 5
"""How often rows and columns are brought to one deviation, as the coder has them."""


@dataclass(frozen=True)
class Part:
    """The rank of a low-rank part beside integers, and what it saves, in bits; nothing at rank 0."""

    rank: int
    saved: float


def best_part(weight: Tensor, metric: Metric, bits: float) -> Part:
    """Of ``weight`` (m, n): integers of what is left are smaller by the logarithm of their deviation."""
    whole = weight / (metric.rows[:, None] * metric.columns)
    for _ in range(BALANCINGS):
        whole = whole / whole.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
        whole = whole / whole.square().mean(0, keepdim=True).sqrt().clamp_min(1e-30)
    power = torch.linalg.svdvals(whole).square()
    left = (1 - power.cumsum(0) / power.sum()).clamp_min(1e-9)[: len(power) // 2]
    price = bits * sum(weight.shape) * torch.arange(1, len(left) + 1)
    saved = -0.5 * left.log2() * weight.numel() - price
    best = int(saved.argmax())
    return Part(best + 1, float(saved[best])) if saved[best] > 0 else Part(0, 0.0)


def factors_alone(weight: Tensor, metric: Metric, bits: float, taken: float) -> float:
    """What two factors lose that take ``taken`` bits a weight."""
    lower = metric.lower.to(weight.dtype)
    seen = weight * lower if lower.dim() == 1 else weight @ lower.T
    power = torch.linalg.svdvals(metric.weights.sqrt()[:, None] * seen).square()
    rank = int(taken * weight.numel() / (bits * sum(weight.shape)))
    return 0.5 * float(power[rank:].sum())


@dataclass(frozen=True, eq=False)
class Site:
    """A matrix, its metric, and (bits a weight, loss) of its integers by level."""

    weight: Tensor
    metric: Metric
    integers: Mapping[int, tuple[float, float]]

    @classmethod
    def of(cls, weight: Tensor, metric: Metric) -> Self:
        return cls(weight, metric, {level: (bits, loss) for level, bits, loss in estimates(weight, metric)})

    def at(self, level: int) -> tuple[float, float]:
        """At the nearest level on offer."""
        return self.integers[min(self.integers, key=lambda known: abs(known - level))]


def common_level(sites: Iterable[Site], bits: float) -> int:
    """Of all sites, at which a weight takes about ``bits``."""
    known = list(sites)
    levels = {level for site in known for level in site.integers}

    def surplus(level: int) -> float:
        return abs(sum(site.weight.numel() * (site.at(level)[0] - bits) for site in known))

    return min(levels, key=surplus)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--bits", type=float, default=6.0, help="of a number in a factor")
    parser.add_argument("--integers", type=float, default=2.0, help="bits of a weight on average")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    loaded = load_dense(args.model)
    preprocessor = Preprocessor.from_checkpoint(loaded.directory, loaded.family.modality, config=loaded.model.config)
    samples = open_data(DataConfig(args.calibration), loaded, offline=False).at_most(args.samples, args.seed)
    names = [target.name for target in find_targets(loaded.model)] + find_outside(loaded.model)
    stats = collect_sensitivity(loaded.model, names, list(preprocessor.batches(samples, 32)), seed=args.seed)
    print_circumstances(
        "Low rank beside integers",
        model=args.model,
        calibration=f"{len(samples)} samples of {args.calibration}",
        integers=f"all of one fineness, {args.integers} bits a weight on average",
        factors=f"{args.bits} bits a number, which lose nothing by it",
        factors_alone="their loss, as a multiple of that of the integers, in the same bytes",
    )
    sites = {
        name: Site.of(matrix_of(loaded.model.get_submodule(name)).double(), Metric.of(each))
        for name, each in stats.items()
    }
    level = common_level(sites.values(), args.integers)
    print_head(["matrix", "bits", "best rank beside integers", "saved", "factors alone"])
    whole, saved, wins = 0.0, 0.0, 0
    for name, site in sites.items():
        bits, loss = site.at(level)
        part = best_part(site.weight, site.metric, args.bits)
        ratio = factors_alone(site.weight, site.metric, args.bits, bits) / loss
        taken = bits * site.weight.numel()
        whole, saved, wins = whole + taken, saved + part.saved, wins + (ratio < 1)
        print_row([name, f"{bits:.2f}", str(part.rank), f"{part.saved / taken:.2%}", f"{ratio:.2f}"])
    print_row(["all", "", "", f"{saved / whole:.3%}", f"less in {wins} of {len(sites)}"])


if __name__ == "__main__":
    main()
