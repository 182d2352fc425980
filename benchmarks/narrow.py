"""What narrower layers lose and take, alone and beside ranks, at the same parameters; and what each step is worth.

One calibration serves all rows; nothing is learned again on compressed models, nothing is repaired but what forms
repair themselves. A fraction is that of the weights of the encoder's linear layers. Times are the shortest of passes
in turn, as fractions of the dense model's in the same runtime.

    python benchmarks/narrow.py --model MODEL --calibration UNLABELED --eval IMAGES --runtimes torch openvino
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from tables import print_circumstances, print_head, print_row
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.compression import narrow_estimation
from vitshrink.compression.choices import Choices
from vitshrink.compression.compressor import Compressor
from vitshrink.compression.estimation import LayerEstimator
from vitshrink.compression.findings import Findings
from vitshrink.compression.forms.narrow import NarrowMlp
from vitshrink.compression.narrow_sites import narrow_sites
from vitshrink.compression.scales import on_one_scale
from vitshrink.config.options import CompressConfig, DataConfig
from vitshrink.data import Preprocessor
from vitshrink.data.opening import CalibrationData, open_data, read_calibration
from vitshrink.evaluation import evaluate
from vitshrink.evaluation.measurement import labels_of
from vitshrink.evaluation.quality import Accuracy
from vitshrink.methods import narrow_attention, narrowing
from vitshrink.methods.attention import AttentionWeights
from vitshrink.methods.narrow_attention import Values
from vitshrink.models import cost
from vitshrink.models.example import example_inputs
from vitshrink.models.loading import load_dense
from vitshrink.models.runtimes import find_runtime, running
from vitshrink.models.targets import find_targets
from vitshrink.models.tasks import task_of
from vitshrink.runtime.observer import Job, Silent
from vitshrink.statistics.reference import DenseOutputs
from vitshrink.statistics.stats import LinearStats

Tensors = dict[str, dict[str, Tensor]]

FORMS = {"ranks": "rank", "narrower": "narrow", "both": "rank+narrow"}


def any_outputs(weight: Tensor, stats: LinearStats) -> Tensor:
    """All outputs of a layer count alike."""
    return (stats.gradient_power / len(weight)) ** 0.5 * torch.eye(len(weight)).to(weight)


def as_they_are(attention: AttentionWeights) -> Values:
    """Dimensions of values as the model has them."""

    def nothing(matrix: Tensor) -> tuple[Tensor, Tensor]:
        return matrix.new_ones(len(matrix)), torch.eye(len(matrix)).to(matrix)

    with patch.object(narrow_attention, "eigh", nothing):
        return narrow_attention.values(attention)


TENSORS = Values.tensors


def not_made_up_for(self: Values, attention: AttentionWeights, heads: Tensor, size: int) -> Tensors:
    """Values that go, and nothing in their place but their mean: as if none told anything of another."""
    inverse = torch.linalg.inv(self.basis)
    with patch.object(narrow_attention, "positive", lambda _covariance: inverse @ inverse.T):
        return TENSORS(self, attention, heads, size)


def without_repair(findings: Findings, compressor: Compressor) -> Findings:
    """Neurons that go, and nothing in their place but their mean."""
    layers = dict(findings.layers)
    for site in narrow_sites(compressor.dense, find_targets(compressor.dense)):
        if isinstance(found := layers.get(site.name), NarrowMlp):
            weight = compressor.material.layer(site.targets["fc2"].name).weight.detach().double()
            elimination = found.elimination
            down = torch.eye(weight.shape[1]).to(weight)[elimination.order]
            factors = replace(elimination.factors, up=weight[:, elimination.order], down=down)
            layers[site.name] = replace(found, elimination=replace(elimination, factors=factors))
    return replace(findings, layers=layers)


@dataclass(frozen=True, eq=False)
class Bench:
    """A dense model, and what calibrates it."""

    dense: PreTrainedModel
    calibration: CalibrationData

    def compressor(self, forms: str, allocation: str | None = None) -> Compressor:
        options: Mapping[str, Any] = {"forms": forms, "compensation": "bias", "allocation": allocation, "keep": (0.5,)}
        choices = Choices.of(CompressConfig("model", "unused", calibration="unused", **options))
        return choices.compressor(self.dense, find_targets(self.dense), torch.float32, self.calibration)

    def made(self, compressor: Compressor, findings: Findings, fraction: float) -> PreTrainedModel:
        """At this fraction of the weights of the encoder's linear layers."""
        weights = sum(m * n for m, n in (target.shape for target in find_targets(self.dense)))
        budget = int(cost.parameters(self.dense) - (1 - fraction) * weights)
        findings = on_one_scale(compressor, findings, budget, Job(Silent()))
        return compressor.build(findings, compressor.plan(findings, budget), Job(Silent())).eval()


def steps(bench: Bench, findings: Findings, fraction: float) -> Iterator[tuple[str, PreTrainedModel]]:
    """Narrower models with a step changed, by what it is."""

    def learned(allocation: str | None = None) -> PreTrainedModel:
        compressor = bench.compressor("narrow", allocation)
        with patch.object(LayerEstimator, "known", lambda _self, _job: findings.stats):
            return bench.made(compressor, compressor.learn(Job(Silent())), fraction)

    narrow = bench.compressor("narrow")
    yield "as the tool does it", bench.made(narrow, findings, fraction)
    with patch.object(Values, "tensors", not_made_up_for):
        yield "what goes is not made up for", bench.made(narrow, without_repair(findings, narrow), fraction)
    with patch.object(narrow_estimation, "values", as_they_are):
        yield "values keep their basis", learned()
    rooms = (patch.object(room, "output_root", any_outputs) for room in (narrowing, narrow_attention))
    with next(rooms), next(rooms):
        yield "all outputs of a layer count alike", learned()
    yield "--allocation loss", learned("loss")


def times(models: Mapping[str, PreTrainedModel], runtime: str, batch_size: int, repeats: int) -> dict[str, str]:
    """Of each, as a fraction of that of the dense one."""
    ready = {name: running(model, find_runtime(runtime)) for name, model in models.items()}
    inputs = dict.fromkeys(models, example_inputs(models["dense"], batch_size))
    shortest = {name: min(each) for name, each in cost.passes(ready, inputs, repeats=repeats).items()}
    return {name: f"{each / shortest['dense']:.2f}" for name, each in shortest.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--limit", type=int, help="of the test samples; all if not given")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.9, 0.8, 0.7])
    parser.add_argument("--changes", type=float, nargs="*", default=[0.8], help="fractions at which steps are changed")
    parser.add_argument("--runtimes", nargs="*", default=[], help="to time in: torch, onnxruntime, openvino")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    loaded = load_dense(args.model)
    dense = loaded.model.eval()
    preprocessor = Preprocessor.from_checkpoint(loaded.directory, loaded.family.modality, config=dense.config)
    unlabeled = open_data(DataConfig(args.calibration), loaded, offline=False)
    calibration = read_calibration(
        unlabeled, preprocessor, Job(Silent()), samples=args.samples, seed=args.seed, batch_size=32
    )
    test = open_data(DataConfig(args.eval), loaded, offline=False).at_most(args.limit, 0)
    held_out, baseline = list(preprocessor.batches(test, 32)), DenseOutputs(dense)
    label_of, _ = labels_of(dense, test, task_of(dense), None)

    def judged(model: PreTrainedModel) -> list[str]:
        found = evaluate(model, held_out, task=task_of(dense), label_of=label_of, baseline=baseline)
        assert found.fidelity is not None
        top1 = found.compressed.top1 if isinstance(found.compressed, Accuracy) else None
        same = f"{found.fidelity.agreement:.3f}"
        return [f"{found.fidelity.kl:.4f}", same, "–" if top1 is None else f"{100 * top1:.1f} %"]

    print_circumstances(
        "Narrower layers",
        model=args.model,
        calibration=f"{args.samples} samples of {args.calibration}, seed {args.seed}",
        evaluation=f"{len(test)} samples of {args.eval}",
        figures="KL(dense ‖ compressed), nats; share of the samples with the same prediction; top-1",
        times="the shortest passes in turn, of the dense model's in the same runtime",
    )
    bench = Bench(dense, calibration)
    timed = [(runtime, size) for runtime in args.runtimes for size in args.batch_sizes]
    columns = ["KL", "same", "top-1"]
    print_head(["fraction", "forms", "operations", *columns, *(f"{name}, {size}" for name, size in timed)], 2)
    findings = bench.compressor("rank+narrow").learn(Job(Silent()))
    whole = cost.macs(dense, example_inputs(dense))
    for fraction in args.fractions:
        models = {name: bench.made(bench.compressor(forms), findings, fraction) for name, forms in FORMS.items()}
        taken = [times({"dense": dense, **models}, *each, args.repeats) for each in timed]
        for name, model in models.items():
            operations = f"{cost.macs(model, example_inputs(dense)) / whole:.3f}"
            print_row([f"{fraction:g}", name, operations, *judged(model), *(each[name] for each in taken)])
    for fraction in args.changes:
        print()
        print_head([f"changed, at {fraction:g}", *columns])
        for name, model in steps(bench, findings, fraction):
            print_row([name, *judged(model)])


if __name__ == "__main__":
    main()
