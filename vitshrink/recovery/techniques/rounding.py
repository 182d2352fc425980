"""Integers made anew, block by block, for what really reaches a block, while the rest of it learns to make up for them.

Compression rounds every matrix for the inputs that it has in the dense model. Here a block gets its dense matrices
back, which learn to give the dense block's output on what the rounded blocks before it hand on; then they are rounded
with feedback one after another, and after each of them those that are still in floating point learn again. Steps, and
with them the bytes, stay. Single integers that follow a gradient do not do: each would cost what feedback had saved.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from time import perf_counter

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.config.options import FinetuneConfig
from vitshrink.models.codes import Codes, encode
from vitshrink.models.families import Role, family_of
from vitshrink.models.reading import chain_problem
from vitshrink.models.structures.coded import Coded, CodedLinear
from vitshrink.models.structures.following import borrowed_parameters
from vitshrink.models.targets import blocks_of
from vitshrink.recovery.checks import tokens_kind
from vitshrink.recovery.preparation import Prepared
from vitshrink.recovery.splitting import Split
from vitshrink.recovery.techniques.blockwise import Streams, batches_that_fit
from vitshrink.recovery.techniques.importance import Importance, Inputs, InputSums, importance_of
from vitshrink.runtime.modes import evaluating
from vitshrink.runtime.observer import Job

LEARNING_RATE = 2e-4
PART_OF_TIME = 0.75
"""Of ``--minutes``, after which the blocks that are left keep their integers."""

SAMPLES = 256
"""From which the covariance of the inputs of a matrix is estimated."""

MOST_TRIES = 6
"""Coarser steps that are tried until integers take no more bytes than before."""

GROUPS: tuple[tuple[Role, ...], ...] = (("query", "key", "value"), ("output",), ("fc1",), ("fc2",))
"""What is rounded at a time: each reads what those before it give."""

Rounder = Callable[[Tensor, Tensor, float, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Integers and errors of a matrix, from it, the covariance of its inputs, the tokens that stand behind that, and the
steps of rows and columns, see ``vitshrink.compression.rounding.at_steps``."""


@dataclass(frozen=True, eq=False)
class Block:
    """One block, its coded layers by the groups in which they are rounded, and the dense block it stands for."""

    index: int
    module: nn.Module
    dense: nn.Module
    groups: Sequence[Sequence[str]]
    """Paths relative to the block."""
    first: Sequence[str]
    """Those that read what the block is given."""
    learning: Sequence[nn.Parameter]
    """What learns beside its matrices."""

    @property
    def paths(self) -> list[str]:
        return [path for group in self.groups for path in group]

    def layer(self, path: str) -> nn.Linear | CodedLinear:
        found = self.module.get_submodule(path)
        assert isinstance(found, nn.Linear | CodedLinear)
        return found


def roundable(model: PreTrainedModel, dense: PreTrainedModel | None, config: FinetuneConfig) -> bool:
    """Whether there are integers in the blocks that can be made anew."""
    if config.rounding == 0 or config.objective != "distill" or dense is None or tokens_kind(model) is not None:
        return False
    if not {role for group in GROUPS for role in group} <= set(family_of(model).modules) or chain_problem(dense):
        return False
    return any(_groups(model, *blocks) for blocks in zip(blocks_of(model), blocks_of(dense), strict=False))


@dataclass(frozen=True)
class Rounding:
    """What making integers anew has done."""

    before: float | None = None
    """Held-out loss of the model as compression left it; None where nothing was done."""
    seconds: float = 0.0
    blocks: Sequence[dict[str, float]] = ()
    """``block``, ``before`` and ``after`` of every block that was tried: its relative squared errors, weighted."""


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Everything that a model holds, in tensors of its own."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def take_over(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a model what ``weights_of`` says, in place; streams of integers may be of other lengths."""
    for name, module in model.named_modules():
        if isinstance(module, Coded):
            module.take(weights[f"{name}.weight"], weights[f"{name}.codes"])
    model.load_state_dict(weights)


def round_anew(
    ready: Prepared,
    dense: PreTrainedModel,
    split: Split,
    config: FinetuneConfig,
    rounder: Rounder,
    judge: Callable[[], list[float]],
    job: Job,
    *,
    seed: int,
) -> Rounding:
    """Round the blocks of a model anew, in place, or leave it as it was where that was no worse.

    No matrix takes more bytes than before. ``judge`` gives the losses of the held-out rows.
    """
    began, old, before = perf_counter(), weights_of(ready.model), fmean(judge())
    if not math.isfinite(before):
        return Rounding()
    blocks = _each(ready, dense, split, config, rounder, job, seed=seed)
    if not fmean(judge()) < before:
        take_over(ready.model, old)
        blocks = [entry | {"after": entry["before"]} for entry in blocks]
    return Rounding(before, perf_counter() - began, blocks)


def _each(
    ready: Prepared,
    dense: PreTrainedModel,
    split: Split,
    config: FinetuneConfig,
    rounder: Rounder,
    job: Job,
    *,
    seed: int,
) -> list[dict[str, float]]:
    """Round block by block; one that gets worse on the held-out samples is put back."""
    model, began, slowest = ready.model, perf_counter(), 0.0
    batches, held_out = (
        [batch.to(ready.accelerator.device) for batch in split.data.batches(indices, config.batch_size)]
        for indices in (split.training, split.held_out)
    )
    batches = batches_that_fit(dense, batches)
    history = []
    with job.stage("rounding", "Rounding blocks again", len(blocks_of(model))) as advance, evaluating(model, dense):
        longest = max(0 if each.mask is None else each.mask.shape[-1] for each in (*batches, *held_out))
        importance = importance_of(dense, batches[: max(1, SAMPLES // config.batch_size)], seed, longest)
        generator = torch.Generator().manual_seed(seed)  # what is drawn later is the same after a kill
        training, judging = (Streams.of(model, dense, each, ready.accelerator.autocast) for each in (batches, held_out))
        for block in _blocks(ready, dense):
            started = perf_counter()
            for streams in (training, judging):
                streams.aim_at(block.dense, importance.weights(block.index))
            if block.groups:
                before = judging.error(block.module)
                after = _Attempt(block, training, judging, importance, rounder, config.rounding, generator).run(before)
                history.append({"block": block.index, "before": before, "after": after})
            for streams in (training, judging):
                streams.pass_on(block.module)
            advance(1)
            slowest = max(slowest, perf_counter() - started)
            if config.minutes is not None and _mean(ready, perf_counter() - began + slowest) > _most(config.minutes):
                break
    return history


def _most(minutes: float) -> float:
    return PART_OF_TIME * 60 * minutes


def _mean(ready: Prepared, seconds: float) -> float:
    """The same in every process."""
    return float(ready.accelerator.reduce(torch.tensor(seconds, device=ready.accelerator.device), "mean"))


def _blocks(ready: Prepared, dense: PreTrainedModel) -> Iterator[Block]:
    model = ready.model
    # what several blocks read cannot be fitted to the first of them
    shared = {id(parameter) for parameter in borrowed_parameters(model)}
    trainable = {id(parameter) for parameter in ready.parameters.values()} - shared
    for index, (module, other) in enumerate(zip(blocks_of(model), blocks_of(dense), strict=True)):
        groups = _groups(model, module, other)
        matrices = {id(module.get_submodule(path).weight) for group in groups for path in group}
        learning = [each for each in module.parameters() if id(each) in trainable - matrices]
        first = [family_of(model).modules[role] for role in GROUPS[0]]
        yield Block(index, module, other, groups, first, learning)


def _groups(model: PreTrainedModel, block: nn.Module, dense: nn.Module) -> list[list[str]]:
    """The coded layers of a block of which the dense model has the matrices, in the order of rounding."""
    modules = family_of(model).modules
    coded = {path: each for path, each in block.named_modules() if isinstance(each, CodedLinear)}
    others = {path: each for path, each in dense.named_modules() if type(each) is nn.Linear}
    found = [[modules[role] for role in group] for group in GROUPS]
    fitting = [
        [path for path in group if path in coded and path in others and _alike(coded[path], others[path])]
        for group in found
    ]
    return [group for group in fitting if group]


def _alike(coded: CodedLinear, dense: nn.Linear) -> bool:
    return coded.dense_shape == tuple(dense.weight.shape) and (coded.bias is None) == (dense.bias is None)


@dataclass(eq=False)
class _Attempt:
    """To round one block."""

    block: Block
    training: Streams
    judging: Streams
    importance: Importance
    rounder: Rounder
    epochs: int
    generator: torch.Generator

    def run(self, before: float) -> float:
        """Round the block, or leave it as it was where that was no worse; returns its held-out error."""
        block = self.block
        coded = {path: layer for path in block.paths if isinstance(layer := block.layer(path), CodedLinear)}
        old = [parameter.detach().clone() for parameter in block.learning]
        loose = {path: _dense_layer(block, path, layer) for path, layer in coded.items()}
        for path, layer in loose.items():
            block.module.set_submodule(path, layer, strict=True)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for group in block.groups:
            self._learn(loose)
            inputs = self._inputs(group[0])
            for path in group:
                found[path] = self._round(coded[path], loose.pop(path), inputs)
        after = self.judging.error(block.module)
        for path, layer in coded.items():
            block.module.set_submodule(path, layer, strict=True)
        if after < before:
            for path, (rows, stream) in found.items():
                coded[path].take(rows, stream)
            return after
        with torch.no_grad():
            for parameter, value in zip(block.learning, old, strict=True):
                parameter.copy_(value)
        return before

    def _learn(self, loose: dict[str, nn.Linear]) -> None:
        """Train what is still in floating point, on the dense block's output."""
        learning = [*self.block.learning, *(layer.weight for layer in loose.values())]
        optimizer = torch.optim.AdamW(learning, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
        batches = len(self.training.own)
        steps = self.epochs * batches
        for epoch in range(self.epochs):
            for number, position in enumerate(
                torch.randperm(batches, generator=self.generator).tolist(), epoch * batches
            ):
                for group in optimizer.param_groups:
                    group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * number / steps))
                self.training.loss(self.block.module, position).backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(learning, 1.0)
                optimizer.step()
                optimizer.zero_grad()

    @torch.no_grad()
    def _inputs(self, path: str) -> Inputs:
        """What a layer reads."""
        sums = InputSums()

        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums.add(inputs[0], batch.mask, tokens)

        # queries, keys and values read what the block before gave
        tokens = self.importance.tokens(self.block.index - (path in self.block.first))
        handle = self.block.layer(path).register_forward_pre_hook(add)
        count = 0
        try:
            for batch in self.training.own:
                with self.training.autocast():
                    batch.through(self.block.module)
                count += len(batch.hidden)
                if count >= SAMPLES:
                    break
        finally:
            handle.remove()
        return sums.found()

    @torch.no_grad()
    def _round(self, coded: CodedLinear, layer: nn.Linear, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Put integers into a layer in floating point, its bias making up for their mean error; steps and stream."""
        columns, weight = coded.decoded().columns, layer.weight.detach()
        rows = coded.weight.detach().float()
        for _ in range(MOST_TRIES):
            integers, errors = self.rounder(weight, inputs.covariance, inputs.tokens, rows, columns)
            kind = torch.int8 if integers.abs().max() < 128 else torch.int16
            stream = encode(Codes(integers.to(kind), columns))
            if len(stream) <= coded.spec.bytes:
                break
            rows = rows * 2 ** (1.2 * 8 * (len(stream) - coded.spec.bytes) / weight.numel() + 1e-3)
        else:
            rows, stream = coded.weight.detach().float(), coded.codes
            errors = weight - coded.dense_weight()
        layer.weight.copy_(weight - errors)
        layer.weight.requires_grad_(False)
        if layer.bias is not None and any(layer.bias is each for each in self.block.learning):
            layer.bias.add_((errors.double() @ inputs.mean).to(layer.bias.dtype))
        return rows, stream


def _dense_layer(block: Block, path: str, coded: CodedLinear) -> nn.Linear:
    """The dense layer's matrix; the bias is the coded layer's own, so that what learns stays what it is."""
    dense = block.dense.get_submodule(path)
    assert isinstance(dense, nn.Linear)
    made = nn.Linear(coded.in_features, coded.out_features, bias=False, device="meta")
    made.weight = nn.Parameter(dense.weight.detach().to(coded.weight.dtype, copy=True))
    made.bias = coded.bias  # type: ignore[assignment]
    if coded.bias is not None and any(coded.bias is each for each in block.learning):
        with torch.no_grad():
            coded.bias.copy_(dense.bias)
    return made.train(coded.training)
