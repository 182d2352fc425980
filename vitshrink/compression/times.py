"""What a linear layer of every rank takes, and a block of a ViT by the tokens that it reads and keeps: some are timed,
and what lies between is interpolated."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.compression.clock import Clock, Run
from vitshrink.compression.static_layers import to_the_nearest
from vitshrink.methods.ranks import Storage, break_even_rank
from vitshrink.models.example import example_inputs
from vitshrink.models.merged import special_tokens, tokens_of
from vitshrink.models.parts import Product, after_attention, block_program, in_one_list, random_tokens, shortened
from vitshrink.models.runtimes import Program
from vitshrink.models.structures.merging import MergedTokens
from vitshrink.models.targets import blocks_of

RANKS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
"""Of the largest that makes a layer smaller: ranks that are timed."""

WIDTHS = (0.25, 0.5, 0.75)
"""Shares of the outputs or inputs of narrower dense layers that are timed."""

TOKENS = (1.0, 0.75, 0.5, 0.25)
"""Shares of the patches with which blocks are timed."""

ENDS = (TOKENS[0], TOKENS[-1])
"""Those with which a last block is timed that gives up all patches."""

MERGED = 4
"""One patch of so many is merged, where merging is timed."""


Axis = Literal[0, 1]
"""A side of a matrix: its outputs, or its inputs."""


@dataclass(frozen=True, eq=False)
class LayerTimes:
    """Nanoseconds of layers by shape, rank and number of tokens, and of narrower dense ones."""

    tables: Mapping[tuple[int, int], "_Table"]
    narrower: Mapping[tuple[tuple[int, int], Axis], Sequence[float]] = field(default_factory=dict)
    """By shape and side that gets smaller, as shares of the whole layer's time: of ``WIDTHS``, and of 1."""

    def of(self, shape: tuple[int, int], rank: int | None, tokens: int) -> int:
        """Of one layer; without a rank the dense one."""
        ranks = [] if rank is None else [rank]
        return round(float(self.matrix(shape, ranks, tokens)[-1, tokens]))

    def resized(self, shape: tuple[int, int], wanted: tuple[int, int], tokens: int) -> int:
        """Of a dense layer with fewer outputs, or fewer inputs."""
        axis: Axis = 0 if wanted[0] != shape[0] else 1
        share = float(_line([*WIDTHS, 1.0], self.narrower[shape, axis])(wanted[axis] / shape[axis]))
        return round(share * self.of(shape, None, tokens))

    def matrix(self, shape: tuple[int, int], ranks: Sequence[int], tokens: int) -> Tensor:
        """The dense layer, and below it these ranks, (1 + ranks, 1 + tokens): for 0, 1, 2 … ``tokens``."""
        table = self.tables[shape]
        ends = np.vstack([table.dense, *(table.of(rank) for rank in ranks)])
        share = (np.arange(tokens + 1) - table.tokens[1]) / (table.tokens[0] - table.tokens[1])
        return torch.from_numpy(np.maximum(ends[:, 1:] + (ends[:, :1] - ends[:, 1:]) * share, 0.0))


@dataclass(frozen=True, eq=False)
class _Table:
    """Of one shape, with two numbers of tokens."""

    tokens: tuple[int, int]
    ranks: Sequence[int]
    times: Sequence[tuple[int, int]]
    """Of the ranks."""
    dense: tuple[int, int]
    limit: int
    """Above this rank a layer is run as a dense one."""

    def of(self, rank: int) -> np.ndarray:
        if rank > self.limit:
            return np.array(self.dense, dtype=float)
        return np.array([np.interp(rank, self.ranks, column) for column in zip(*self.times, strict=True)])


def layer_times(
    clock: Clock, shapes: Iterable[tuple[int, int]], storage: Storage, tokens: int, *, integers: bool = False
) -> LayerTimes:
    """Of linear layers (out, in) that read so many ``tokens`` a sample, or half of them; with ``integers`` or not."""
    return LayerTimes({shape: _table(clock, shape, storage, tokens, integers) for shape in dict.fromkeys(shapes)})


def narrower_times(
    clock: Clock, sides: Iterable[tuple[tuple[int, int], Axis]], tokens: int, *, integers: bool = False
) -> dict[tuple[tuple[int, int], Axis], Sequence[float]]:
    """Of dense layers with fewer outputs or inputs, as shares of what the whole ones take: see ``LayerTimes``."""
    found: dict[tuple[tuple[int, int], Axis], Sequence[float]] = {}
    for shape, axis in dict.fromkeys(sides):
        sizes = [max(1, round(share * shape[axis])) for share in (*WIDTHS, 1.0)]
        shapes = {f"{size} of side {axis}": (size, shape[1]) if axis == 0 else (shape[0], size) for size in sizes}

        def runs(shapes: Mapping[str, tuple[int, int]] = shapes) -> dict[str, Run]:
            rounded = to_the_nearest if integers else None
            programs = {
                name: Product.of_shape(each, None, pivots=False, stored=clock.runtime.factors, rounded=rounded)
                for name, each in shapes.items()
            }
            for program in programs.values():
                program.model.to(clock.device)
            return {
                name: Run(program, random_tokens(clock.batch_size, tokens, shapes[name][1]))
                for name, program in programs.items()
            }

        what = {"layer": list(shape), "side": axis, **({"bits": 8} if integers else {})}
        times = list(clock.times(what, list(shapes), runs).values())
        found[shape, axis] = [each / times[-1] for each in times]
    return found


def _table(clock: Clock, shape: tuple[int, int], storage: Storage, tokens: int, integers: bool) -> _Table:
    stored, pivots = clock.runtime.factors, storage == "gauge"
    limit = break_even_rank(*shape, storage if stored else "factors")
    ranks = sorted({max(1, round(share * limit)) for share in RANKS}) if limit else []
    counts = (tokens, max(1, tokens // 2))
    forms: list[int | None] = [None, *ranks]
    names = {(rank, count): f"{rank or 'dense'} on {count}" for rank in forms for count in counts}

    def runs() -> dict[str, Run]:
        found = {}
        for rank in forms:
            rounded = to_the_nearest if integers else None
            program = Product.of_shape(shape, rank, pivots=pivots, stored=stored, rounded=rounded)
            program.model.to(clock.device)
            for count in counts:
                found[names[rank, count]] = Run(program, random_tokens(clock.batch_size, count, shape[1]))
        return found

    what = {"layer": list(shape), "pivots": pivots and stored, **({"bits": 8} if integers else {})}
    times = clock.times(what, list(names.values()), runs)
    dense, *others = [tuple(times[names[rank, count]] for count in counts) for rank in forms]
    return _Table(counts, ranks, others, dense, limit)  # type: ignore[arg-type]


def whole_time(clock: Clock, dense: PreTrainedModel) -> int:
    """Of the dense model, from what one of its blocks adds: passes are short then, and a busy machine disturbs less."""
    inputs = example_inputs(dense, clock.batch_size)
    if not in_one_list(dense):
        return clock.times(_shapes(dense), ["whole"], lambda: {"whole": Run(Program.of(dense), inputs)})["whole"]
    names = ["no block", "one block"]

    def runs() -> dict[str, Run]:
        return {name: Run(shortened(dense, number), inputs) for number, name in enumerate(names)}

    none, one = clock.times(_shapes(dense), names, runs).values()
    return none + len(blocks_of(dense)) * max(1, one - none)


@dataclass(frozen=True, eq=False)
class BlockTimes:
    """Nanoseconds of one block of an image model, and of what is no block."""

    prices: Tensor
    """Of a block that reads and keeps so many tokens, (tokens + 1, tokens + 1)."""
    rest: int
    blocks: int

    @property
    def whole(self) -> int:
        """Cost of the dense model."""
        return self.rest + self.blocks * round(float(self.prices[-1, -1]))


def block_times(clock: Clock, dense: PreTrainedModel) -> BlockTimes:
    """Of an image model whose tokens can be merged."""
    special, tokens = special_tokens(dense), tokens_of(dense)
    counts = [_part(share, special, tokens) for share in TOKENS]
    ends = [_part(share, special, tokens) for share in ENDS]
    kept = {count: count - (count - special) // MERGED for count in counts}
    specs = {f"sized {count}": MergedTokens(count, count, special, "sizes", "sizes") for count in counts}
    for count in counts:
        reads = "tokens" if count == tokens else "sizes"
        specs[f"merging {count}"] = MergedTokens(count, kept[count], special, reads, "sizes")
    for count in ends:
        specs[f"ending {count}"] = MergedTokens(count, special, special, "sizes")
    after = [f"after {count}" for count in counts]
    names = ["rest", "dense", *specs, *after]

    def runs() -> dict[str, Run]:
        batch, block, last = clock.batch_size, block_program(dense, 1), after_attention(dense, 1)
        width = block.inputs["x"].shape[-1]
        found = {"rest": Run(shortened(dense, 0), example_inputs(dense, batch))}
        found["dense"] = Run(block, random_tokens(batch, tokens, width))
        for name, spec in specs.items():
            program = block_program(dense, batch, spec)
            x = program.inputs["x"][:1]
            found[name] = Run(program, {"x": x.expand(batch, *x.shape[1:]).contiguous()})
        for name, count in zip(after, counts, strict=True):
            found[name] = Run(last, random_tokens(batch, count, width))
        return found

    times = clock.times(_shapes(dense), names, runs)
    every = np.arange(tokens + 1)
    mlp = _line(counts, [times[name] for name in after])
    attending = _line(counts, [times[f"merging {count}"] - float(mlp(kept[count])) for count in counts])
    prices = attending(every)[:, None] + mlp(every)[None]
    np.fill_diagonal(prices, _line(counts, [times[f"sized {count}"] for count in counts])(every))
    prices[:, special] = _line(ends, [times[f"ending {count}"] for count in ends])(every)
    prices[tokens, tokens] = times["dense"]
    return BlockTimes(torch.from_numpy(np.maximum(prices, 1.0)), times["rest"], len(blocks_of(dense)))


def _part(share: float, special: int, tokens: int) -> int:
    return special + max(MERGED, round(share * (tokens - special)))


def _line(known: Sequence[float], values: Sequence[float]) -> Callable[[np.ndarray | float], np.ndarray]:
    """Through known points, straight on beyond them."""
    x, places = np.unique(np.array(known, dtype=float), return_index=True)
    y = np.array(values, dtype=float)[places]

    def at(wanted: np.ndarray | float) -> np.ndarray:
        if len(x) == 1:
            return np.full(np.shape(wanted), y[0])
        segment = np.clip(np.searchsorted(x, wanted) - 1, 0, len(x) - 2)
        slope = (y[segment + 1] - y[segment]) / (x[segment + 1] - x[segment])
        found: np.ndarray = y[segment] + slope * (wanted - x[segment])
        return found

    return at


def _shapes(dense: PreTrainedModel) -> dict[str, str]:
    """What the times of a model follow from."""
    shapes = [(name, tuple(each.shape)) for name, each in dense.named_parameters()]
    image = getattr(dense.config, "image_size", None)
    found = hashlib.sha256(repr((type(dense).__name__, image, shapes)).encode()).hexdigest()
    return {"model": found, "inputs": str({name: tuple(x.shape) for name, x in example_inputs(dense).items()})}
