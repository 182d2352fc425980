"""What each step of the rounding is worth: divergence at several sizes of the weight file, with one of them changed.

Every matrix is rounded at the same fineness, with nothing allocated, so that only the rounding differs; sizes between
two finenesses are interpolated in the logarithm of the divergence. Bytes are those that the tool predicts.

    python benchmarks/rounding.py --model MODEL --calibration UNLABELED --eval LABELED --seeds 0 1 2
"""

import argparse
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from tables import mean_and_deviation, print_circumstances, print_head, print_row
from torch import nn
from transformers import PreTrainedModel

from vitshrink.compression import rounding
from vitshrink.compression.forms import coded
from vitshrink.compression.forms.coded import fineness_of, matrix_of
from vitshrink.config.options import DataConfig, parse_quantity
from vitshrink.data import Batch, Preprocessor
from vitshrink.data.opening import open_data
from vitshrink.evaluation import evaluate
from vitshrink.models import cost
from vitshrink.models.checkpoint import HEADER_BYTES
from vitshrink.models.loading import load_dense
from vitshrink.models.targets import find_outside, find_targets
from vitshrink.models.tasks import task_of
from vitshrink.runtime.device import find_device
from vitshrink.statistics import sensitivity
from vitshrink.statistics.halves import half_of
from vitshrink.statistics.reference import DenseOutputs
from vitshrink.statistics.sensitivity import Sensitivity, collect_sensitivity

LEVELS = range(34, 62, 3)
"""Finenesses that are tried, from coarse to fine."""

Stats = Mapping[str, Sensitivity]


@dataclass(frozen=True)
class Change:
    """What an ablation changes: values of modules, by module and name, or the statistics."""

    rounding: Mapping[str, Any] = field(default_factory=dict)
    sensitivity: Mapping[str, Any] = field(default_factory=dict)
    stats: Callable[[Stats], Stats] = dict


def without_feedback(stats: Stats) -> Stats:
    """Covariances without their off-diagonal entries, through which errors are fed back."""
    return {
        name: each
        if (covariance := each.covariance) is None
        else replace(each, half=half_of(torch.diag(covariance.diagonal())), tokens=math.inf)
        for name, each in stats.items()
    }


def no_shrinkage(_covariance: torch.Tensor, _tokens: float) -> float:
    return 0.0


def not_joined(_sums: Any, _mean: torch.Tensor, outputs: torch.Tensor, covariance: torch.Tensor) -> Any:
    return outputs, covariance


CHANGES = {
    "as the tool does it": Change(),
    "no feedback of errors": Change(stats=without_feedback),
    "all tokens count alike": Change(sensitivity={"WEIGHTS": (1.0, 1.0)}),
    "weights of tokens not clipped": Change(sensitivity={"WEIGHTS": (0.0, math.inf)}),
    "errors that tokens share count as others": Change(sensitivity={"joined": not_joined}),
    "one sensitivity for all outputs": Change({"SHRINKAGE": 1.0}),
    "sensitivities hardly shrunk (0.1)": Change({"SHRINKAGE": 0.1}),
    "one step for all columns": Change({"COLUMN_EXPONENT": 0.0}),
    "steps of columns by M_jj (exponent 1)": Change({"COLUMN_EXPONENT": 1.0}),
    "covariances damped, not shrunk": Change({"shrinkage": no_shrinkage}),
}


@torch.no_grad()
def rounded_models(dense: PreTrainedModel, stats: Stats) -> list[tuple[int, PreTrainedModel]]:
    """Bytes of the file, and the model, at every level, from small to large."""
    models = [copy.deepcopy(dense) for _ in LEVELS]
    modules = {name: dense.get_submodule(name) for name in stats}
    whole = cost.parameters(dense) - sum(matrix_of(module).numel() for module in modules.values())
    sizes = [2 * whole + HEADER_BYTES * len(dense.state_dict())] * len(models)
    for name, module in modules.items():
        weight, metric = matrix_of(module), rounding.Metric.of(stats[name])
        found = rounding.at_each(weight, metric, map(fineness_of, LEVELS))
        for number, (integers, errors, _) in enumerate(found):
            bits = coded.CODING * rounding.entropy(integers) * weight.numel()
            sizes[number] += int(bits / 8) + 2 * sum(weight.shape) + HEADER_BYTES
            _put(models[number].get_submodule(name), weight - errors, errors, stats[name])
    return sorted(zip(sizes, models, strict=True), key=lambda each: each[0])


def _put(module: nn.Module, matrix: torch.Tensor, errors: torch.Tensor, found: Sensitivity) -> None:
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    weight.copy_(matrix.view(weight.shape))
    if bias is not None and found.mean is not None:
        bias.add_((errors.double() @ found.mean).to(bias.dtype))


def at_sizes(
    found: Sequence[tuple[int, PreTrainedModel]], sizes: Sequence[int], judge: Callable[[PreTrainedModel], float]
) -> list[float | None]:
    """The divergence at each of ``sizes``, between those of the models around it; only these are judged."""
    judged: dict[int, float] = {}

    def point(number: int) -> tuple[int, float]:
        taken, model = found[number]
        if number not in judged:
            judged[number] = judge(model)
        return taken, judged[number]

    around = [
        next((n for n, (low, high) in enumerate(pairwise(found)) if low[0] <= size <= high[0]), None) for size in sizes
    ]
    return [
        None if n is None else _between(point(n), point(n + 1), size) for n, size in zip(around, sizes, strict=True)
    ]


def _between(low: tuple[int, float], high: tuple[int, float], size: int) -> float:
    share = (size - low[0]) / (high[0] - low[0])
    return math.exp((1 - share) * math.log(low[1]) + share * math.log(high[1]))


@dataclass(frozen=True)
class Bench:
    """The dense model, and what it is calibrated and judged on."""

    dense: PreTrainedModel
    calibration: Mapping[int, Sequence[Batch]]
    held_out: Sequence[Batch]
    baseline: nn.Module
    collected: dict[tuple[int, str], Stats] = field(default_factory=dict)

    def figures(self, change: Change, seed: int, sizes: Sequence[int]) -> list[float | None]:
        names = [target.name for target in find_targets(self.dense)] + find_outside(self.dense)
        with ExitStack() as stack:
            for module, values in ((rounding, change.rounding), (sensitivity, change.sensitivity)):
                for name, value in values.items():
                    stack.enter_context(patch.object(module, name, value))
            key = seed, repr(change.sensitivity)
            if key not in self.collected:
                self.collected[key] = collect_sensitivity(self.dense, names, self.calibration[seed], seed=seed)
            found = rounded_models(self.dense, change.stats(self.collected[key]))
        return at_sizes(found, sizes, self._kl)

    def _kl(self, model: PreTrainedModel) -> float:
        fidelity = evaluate(model, self.held_out, task=task_of(self.dense), baseline=self.baseline).fidelity
        assert fidelity is not None
        assert fidelity.kl is not None
        return fidelity.kl


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--limit", type=int, help="of the test samples; all if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sizes", nargs="+", default=["5.0MB", "4.2MB", "3.5MB", "3.0MB", "2.6MB", "2.0MB"])
    parser.add_argument("--rows", nargs="+", choices=list(CHANGES), default=list(CHANGES))
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)
    loaded = load_dense(args.model)
    dense = loaded.model.to(find_device(args.device))
    preprocessor = Preprocessor.from_checkpoint(loaded.directory, loaded.family.modality, config=dense.config)
    unlabeled = open_data(DataConfig(args.calibration), loaded, offline=False)
    calibration = {seed: list(preprocessor.batches(unlabeled.at_most(args.samples, seed), 32)) for seed in args.seeds}
    test = open_data(DataConfig(args.eval), loaded, offline=False, labeled=True).at_most(args.limit, 0)
    bench = Bench(dense, calibration, list(preprocessor.batches(test, 32)), DenseOutputs(dense))
    print_circumstances(
        "Steps of the rounding",
        model=args.model,
        calibration=f"{args.samples} samples of {args.calibration}",
        evaluation=f"{len(test)} samples of {args.eval}",
        seeds=args.seeds,
        figures="KL(dense ‖ rounded), nats, mean ± deviation over the seeds",
    )
    print_head(["changed", *args.sizes])
    sizes = [parse_quantity(size, "--sizes") for size in args.sizes]
    for name in args.rows:
        found = [bench.figures(CHANGES[name], seed, sizes) for seed in args.seeds]
        print_row([name, *(mean_and_deviation(column, ".4f") for column in zip(*found, strict=True))])


if __name__ == "__main__":
    main()
