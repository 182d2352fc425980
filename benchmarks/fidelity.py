"""How much of a model each method keeps at a given size, and what each part of ours is worth: one Markdown table.

Every row goes through the parts that ``vitshrink compress`` is made of, in memory; nothing is written. Samples are
read once, the dense model answers once. A fraction is that of the weights of the linear layers of the encoder; the
column ``keep`` is what to pass to ``vitshrink compress --keep`` for the same size.

    python benchmarks/fidelity.py --model MODEL --calibration UNLABELED --eval LABELED --methods svd curvature
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from baselines import FeatureErrorSearch, ScaledCurves, fisher_weighted
from remembered import ReadOnce, Remembered
from tables import mean_and_deviation, print_circumstances, print_head, print_row
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.compression.candidates import Plan
from vitshrink.compression.choices import Choices
from vitshrink.compression.compressor import Compressor
from vitshrink.compression.findings import Findings
from vitshrink.config.options import CompressConfig, DataConfig, Precision
from vitshrink.data import Preprocessor, SampleSet, overlap
from vitshrink.data.opening import CalibrationData, open_data, read_calibration
from vitshrink.errors import TargetError, VitshrinkError
from vitshrink.evaluation import Evaluation
from vitshrink.evaluation.measurement import measure
from vitshrink.methods import get_method
from vitshrink.methods.ranks import Storage
from vitshrink.models import cost
from vitshrink.models.fidelity import Head
from vitshrink.models.loading import LoadedModel, load_dense
from vitshrink.models.targets import Target, find_targets
from vitshrink.models.tasks import task_of
from vitshrink.runtime.device import find_device
from vitshrink.runtime.observer import Job, Silent
from vitshrink.runtime.records import plain
from vitshrink.statistics import curvature


def sampled_label(_head: Head, logits: Tensor, generator: torch.Generator) -> Tensor:
    """The textbook probe of the Fisher information: one label drawn from the model's own softmax, y − p."""
    p = logits.detach().float().softmax(-1)
    labels = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
    return torch.zeros_like(p).scatter_(-1, labels, 1) - p


def feature_error_search(compressor: Compressor, findings: Findings) -> Callable[[int], Plan]:
    return FeatureErrorSearch(compressor, findings).plan


def scaled_curves(compressor: Compressor, findings: Findings) -> Callable[[int], Plan]:
    return ScaledCurves(compressor, findings).plan


@dataclass(frozen=True)
class Entry:
    """One row a fraction. What is None is what the method, or the tool, does by itself."""

    method: str
    allocation: str | None = None
    compensation: str | None = None
    storage: Storage | None = None
    refine: int | None = None
    thorough: bool = False
    fast: bool = False
    probes: int = 1
    precision: Precision = CompressConfig.precision
    options: Mapping[str, Any] = field(default_factory=dict)
    replaced: Mapping[str, Any] = field(default_factory=dict)
    """Parts of ``vitshrink.statistics.curvature`` that an ablation takes out."""
    dtype: torch.dtype = torch.float32
    """What the weights are rounded to in the file."""
    factorize: Callable[[Compressor, Job], Findings] = Compressor.learn
    planner: Callable[[Compressor, Findings], Callable[[int], Plan]] | None = None


WITHOUT_TOKEN_WEIGHT = {
    "vitshrink.statistics.curvature.CurvatureCollector": partial(curvature.CurvatureCollector, token_weight=0.0)
}

WITHOUT_CLIPPING = {
    "vitshrink.statistics.curvature.CurvatureCollector": partial(curvature.CurvatureCollector, clip=(0.0, math.inf))
}

KFAC_LEMS = Entry(
    "curvature",
    allocation="loss",
    compensation="none",
    storage="factors",
    refine=0,
    options={"shrinkage": 0.5},
    replaced=WITHOUT_TOKEN_WEIGHT,
    planner=scaled_curves,
)

ENTRIES: dict[str, Entry] = {
    "svd": Entry("svd"),
    "asvd": Entry("asvd"),
    "fwsvd": Entry("svd", factorize=fisher_weighted),
    "svd-llm": Entry("whitened", compensation="none"),
    "flar": Entry("whitened", compensation="none", planner=feature_error_search),
    "whitened": Entry("whitened"),
    "whitened-energy": Entry("whitened", allocation="energy"),
    "whitened-loss": Entry("whitened", allocation="loss"),
    "whitened-measured": Entry("whitened", allocation="measured", compensation="rescale"),
    "mixed-rank": Entry("mixed-rank"),
    "kfac-lems": KFAC_LEMS,
    "kfac-lems-gauge": replace(KFAC_LEMS, compensation="bias", storage="gauge"),
    "curvature": Entry("curvature"),
    "curvature-fast": Entry("curvature", fast=True),
    "curvature-thorough": Entry("curvature", thorough=True),
    "curvature-refine-0": Entry("curvature", refine=0),
    "curvature-refine-1": Entry("curvature", refine=1),
    "curvature-refine-2": Entry("curvature", refine=2),
    "curvature-factors": Entry("curvature", storage="factors"),
    "curvature-bfloat16": Entry("curvature", dtype=torch.bfloat16),
    "curvature-float16": Entry("curvature", dtype=torch.float16),
    "curvature-factors-bfloat16": Entry("curvature", storage="factors", dtype=torch.bfloat16),
    "curvature-uniform": Entry("curvature", allocation="uniform-ratio"),
    "curvature-energy": Entry("curvature", allocation="energy"),
    "curvature-loss": Entry("curvature", allocation="loss"),
    "curvature-bias": Entry("curvature", compensation="bias"),
    "curvature-no-bias": Entry("curvature", compensation="none"),
    "curvature-rescale": Entry("curvature", compensation="rescale"),
    "curvature-no-clipping": Entry("curvature", replaced=WITHOUT_CLIPPING),
    "curvature-no-shrinkage": Entry("curvature", options={"shrinkage": 0.0}),
    "curvature-no-token-weight": Entry("curvature", replaced=WITHOUT_TOKEN_WEIGHT),
    "curvature-sampled-label": Entry("curvature", replaced={"vitshrink.models.fidelity.Softmax.probe": sampled_label}),
    "curvature-probes-2": Entry("curvature", probes=2),
    "curvature-float32-passes": Entry("curvature", precision="no"),
}
PEERS = ["svd", "asvd", "fwsvd", "svd-llm", "whitened-energy", "mixed-rank", "curvature"]


@dataclass(frozen=True)
class Outcome:
    """One model of one seed: fractions in [0, 1], nats, seconds."""

    score: float | None
    fidelity: Mapping[str, float]
    kept: float
    """Of the weights of the encoder's linear layers, as it came out."""
    seconds: tuple[float, float, float]


@dataclass
class Bench:
    """The model and its data, and how they are measured."""

    source: LoadedModel
    targets: Sequence[Target]
    preprocessor: ReadOnce
    samples: SampleSet
    calibrations: Mapping[int, CalibrationData]
    batch_size: int
    baseline: nn.Module
    labeled: bool
    refine: int

    @property
    def dense(self) -> PreTrainedModel:
        return self.source.model

    def budget(self, fraction: float) -> int:
        """Parameters of the whole model at a fraction of the encoder's linear weights."""
        total, encoder = cost.parameters(self.dense), self.encoder_parameters(self.dense)
        return total - encoder + int(fraction * encoder)

    def encoder_parameters(self, model: PreTrainedModel) -> int:
        return cost.layers_parameters(model, [target.name for target in self.targets])

    def evaluate(self, model: nn.Module) -> Evaluation:
        return measure(
            model,
            self.samples,
            self.preprocessor,  # type: ignore[arg-type]
            Job(Silent()),
            task=task_of(self.dense),
            baseline=self.baseline,
            device=next(self.dense.parameters()).device,
            batch_size=self.batch_size,
            labeled=self.labeled,
        ).evaluation

    def rounds(self, entry: Entry) -> int:
        """Refinements; fast and thorough jobs have their own number of them."""
        if entry.fast or entry.thorough:
            return CompressConfig.refine
        return self.refine if entry.refine is None else entry.refine

    def compression(self, entry: Entry, seed: int) -> Compressor:
        config = CompressConfig(
            str(self.source.directory),
            "unused",
            method=entry.method,
            options=entry.options,
            allocation=entry.allocation,
            compensation=entry.compensation,
            storage=entry.storage or "auto",
            probes=entry.probes,
            refine=self.rounds(entry),
            thorough=entry.thorough,
            fast=entry.fast,
            precision=entry.precision,
            keep=(0.5,),  # budgets are handed to the plan
            calibration="read already",
            samples=len(self.calibrations[seed].samples),
            batch_size=self.batch_size,
            seed=seed,
        )
        return Choices.of(config).compressor(self.dense, self.targets, torch.float32, self.calibrations[seed])

    def run(
        self, entry: Entry, fractions: Sequence[float], first: tuple[Findings, Job], seed: int
    ) -> Iterator[Outcome | None]:
        """One outcome a fraction, or None where the method cannot reach it."""
        compression = self.compression(entry, seed)
        start = entry.planner(compression, first[0]) if entry.planner else partial(compression.plan, first[0])
        for fraction in fractions:
            factors, job = first[0], first[1].branch()
            budget = self.budget(fraction)
            started = time.perf_counter()
            try:
                plan = start(budget)
            except TargetError as error:
                print(f"{fraction}: {error}", file=sys.stderr)
                yield None
                continue
            for _ in range(Choices.of(compression.config).rounds):
                factors = compression.refine(factors, plan, job)
                plan = compression.plan(factors, budget)
            model = compression.build(factors, plan, job)
            elapsed = time.perf_counter() - started
            before = [first[1].timings.get(stage, 0.0) for stage in ("calibrate", "factorize")]
            statistics, factorizing = (job.timings.get(stage, 0.0) for stage in ("calibrate", "factorize"))
            building = elapsed - (statistics + factorizing - sum(before))
            evaluation = self.evaluate(model.to(entry.dtype).float())
            assert evaluation.fidelity is not None
            yield Outcome(
                score=evaluation.score,
                fidelity=plain(evaluation.fidelity),
                kept=self.encoder_parameters(model) / self.encoder_parameters(self.dense),
                seconds=(statistics, factorizing, building),
            )

    def first_factors(self, entry: Entry, seed: int) -> tuple[Findings, Job]:
        job = Job(Silent())
        return entry.factorize(self.compression(entry, seed), job), job


@contextmanager
def replaced(parts: Mapping[str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, part in parts.items():
            stack.enter_context(patch(name, part))
        yield


def same_start(entry: Entry) -> Entry:
    """What entries with equal first factors have in common: they differ in what comes after."""
    centered = (entry.compensation or get_method(entry.method).compensation) != "none"
    allocation = entry.allocation or get_method(entry.method).allocation
    measured = "measured" if allocation == "measured" else None
    return replace(
        entry,
        allocation=measured,
        compensation=str(centered),
        storage=None,
        refine=None,
        planner=None,
        replaced={},
        dtype=torch.float32,
    )


def open_bench(args: argparse.Namespace) -> Bench:
    source = load_dense(args.model, offline=args.offline)
    source.model.to(find_device(args.device))
    preprocessor = Preprocessor.from_checkpoint(
        source.directory, source.family.modality, max_length=args.max_length, offline=args.offline
    )
    samples = open_data(DataConfig(args.eval), source, offline=args.offline)
    if args.limit is not None and args.limit < len(samples):
        samples = samples.select(args.limit, 0)
    unlabeled = open_data(DataConfig(args.calibration), source, offline=args.offline)
    calibrations = {
        seed: read_calibration(
            unlabeled, preprocessor, Job(Silent()), samples=args.samples, seed=seed, batch_size=args.batch_size
        )
        for seed in args.seeds
    }
    shared = max(overlap(calibration.samples, samples) for calibration in calibrations.values())
    if shared:
        print(f"warning: {shared} evaluation samples are among the calibration samples", file=sys.stderr)
    dense = source.model
    return Bench(
        source=source,
        targets=find_targets(dense),
        preprocessor=ReadOnce(preprocessor),
        samples=samples,
        calibrations=calibrations,
        batch_size=args.batch_size,
        # masked-token figures hook into the model itself, so that its outputs cannot be played back
        baseline=dense if task_of(dense) == "masked-lm" else Remembered(dense),
        labeled=samples.labels_are is not None,
        refine=args.refine,
    )


def print_table(bench: Bench, args: argparse.Namespace) -> None:
    dense = bench.evaluate(bench.dense)
    metric, known = dense.metric, {} if dense.fidelity is None else plain(dense.fidelity)
    fidelities = [name for name in ("agreement", "kl", "pooled_cosine", "prediction_spearman") if name in known]
    if dense.dense and metric:
        low, high = dense.dense.interval
        print(f"dense {metric}: {dense.dense.score(metric):.4f} (95 % interval {low:.4f} to {high:.4f})\n")
    names = [metric] if metric else []
    headings = [name.replace("_", " ") for name in (*names, *fidelities)]
    print_head(["method", "fraction", "keep", "came out", *headings, "statistics s", "factors s", "build s"])
    start: tuple[Entry, Mapping[str, Any]] | None = None
    first: dict[int, tuple[Findings, Job]] = {}
    for name in args.methods:
        entry = ENTRIES[name]
        outcomes: dict[float, list[Outcome]] = {fraction: [] for fraction in args.fractions}
        with replaced(entry.replaced):
            if start != (same_start(entry), entry.replaced):
                start, first = (same_start(entry), entry.replaced), {}
            for seed in args.seeds:
                print(f"{name}, seed {seed} …", file=sys.stderr, flush=True)
                if seed not in first:
                    first[seed] = bench.first_factors(entry, seed)
                of_fractions = bench.run(entry, args.fractions, first[seed], seed)
                for fraction, outcome in zip(args.fractions, of_fractions, strict=True):
                    outcomes[fraction] += [outcome] if outcome else []
        for fraction, of_seeds in outcomes.items():
            print_row([name, *row(bench, fraction, of_seeds, scored=bool(metric), fidelities=fidelities)])


def row(
    bench: Bench, fraction: float, outcomes: Sequence[Outcome], *, scored: bool, fidelities: Sequence[str]
) -> list[str]:
    scores = [mean_and_deviation([outcome.score for outcome in outcomes], ".4f")] if scored else []
    fidelity = [mean_and_deviation([outcome.fidelity[name] for outcome in outcomes], ".4f") for name in fidelities]
    seconds = [mean_and_deviation([outcome.seconds[i] for outcome in outcomes], ".1f") for i in range(3)]
    kept = mean_and_deviation([outcome.kept for outcome in outcomes[:1]], ".3f")
    keep = f"{bench.budget(fraction) / cost.parameters(bench.dense):.4f}"
    return [f"{fraction:g}", keep, kept, *scores, *fidelity, *seconds]


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument("--model", required=True, help="dense checkpoint: a directory or a Hub id")
    known.add_argument("--calibration", required=True, help="samples to calibrate on, as for vitshrink compress")
    known.add_argument("--eval", required=True, help="labeled samples to test on")
    known.add_argument("--samples", type=int, default=500, help="calibration samples (default: 500)")
    known.add_argument("--fractions", type=float, nargs="+", default=[0.7, 0.5], metavar="F")
    known.add_argument("--methods", nargs="+", default=PEERS, choices=[*ENTRIES, "all"], metavar="METHOD")
    known.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="calibration seeds")
    known.add_argument("--limit", type=int, help="test samples (default: all)")
    known.add_argument("--refine", type=int, default=CompressConfig.refine, help="for entries that do not name it")
    known.add_argument("--batch-size", type=int, default=32)
    known.add_argument("--max-length", type=int)
    known.add_argument("--device", default="auto")
    known.add_argument("--threads", type=int)
    known.add_argument("--offline", action="store_true")
    known.epilog = "methods: " + ", ".join(ENTRIES) + ", all"
    return known


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    if "all" in args.methods:
        args.methods = list(ENTRIES)
    try:
        bench = open_bench(args)
        print_circumstances(
            "Fidelity",
            model=f"{args.model}, {cost.parameters(bench.dense):,} parameters, "
            f"{bench.encoder_parameters(bench.dense):,} of them in the encoder's linear layers",
            device=next(bench.dense.parameters()).device,
            calibration=f"{args.calibration}, {len(bench.calibrations[args.seeds[0]].samples)} samples, unlabeled",
            seeds=", ".join(map(str, args.seeds)),
            tested_on=f"{args.eval}, {len(bench.samples)} samples",
        )
        print_table(bench, args)
    except VitshrinkError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
