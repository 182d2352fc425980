"""Static int8 without one of its steps at a time: what each of them is worth, over calibration seeds.

    python benchmarks/static_integers.py --model MODEL --calibration UNLABELED --eval LABELED --limit 325 --seeds 0 1 2

MODEL is dense or low-rank; --baseline is what it is compared with, by default itself. PyTorch computes what integers
say; the last rows run the exported model in the runtimes, to show that they compute the same. Figures are kept in
--results.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bytes as byte_table
import torch
from remembered import Remembered
from results import Results
from tables import mean_and_deviation, print_circumstances, print_head, print_row
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.compression import calibrated, smoothing, static_layers
from vitshrink.compression.calibrated import Rounding
from vitshrink.compression.grids import Grid, Values
from vitshrink.compression.products import Product, values_of
from vitshrink.models.exported import KINDS
from vitshrink.models.loading import load_dense
from vitshrink.models.onnx_model import OnnxModel
from vitshrink.models.openvino_model import convert
from vitshrink.models.runtimes import Program
from vitshrink.models.structures.static import LARGEST
from vitshrink.statistics.inputs import Inputs, collect_inputs

Patch = tuple[Any, str, Any]


@dataclass(frozen=True)
class Variant:
    """A way to choose integers and grids, as what is put in the place of names of the library."""

    patches: tuple[Patch, ...] = ()
    runtime: str | None = None
    collects: bool = False
    """Whether what reaches the layers is other than in the library."""


def _nothing(*_: Any, **__: Any) -> None:
    """In the place of a step."""


def _nearest(weight: Tensor, _c: Tensor, _t: float, rows: Tensor, _columns: Tensor, _l: int) -> tuple[Tensor, Tensor]:
    integers = (weight / rows[:, None]).round().clamp(-LARGEST, LARGEST)
    return integers, weight - integers * rows[:, None]


def _uncorrected(made: Any, bias: Tensor | None, _shift: Tensor) -> Any:
    if bias is not None:
        made.bias.copy_(bias)
    return made


def _by_percentile(share: float) -> Callable[..., tuple[Grid, float]]:
    """Bounds that all but this share of the kept values keep, on each side; costs are numbers of values here."""

    def grid(values: Values, dtype: torch.dtype = torch.float32) -> tuple[Grid, float]:
        order = values.values.argsort()
        sorted_values, counts = values.values[order], values.costs[order].cumsum(0)
        low, high = (int(torch.searchsorted(counts, part * counts[-1])) for part in (share, 1 - share))
        found = Grid.between(float(sorted_values[low]), float(sorted_values[min(high, len(order) - 1)]), dtype)
        return found, values.loss(found)

    return grid


def _alike(product: Product, _scaled: Any = 1.0) -> Tensor:
    return torch.ones(product.weight.shape[1])


def _values_alike(readers: Sequence[Product], *scale: Any) -> Values:
    with patch.object(Product, "costs", _alike):
        return values_of(readers, *scale)


_absorbed = smoothing.smooth


def _not_between(giver: Any, readers: Any, dtype: torch.dtype) -> None:
    inner = isinstance(giver, Product) and giver.module.bias is None  # of two factors
    if not inner:
        _absorbed(giver, readers, dtype)


ALIKE: tuple[Patch, ...] = ((smoothing, "values_of", _values_alike), (calibrated, "values_of", _values_alike))
"""What a layer is expected to cost, by which it stays in floating point, is told as ever."""
VARIANTS: Mapping[str, Variant] = {
    "vitshrink": Variant(),
    "without smoothing that other layers absorb": Variant(((calibrated, "smooth", _nothing),)),
    "without layers that divide their inputs": Variant(((calibrated, "smooth_itself", _nothing),)),
    "without any smoothing": Variant(((Rounding, "smooth", _nothing),)),
    "weights rounded to nearest": Variant(((calibrated, "at_steps", _nearest),)),
    "without corrected biases": Variant(((calibrated, "_shifted", _uncorrected),)),
    "smoothing: all errors of inputs cost alike": Variant(((smoothing, "values_of", _values_alike),)),
    "smoothing: as far as it goes": Variant(((smoothing, "MOVED", (1.0,)),)),
    "grids: all errors cost alike": Variant(((calibrated, "values_of", _values_alike),)),
    "smoothing and grids: all errors of inputs cost alike": Variant(ALIKE),
    "grids: rare large values unknown": Variant(((Values, "with_bounds", lambda values, *_: values),)),
    "grids: least and largest value": Variant(((calibrated, "best_grid", _by_percentile(0.0)),)),
    "grids: percentiles 0.01 and 99.99": Variant(((calibrated, "best_grid", _by_percentile(1e-4)), *ALIKE)),
    "queries and keys not rounded": Variant(((Rounding, "choose_outputs", _nothing),)),
    "every layer rounded": Variant(((calibrated, "MOST", float("inf")),)),
    "low rank: no rotation": Variant(((static_layers, "spread", lambda up, down: (up, down)),), collects=True),
    "low rank: no division between factors": Variant(((calibrated, "smooth", _not_between),)),
    "vitshrink, in onnxruntime": Variant(runtime="onnx"),
    "vitshrink, in OpenVINO": Variant(runtime="openvino"),
}


@dataclass
class Ablation:
    """A model, and what reached its layers by seed."""

    bench: byte_table.Bench
    model: PreTrainedModel
    known: dict[int, dict[str, Inputs]]

    def made(self, variant: Variant, seed: int) -> PreTrainedModel:
        def remembered(*given: Any, **options: Any) -> dict[str, Inputs]:
            if variant.collects:
                return collect_inputs(*given, **options)
            if seed not in self.known:
                self.known[seed] = collect_inputs(*given, **options)
            return self.known[seed]

        with ExitStack() as stack:
            for patched in (*variant.patches, (calibrated, "collect_inputs", remembered)):
                stack.enter_context(patch.object(*patched))
            batches = self.bench.material.calibrations[seed].batches
            device = torch.device("cpu")
            return calibrated.calibrated(self.model, batches, dtype=torch.float32, device=device, seed=seed).model

    def judged(self, variant: Variant, seed: int) -> dict[str, Any]:
        model = self.made(variant, seed)
        with tempfile.TemporaryDirectory() as folder:
            found = self.bench.evaluate(model if variant.runtime is None else _running(model, variant, Path(folder)))
        assert found.fidelity is not None
        return {"kl": found.fidelity.kl, "agreement": found.fidelity.agreement}


def _running(model: PreTrainedModel, variant: Variant, folder: Path) -> nn.Module:
    """The exported model in a runtime."""
    file = Program.of(model).write(folder / "model.onnx")
    file = convert(file, folder) if variant.runtime == "openvino" else file
    return OnnxModel(KINDS[file.suffix].open(file), model.config, type(model).__name__).eval()


def measured(args: argparse.Namespace) -> Results:
    with tempfile.TemporaryDirectory() as folder:
        model = load_dense(args.model, allow_compressed=True, offline=args.offline).model
        args.model, name = args.baseline or args.model, Path(args.model).name
        bench = byte_table.Bench.open(args, Path(folder))
        bench.baseline = Remembered(bench.material.source.model)
        known = byte_table.circumstances(args, bench.samples)
        results = Results.of(args.results, known | {"model": name, "baseline": Path(args.model).name})
        ablation = Ablation(bench, model, {})
        if "as it was" not in results.rows and args.baseline is not None:
            found = bench.evaluate(model).fidelity
            assert found is not None
            results.add("as it was", {"seeds": [{"kl": found.kl, "agreement": found.agreement}]})
        for name, variant in VARIANTS.items():
            if name in results.rows or not byte_table.matches([name], args.rows):
                continue
            print(f"{name} …", file=sys.stderr, flush=True)
            results.add(name, {"seeds": [ablation.judged(variant, seed) for seed in args.seeds]})
            print(results.rows[name], file=sys.stderr, flush=True)
    return results


def show(results: Results) -> None:
    known = dict(results.circumstances)
    print_circumstances(f"Static int8, step by step: {known.pop('model')}", **known)
    print_head(["variant", "KL", "same prediction"])
    for name, row in results.rows.items():
        cells = [
            mean_and_deviation([each[figure] for each in row["seeds"]], form)
            for figure, form in (("kl", ".5f"), ("agreement", ".4f"))
        ]
        print_row([name, *cells])


def main(arguments: Sequence[str] | None = None) -> None:
    known = byte_table.parser()
    known.description = __doc__
    known.add_argument("--baseline", help="the model that a low-rank one is compared with")
    args = known.parse_args(arguments)
    if not (args.model and args.calibration and args.eval):
        known.error("--model, --calibration and --eval say what to run")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    show(measured(args))


if __name__ == "__main__":
    main()
