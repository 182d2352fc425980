"""A model with 8-bit integers in its products, inputs included, on grids that calibration samples choose.

What errors cost is what the output says of them (``statistics.sensitivity``): errors d of the inputs of W cost
½ Σ_j ω_j d_j², with ω = diag(Wᵀ H W). Grids, the share of an input's spread that is moved into the weights
(SmoothQuant, arXiv 2211.10438), integers, and the choice of what stays in floating point all go by that.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.compression.grids import best_grid, best_grid_around
from vitshrink.compression.products import Product, values_of
from vitshrink.compression.quantization import integer_table, require_floating_point
from vitshrink.compression.rounding import at_steps
from vitshrink.compression.smoothing import smooth, smooth_itself
from vitshrink.compression.static_layers import (
    Factors,
    compared_in,
    empty,
    layers_of,
    module_at,
    parts_of,
    split_view,
    steps_of,
)
from vitshrink.data.opening import CalibrationData
from vitshrink.models.checkpoint import replace_layers
from vitshrink.models.families import family_of
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.structures.static import LARGEST, StaticConv2d, StaticProduct
from vitshrink.models.targets import blocks_of, matching
from vitshrink.models.views import own
from vitshrink.runtime import processes
from vitshrink.runtime.observer import Job
from vitshrink.statistics.calibration import CalibrationBatch
from vitshrink.statistics.inputs import collect_inputs

NORMS = {"layernorm_before": ("query", "key", "value"), "layernorm_after": ("fc1",)}
"""Of a block that normalizes what its layers read: norms that nothing else reads, and who reads them."""

MOST = 0.05
"""Loss of one layer, in nats, at which it is left in floating point."""


@dataclass(frozen=True)
class Statistics:
    """What became of a layer."""

    loss: float
    """That its rounding is expected to cost at the outputs, in nats for classifiers."""
    kept: bool
    """Whether it stays in floating point."""


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A model with integers, and what is to be said of its layers by name."""

    model: PreTrainedModel
    layers: Mapping[str, Statistics]

    @property
    def kept(self) -> dict[str, float]:
        """Layers that stay in floating point, and what 8 bits would cost."""
        return {name: layer.loss for name, layer in self.layers.items() if layer.kept}


@dataclass(eq=False)
class Rounding:
    """A model of which tensors are its own, and in which low-rank layers are two linear ones each."""

    model: PreTrainedModel
    dtype: torch.dtype
    layers: dict[str, nn.Module]
    """Those to be rounded: linear layers, ``Factors`` and the patch projection."""
    products: dict[nn.Module, Product] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: PreTrainedModel, dtype: torch.dtype, include: Sequence[str], exclude: Sequence[str]
    ) -> "Rounding":
        working = own(split_view(model))
        found = dict(layers_of(working))
        names = list(found)
        chosen = (matching(names, include, "include") if include else set(names)) - matching(names, exclude, "exclude")
        return cls(working, dtype, {name: layer for name, layer in found.items() if name in chosen})

    def collect(
        self, batches: Sequence[CalibrationBatch], device: torch.device, seed: int, on_batch: Callable[[int], None]
    ) -> None:
        """Learn what reaches the layers; those that the output does not depend on are left alone."""
        self.model.to(device)  # type: ignore[arg-type]
        parts = {
            (name if part is layer else f"{name}.{place}"): part
            for name, layer in self.layers.items()
            for place, part in parts_of(layer)
        }
        found = collect_inputs(self.model, list(parts), batches, seed=seed, on_batch=on_batch)
        self.model.cpu()
        for name, each in found.items():
            self.products[parts[name]] = Product.of(parts[name], each.cpu())
        self.layers = {
            n: layer for n, layer in self.layers.items() if all(p in self.products for _, p in parts_of(layer))
        }

    def first(self, layer: nn.Module) -> Product | None:
        """The product that reads what a layer does; None where the layer is not rounded."""
        return self.products.get(layer.inner if isinstance(layer, Factors) else layer)

    def last(self, layer: nn.Module) -> nn.Linear | None:
        """The linear layer that gives what a layer does."""
        found = layer.outer if isinstance(layer, Factors) else layer
        return found if isinstance(found, nn.Linear) else None

    def smooth(self) -> None:
        """Move spread between channels to where it does no harm, as far as it pays."""
        absorbed: set[Product] = set()
        for giver, readers in self._absorbing():
            smooth(giver, readers, self.dtype)
            absorbed.update(readers)
        for readers in self._groups():
            if not absorbed.intersection(readers) and isinstance(readers[0].module, nn.Linear):
                smooth_itself(readers, self.dtype)

    def _absorbing(self) -> Iterator[tuple[nn.Module | Product, list[Product]]]:
        """Who gives what only the readers read, and these."""
        family = family_of(self.model)
        for block in blocks_of(self.model):
            found = {role: module_at(block, path) for role, path in family.modules.items()}
            for norm, roles in NORMS.items() if family.grid else ():
                readers = [self.first(found[role]) for role in roles]  # type: ignore[index]
                if all(readers):
                    yield block.get_submodule(norm), [each for each in readers if each is not None]
            value = self.last(found["value"]) if {"value", "output"} <= set(found) else None
            if value is not None and (output := self.first(found["output"])) is not None:
                yield self.products.get(value, value), [output]
        for layer in self.layers.values():
            if isinstance(layer, Factors):
                yield self.products[layer.inner], [self.products[layer.outer]]

    def choose_grids(self) -> None:
        """One for all that read the same."""
        for readers in self._groups():
            grid, _ = best_grid(values_of(readers), self.dtype)
            for reader in readers:
                reader.grid = grid

    def choose_outputs(self) -> None:
        """Of queries and keys, so that runtimes may multiply them as integers."""
        for block in blocks_of(self.model):
            found = [self.last(giver) for giver in compared_in(self.model, block)]
            givers = [self.products[each] for each in found if each is not None and each in self.products]
            for giver in givers if len(givers) == 2 else ():
                giver.output = best_grid_around(giver.answers(), self.dtype)

    def _groups(self) -> Iterator[list[Product]]:
        family, left = family_of(self.model), dict(self.products)
        for block in blocks_of(self.model):
            paths = [family.modules[role] for role in ("query", "key", "value") if role in family.modules]
            readers = [self.first(module_at(block, path)) for path in paths]
            known = [reader for reader in readers if reader is not None]
            if known:
                yield known
            for reader in known:
                del left[reader.module]
        for product in left.values():
            yield [product]

    def round(self) -> dict[str, Statistics]:
        """Put integers in the place of the layers that lose little, and low-rank layers where they lose much."""
        found, built = {}, {}
        for name, layer in self.layers.items():
            made, loss = self._rounded(layer)
            found[name] = Statistics(loss, kept=loss > MOST)
            if not found[name].kept:
                built[name] = made
            elif (first := self.first(layer)) is not None:
                first.as_it_was()
        for name, layer in list(self.model.named_modules()):
            if isinstance(layer, Factors) and name not in built:
                built[name] = LowRankLinear.from_factors(
                    layer.outer.weight, layer.inner.weight, layer.outer.bias, dtype=self.model.dtype
                )
        replace_layers(self.model, built | integer_table(self.model))
        return found

    def _rounded(self, layer: nn.Module) -> tuple[nn.Module, float]:
        """What takes the place of a layer, and its loss."""
        if isinstance(layer, nn.Conv2d):
            convolution = StaticConv2d(layer)
            shift, loss = self._fill(convolution, self.products[layer])
            return _shifted(convolution, layer.bias, shift), loss
        outer = self.last(layer)
        assert outer is not None
        inner = layer.inner if isinstance(layer, Factors) else None
        output = self.products[outer].output
        first = self.first(layer)
        assert first is not None
        made = empty(layer, rounds_outputs=output is not None, factors=first.factors is not None)  # type: ignore[arg-type]
        shift, loss = self._fill(made, self.products[outer])
        if inner is not None and made.down is not None:
            inner_shift, inner_loss = self._fill(made.down, self.products[inner])
            shift, loss = shift + outer.weight.detach().float() @ inner_shift, loss + inner_loss
        if output is not None:
            made.output_scale.fill_(output.scale)
            made.output_zero.fill_(output.zero)
            loss += self.products[outer].answers().loss(output)
        return _shifted(made, outer.bias, shift), loss

    def _fill(self, made: StaticProduct, product: Product) -> tuple[Tensor, float]:
        """Integers and grids; returns what the outputs lack on average, (m,), and the loss."""
        weight, grid, sensitivity = product.weight, product.grid, product.seen.sensitivity
        assert grid is not None
        steps = steps_of(weight, self.dtype)
        covariance = product.covariance
        columns = torch.ones(weight.shape[1])
        integers, errors = at_steps(weight, covariance, sensitivity.tokens, steps.squeeze(1), columns, LARGEST)
        made.integers.copy_(integers.view(made.integers.shape))
        made.weight.copy_(steps)
        made.input_scale.fill_(grid.scale)
        made.input_zero.fill_(grid.zero)
        if made.input_factors is not None and product.factors is not None:
            made.input_factors.copy_(product.factors)
        tokens = product.tokens
        rounded = grid.rounded(tokens)
        shift = (tokens @ weight.T - rounded @ (weight - errors).T).mean(0)
        wide = errors.double()
        loss = 0.5 * float(((wide @ covariance) * wide).sum(1) @ product.outputs)
        loss += float(((rounded - tokens).square().mean(0)) @ product.costs())
        return shift, loss


@torch.no_grad()
def calibrated(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    *,
    dtype: torch.dtype,
    device: torch.device,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    on_batch: Callable[[int], None] = lambda _samples: None,
) -> Calibrated:
    """A view of the model with integers in the layers of its blocks and in the patch projection, on the CPU.

    ``dtype`` is that in which scales are stored; ``include`` and ``exclude`` are searched in the names of
    layers, as by ``find_targets``. Low-rank layers
    lose their pivots, see ``models.plain``.

    Raises UsageError where the model is quantized already, NumericsError and DataError as calibration does.
    """
    require_floating_point(model)
    rounding = Rounding.of(model, dtype, include, exclude)
    rounding.collect(batches, device, seed, on_batch)
    rounding.smooth()
    rounding.choose_grids()
    rounding.choose_outputs()
    layers = rounding.round()
    return Calibrated(rounding.model.eval(), layers)


def rounded(
    model: PreTrainedModel,
    data: CalibrationData,
    job: Job,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> PreTrainedModel:
    """What the first process makes of a model by ``calibrated``, and says of it; others do not need it."""
    with processes.together():
        if not processes.is_main():
            return model
        with job.stage("calibrate", "Calibrating", len(data.samples)) as advance:
            found = calibrated(
                model,
                data.batches,
                dtype=dtype,
                device=device,
                include=include,
                exclude=exclude,
                seed=seed,
                on_batch=advance,
            )
    for name, loss in found.kept.items():
        job.warn(f"{name} stays in floating point: with 8 bits it would cost {loss:.2g}.")
    return found.model


def _shifted(made: StaticProduct, bias: Tensor | None, shift: Tensor) -> StaticProduct:
    if made.bias is not None and bias is not None:
        made.bias.copy_(bias.float() + shift)
    return made
