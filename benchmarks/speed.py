"""How fast compressed models run, as Markdown tables.

A low-rank model ought to take the share of the dense model's time that it has of its operations. ``quotient`` is the
share of the time over the share of the operations: 1 is as promised, 1.1 is a tenth slower. It is that of the medians,
and beside it that of the lower quartiles, which a busy machine disturbs less. Models are timed in turn.

Attention, GELU and norms take time of their own, much of it in a small model, and no compression of linear layers saves
any. ``without linear layers`` is a model whose target layers cost nothing; the quotient ``of the linear
layers`` takes its time and operations off all others first. A compiler would find out that it computes nothing.

Without ``--model``, weights are random and of the shapes of ViT-B/16 at 224 pixels. Compressed models have random
factors throughout: for time, only shapes and ranks matter.

    python benchmarks/speed.py                    # dense and compressed models
    python benchmarks/speed.py --compile          # and under torch.compile
    python benchmarks/speed.py --integers         # int8 weights and int8 arithmetic, beside torchao if it is installed
    python benchmarks/speed.py --layers           # single layers
    python benchmarks/speed.py --model MODEL --load COMPRESSED    # time until the first output
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
import transformers
from job import SHAPES, random_vit
from quantization import torchao_peer
from tables import print_circumstances, print_head, print_row
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.compression.allocation import uniform_ratio
from vitshrink.compression.candidates import whole_cost
from vitshrink.compression.choices import Choices
from vitshrink.compression.narrow_sites import narrow_sites
from vitshrink.compression.quantization import quantized
from vitshrink.config.options import DTYPES, CompressConfig
from vitshrink.errors import VitshrinkError
from vitshrink.methods.attention import ATTENTION
from vitshrink.methods.ranks import Storage, largest_rank
from vitshrink.models import cost
from vitshrink.models.checkpoint import replace_layers
from vitshrink.models.cost import Latency
from vitshrink.models.example import example_inputs
from vitshrink.models.loading import load_dense
from vitshrink.models.source import examine
from vitshrink.models.structures import Structure
from vitshrink.models.structures.headwise import Headwise
from vitshrink.models.structures.low_rank import LayerSpec, LowRankLinear
from vitshrink.models.structures.narrow import Narrow
from vitshrink.models.structures.quantized import Activations
from vitshrink.models.targets import find_targets
from vitshrink.runtime.device import find_device

STORAGES: tuple[Storage, ...] = ("gauge", "factors")
FORMS: dict[str, Storage] = {"factors": "factors", "gauge": "gauge", "gauge, pivots in the middle": "gauge"}
DENSE = "dense", 1.0
REST = "without linear layers", 0.0
FIGURES = [
    "ms",
    "quartiles",
    "time",
    "operations",
    "quotient",
    "at the lower quartile",
    "of the linear layers",
]

ACTIVATIONS: dict[Activations, str] = {"none": "int8 weights", "dynamic": "int8 dynamic"}

Key = tuple[str, float]
"""Form of storage, and the fraction of its weights that a layer keeps."""


def with_random_factors(dense: PreTrainedModel, fraction: float, storage: Storage) -> PreTrainedModel:
    """``dense`` with every target at the rank that keeps ``fraction`` of its weights. Time depends on nothing else.

    Pivots lie at the first inputs. A pivot block in the middle costs one more kernel; ``--layers`` shows how much.
    """
    targets = find_targets(dense)
    config = CompressConfig("model", "unused", method="svd", storage=storage, keep=(0.5,))
    offers = Choices.of(config).compressor(dense, targets, torch.float32).offers()
    plan = uniform_ratio(offers, int(fraction * whole_cost(offers)))
    model = type(dense)(dense.config).eval()
    device = next(dense.parameters()).device
    layers = {t.name: random_layer(t.shape, rank, storage) for t in targets if (rank := plan[t.name].grade)}
    replace_layers(model, layers)
    return model.to(device)


def with_narrower_layers(dense: PreTrainedModel, fraction: float) -> PreTrainedModel:
    """``dense`` with this fraction of the neurons of every MLP, and of the dimensions of every head; random weights."""
    model = type(dense)(dense.config).eval()
    for site in narrow_sites(dense, find_targets(dense)):
        names = {role: target.name for role, target in site.targets.items()}
        if site.attention is None:
            neurons = round(fraction * site.targets["fc1"].shape[0])
            structures: dict[str, Structure] = {"fc1": Narrow(outputs=neurons), "fc2": Narrow(inputs=neurons)}
        else:
            head = round(fraction * site.attention.dimensions.head)
            names[ATTENTION] = site.attention.places[ATTENTION]
            values = site.attention.dimensions.heads * head
            structures = {ATTENTION: Headwise(head, head), "output": Narrow(inputs=values)}
        for place, structure in structures.items():
            replace_layers(model, {names[place]: structure.build(model.get_submodule(names[place]))})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model.to(next(dense.parameters()).device)


class Free(nn.Module):
    """Instead of a linear layer: an output of the right shape that is always the same and costs nothing."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.made: dict[tuple[int, ...], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.outputs)
        if shape not in self.made:
            self.made[shape] = torch.randn(shape, device=x.device, dtype=x.dtype)
        return self.made[shape]


def without_targets(dense: PreTrainedModel) -> PreTrainedModel:
    model = type(dense)(dense.config).eval()
    replace_layers(model, {target.name: Free(target.shape[0]) for target in find_targets(dense)})
    return model.to(next(dense.parameters()).device)


def random_layer(shape: tuple[int, int], rank: int, storage: Storage, pivot: int = 0) -> LowRankLinear:
    m, n = shape
    layer = LowRankLinear(n, m, LayerSpec(rank, pivot if storage == "gauge" else None))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer.requires_grad_(False)


def print_models(dense: PreTrainedModel, args: argparse.Namespace) -> None:
    """Whole models, for each batch size, storage and fraction."""
    print_head(["model", "fraction", "batch", "mode", *FIGURES])
    models: dict[Key, nn.Module] = {DENSE: dense, REST: without_targets(dense)}
    for storage in STORAGES:
        for fraction in args.fractions:
            models[storage, fraction] = with_random_factors(dense, fraction, storage)
    for batch_size in args.batches:
        print_timed(models, example_inputs(dense, batch_size), args)


def print_integers(dense: PreTrainedModel, args: argparse.Namespace) -> None:
    """Whole models in int8, which have the operations of those that they are made of."""
    print_head(["model", "fraction", "batch", "mode", *FIGURES])
    floats = {DENSE: dense} | {
        ("factors", each): with_random_factors(dense, each, "factors") for each in args.fractions
    }
    models: dict[Key, nn.Module] = {**floats}
    origins: dict[Key, nn.Module] = {**floats}
    for (form, fraction), model in floats.items():
        for activations, what in ACTIVATIONS.items():
            made = {"ours": quantized(model, 8, activations), "torchao": None}
            if model is dense:
                made["torchao"] = torchao_peer(model, activations)
            for who, each in made.items():
                if each is not None:
                    key = f"{form}, {what}, {who}", fraction
                    models[key], origins[key] = each, model
    for batch_size in args.batches:
        print_timed(models, example_inputs(dense, batch_size), args, origins=origins)


class Layer(nn.Module):
    """A layer under the name for its input that all of them share."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        return output


def print_layers(dense: PreTrainedModel, args: argparse.Namespace) -> None:
    """Single layers of the model's width on the tokens of one pass: square, fc1 and fc2."""
    print_head(["layer", "form", "density", "batch", "mode", *FIGURES])
    width, hidden = dense.config.hidden_size, dense.config.intermediate_size
    device = next(dense.parameters()).device
    for kind, (m, n) in {"square": (width, width), "fc1": (hidden, width), "fc2": (width, hidden)}.items():
        layers: dict[Key, nn.Module] = {DENSE: Layer(nn.Linear(n, m))}
        for density in args.densities:
            for form, storage in FORMS.items():
                rank = largest_rank(m, n, density * m * n, storage)
                pivot = (n - rank) // 2 if "middle" in form else 0
                layers[form, density] = Layer(random_layer((m, n), rank, storage, pivot))
        for layer in layers.values():
            layer.to(device)
        for batch_size in args.batches:
            inputs = {"x": torch.randn(batch_size, args.tokens, n, device=device)}
            print_timed(layers, inputs, args, kind)


def print_timed(
    models: Mapping[Key, nn.Module],
    inputs: Mapping[str, Tensor],
    args: argparse.Namespace,
    *kind: str,
    origins: Mapping[Key, nn.Module] | None = None,
) -> None:
    """One row a model: its time, and the shares of the dense one's time and operations (those of ``origins``)."""
    operations = {key: cost.macs(model, inputs) for key, model in (origins or models).items()}
    for mode in ("eager", "compiled") if args.compile else ("eager",):
        timed = [key for key in models if mode == "eager" or key != REST]
        ready = {str(key): compiled(models[key]) if mode == "compiled" else models[key] for key in timed}
        times = cost.latency(ready, inputs, repeats=args.repeats, warmup=args.warmup)
        for key in timed:
            share = operations[key] / operations[DENSE]
            form, fraction = key
            named = [*kind, form, f"{fraction:g}", str(times[str(key)].batch_size), mode]
            linear = "" if str(REST) not in times or key == REST else _linear_quotient(times, operations, key)
            print_row([*named, *_figures(times[str(key)], times[str(DENSE)], share), linear])


def _linear_quotient(times: Mapping[str, Latency], operations: Mapping[Key, int], key: Key) -> str:
    rest, dense = times[str(REST)].median, times[str(DENSE)].median
    time = (times[str(key)].median - rest) / (dense - rest)
    return f"{time / ((operations[key] - operations[REST]) / (operations[DENSE] - operations[REST])):.2f}"


def compiled(model: nn.Module) -> nn.Module:
    """For one shape of input: every batch size gets a compilation of its own."""
    torch._dynamo.config.recompile_limit = 1000  # models share their code: beyond the limit they would run eagerly
    made = torch.compile(model, dynamic=False)
    assert isinstance(made, nn.Module)
    return made


def _figures(taken: Latency, dense: Latency, operations: float) -> list[str]:
    lower, upper = 1000 * taken.lower_quartile, 1000 * taken.upper_quartile
    time = taken.median / dense.median
    return [
        f"{1000 * taken.median:.2f}",
        f"{lower:.2f}–{upper:.2f}",
        f"{time:.3f}",
        f"{operations:.3f}",
        f"{time / operations:.2f}",
        f"{taken.lower_quartile / dense.lower_quartile / operations:.2f}",
    ]


def print_loading(directories: Sequence[str], args: argparse.Namespace) -> None:
    """Of checkpoints, loaded in turn: ``from_pretrained``, and a first pass with one sample, with stock classes."""
    kinds = [getattr(transformers, str(examine(Path(each)).config["architectures"][0])) for each in directories]
    inputs = example_inputs(load_dense(directories[0], offline=True).model, 1)
    taken: list[list[tuple[float, float]]] = [[] for _ in directories]
    for repeat in range(args.repeats + 1):
        for found, kind, directory in zip(taken, kinds, directories, strict=True):
            started = time.perf_counter()
            model = kind.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
            loaded = time.perf_counter()
            with torch.no_grad():
                model(**inputs)
            if repeat:  # the first one imports
                found.append((loaded - started, time.perf_counter() - started))
    print_head(["checkpoint", "loaded after, ms", "first output after, ms", "least", "time", "least"])
    dense = [median(total for _, total in taken[0]), min(total for _, total in taken[0])]
    for directory, each in zip(directories, taken, strict=True):
        loaded, total = (median(times) for times in zip(*each, strict=True))
        least = min(times[1] for times in each)
        figures = [loaded, total, least]
        shares = [f"{total / dense[0]:.2f}", f"{least / dense[1]:.2f}"]
        print_row([Path(directory).name, *(f"{1000 * figure:.0f}" for figure in figures), *shares])


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    table = known.add_mutually_exclusive_group()
    table.add_argument("--layers", action="store_true", help="single layers instead of whole models")
    table.add_argument("--integers", action="store_true", help="whole models in int8")
    table.add_argument("--load", nargs="+", metavar="DIR", help="how long these take to load, beside --model")
    known.add_argument("--model", help="checkpoint; without it random weights in the shapes of --random")
    known.add_argument("--random", choices=SHAPES, default="b", help="shapes of a ViT (default: b)")
    known.add_argument("--blocks", type=int, help="blocks of the random model, if not all")
    known.add_argument("--fractions", type=float, nargs="+", default=[0.7, 0.5], metavar="F")
    known.add_argument("--densities", type=float, nargs="+", default=[0.3, 0.5, 0.7], metavar="F")
    known.add_argument("--batches", type=int, nargs="+", default=[1, 8], metavar="N")
    known.add_argument("--tokens", type=int, default=197, help="tokens a sample of --layers (default: 197)")
    known.add_argument("--repeats", type=int, default=20)
    known.add_argument("--warmup", type=int, default=5, help="passes of each model that are not counted")
    known.add_argument("--compile", action="store_true", help="time under torch.compile too")
    known.add_argument("--dtype", choices=DTYPES, default="float32")
    known.add_argument("--device", default="auto")
    known.add_argument("--threads", type=int)
    return known


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    name = args.model or f"random, ViT-{args.random.upper()}/16 with {args.blocks or SHAPES[args.random][1]} blocks"
    circumstances = {"model": name, "device": find_device(args.device), "type": args.dtype}
    try:
        if args.load:
            if not args.model:
                sys.exit("--load compares with a dense checkpoint: pass --model.")
            print_circumstances("Time to load", **circumstances, repeats=args.repeats)
            print_loading([args.model, *args.load], args)
            return
        dense = load_dense(args.model, offline=True).model if args.model else random_vit(args.blocks, args.random)
        dense.to(find_device(args.device))
        torch.set_default_dtype(getattr(torch, args.dtype))  # what is made beside it is of the same type
        dense.to(torch.get_default_dtype())
        print_circumstances(
            "Speed of layers" if args.layers else "Speed of models", **circumstances, repeats=args.repeats
        )
        (print_layers if args.layers else print_integers if args.integers else print_models)(dense, args)
    except VitshrinkError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
