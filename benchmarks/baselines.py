"""Published methods that are compared with but not offered: they are beaten, or cost too much for what they give."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.compression.allocation import ALLOCATIONS, allocate
from vitshrink.compression.candidates import Candidate, Offer, Plan
from vitshrink.compression.compressor import Compressor
from vitshrink.compression.estimation import LayerEstimator
from vitshrink.compression.findings import Findings
from vitshrink.data import Batch
from vitshrink.errors import TargetError
from vitshrink.methods import Factorization
from vitshrink.models.fidelity import feature_rows
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.targets import Target, blocks_of
from vitshrink.models.tasks import head_of, task_of
from vitshrink.runtime.observer import Job
from vitshrink.statistics.algebra import full_svd
from vitshrink.statistics.calibration import to_device
from vitshrink.statistics.effects import MEASURED_SAMPLES
from vitshrink.statistics.functionals import random_functional
from vitshrink.statistics.reference import DenseOutputs
from vitshrink.statistics.walk import HiddenBatch, hidden_batches

SEARCH_SAMPLES = 64
RANK_GRID = 16


def fisher_weighted(compressor: Compressor, job: Job) -> Findings:
    """FWSVD (Hsu et al. 2022, arXiv 2207.00112): SVD of the weights, each row weighted by its Fisher information.

    Minimizes Σ_i s_i² ‖W_i − Ŵ_i‖² with s_i² = Σ_j E[(∂L/∂W_ij)²] over the calibration samples. The paper takes the
    gradients of the loss on labels; here they are those of our label-free objective, as no method is given labels.
    """
    dense, targets = compressor.dense, compressor.material.targets
    with job.stage("calibrate", "Row importance"):
        importance = row_importance(dense, targets, calibration_of(compressor), compressor.config.seed)
    factors: dict[str, Factorization] = {}
    with job.stage("factorize", "Factorizing"), torch.no_grad():
        for target in targets:
            layer = dense.get_submodule(target.name)
            scale = importance[target.name].sqrt()
            scale = scale.clamp_min(1e-6 * float(scale.max()))[:, None]
            U, S, Vh = full_svd(scale * layer.weight.double())
            factors[target.name] = Factorization.from_spectrum(U * S / scale, Vh, S.square())
    return Findings(factors, {}, {})


def row_importance(
    model: PreTrainedModel, targets: Sequence[Target], batches: Iterable[Batch], seed: int
) -> dict[str, Tensor]:
    """Σ_j (∂L/∂W_ij)² summed over the samples, (m,) for each target, from one forward and one backward pass."""
    importance: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    mask: Tensor | None = None

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...], _output: Tensor) -> None:
            inputs[name] = arguments[0].detach()

        return hook

    def add(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _gradients: Any, gradients: tuple[Tensor, ...]) -> None:
            g, x = gradients[0], inputs.pop(name)
            if mask is not None:
                g = g * mask[..., None]
            # The gradient of a sample's W is G = gᵀ x; its rows' squared norms are the diagonal of gᵀ (x xᵀ) g.
            rows = (x @ x.mT @ g * g).sum((0, 1)).double().clamp_min(0)
            importance[name] = importance.get(name, 0) + rows

        return hook

    def start(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0].detach().requires_grad_(), *arguments[1:])

    handles = [blocks_of(model)[0].register_forward_pre_hook(start)]
    for target in targets:
        layer = model.get_submodule(target.name)
        handles += [layer.register_forward_hook(keep(target.name)), layer.register_full_backward_hook(add(target.name))]
    try:
        for batch in batches:
            mask = None if batch.mask is None else batch.mask.to(device)
            outputs = model(**to_device(batch.inputs, device))
            torch.autograd.backward(random_functional(model, outputs, batch, generator)(outputs).sum())
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad()
    return importance


class FeatureErrorSearch:
    """Rank search of FLAR-SVD (Thoma et al., CVPR workshops 2025), without its term for latency.

    Every layer gets the smallest rank of the grid whose own truncation, with all other layers dense, changes what the
    head reads by at most a threshold that is common to all layers; no such rank: dense. The threshold is bisected to
    the budget. Errors are relative and squared; they are measured once, when they are first asked for.
    """

    def __init__(self, compressor: Compressor, findings: Findings) -> None:
        self.compressor, self.findings = compressor, findings
        self.offers = {offer.name: offer for offer in compressor.offers(findings)}
        self.model = copy.deepcopy(compressor.dense).eval()
        self.blocks = blocks_of(self.model)
        self.pooled = task_of(compressor.dense) in ("image-classification", "text-classification")
        self.norm = getattr(self.model.base_model, "layernorm", nn.Identity())
        self.errors: dict[tuple[str, int], float] = {}
        self.entering, self.features = self._run_dense(_first(calibration_of(compressor), SEARCH_SAMPLES))

    def plan(self, budget: int) -> Plan:
        """Ranks for a budget of the whole model's parameters. Raises TargetError."""
        targets = self.compressor.material.targets

        def plan_at(threshold: float) -> Plan:
            return {target.name: self._cheapest(target, threshold) for target in targets}

        low, high = math.log(1e-8), math.log(1e4)
        best = plan_at(math.exp(high))
        if self.compressor.size(best) > budget:
            raise TargetError(
                f"rank {RANK_GRID} everywhere needs {self.compressor.size(best):,} parameters; {budget:,} are allowed."
            )
        for _ in range(30):
            middle = (low + high) / 2
            plan = plan_at(math.exp(middle))
            if self.compressor.size(plan) <= budget:
                high, best = middle, plan
            else:
                low = middle
        return best

    def _cheapest(self, target: Target, threshold: float) -> Candidate:
        """By bisection over the grid: the error falls with the rank."""
        offer: Offer = self.offers[target.name]
        grid = [each for each in offer.candidates if each.grade % RANK_GRID == 0]
        low, high = 0, len(grid)
        while low < high:
            middle = (low + high) // 2
            if self._error(target, grid[middle].grade) <= threshold:
                high = middle
            else:
                low = middle + 1
        return grid[low] if low < len(grid) else offer.kept

    @torch.no_grad()
    def _error(self, target: Target, rank: int) -> float:
        if (target.name, rank) not in self.errors:
            layer = self.model.get_submodule(target.name)
            found = self.findings.layers[target.name]
            up, down = found.up[:, :rank], found.down[:rank]
            truncated = LowRankLinear.from_factors(up, down, layer.bias, dtype=layer.weight.dtype)
            self.model.set_submodule(target.name, truncated)
            difference = self._features(self.entering[target.block], target.block) - self.features
            self.model.set_submodule(target.name, layer)
            error = difference.double().square().sum() / self.features.double().square().sum()
            self.errors[target.name, rank] = float(error)
        return self.errors[target.name, rank]

    @torch.no_grad()
    def _run_dense(self, batches: Sequence[Batch]) -> tuple[list[list[HiddenBatch]], Tensor]:
        """What enters each block, so that a search there need not start at the first, and what the head reads."""
        entering = [hidden_batches(self.model, self.blocks[0], batches)]
        for block in self.blocks[:-1]:
            entering.append([_moved(batch, batch.through(block)) for batch in entering[-1]])
        return entering, self._features(entering[0], 0)

    def _features(self, batches: Sequence[HiddenBatch], first: int) -> Tensor:
        """(samples, width) for classifiers, which read the first token; else (tokens, width) of all real tokens."""
        features = []
        for entering in batches:
            moving = _moved(entering, entering.hidden)
            for block in self.blocks[first:]:
                moving.hidden = moving.through(block)
            hidden = self.norm(moving.hidden)
            if self.pooled:
                features.append(hidden[:, 0])
            else:
                features.append(hidden.flatten(0, 1) if moving.mask is None else hidden[moving.mask])
        return torch.cat(features)


class ScaledCurves:
    """Rank allocation of KFAC-SVD + LEMS (2026), written from its description: no code of it may be used.

    The factors are two-sided Kronecker-factored ones, and what they say of the ranks of a layer, its error curve, is
    scaled by one measurement: the divergence of the outputs when this layer alone is cut to a tenth of its rank. The
    least sum of scaled errors within the budget gives the ranks.
    """

    def __init__(self, compressor: Compressor, findings: Findings) -> None:
        self.compressor = compressor
        offers = compressor.offers(findings)
        batches = _first(calibration_of(compressor), MEASURED_SAMPLES)
        reference = DenseOutputs(compressor.dense)
        kept = {offer.name: offer.kept for offer in offers}
        self.scaled: list[Offer] = []
        for offer in offers:
            tenth = offer.nearest(max(1, min(offer.site.shape) // 10))
            model = compressor.replaced(findings, kept | {offer.name: tenth})
            scale = self._divergence(model, reference, batches) / max(tenth.loss, 1e-300)
            candidates = [replace(each, loss=each.loss * scale) for each in offer.candidates]
            self.scaled.append(replace(offer, candidates=candidates, nothing=offer.nothing * scale))

    def plan(self, budget: int) -> Plan:
        """Ranks for a budget of the whole model's parameters. Raises TargetError."""
        return allocate(self.scaled, budget - self.compressor.fixed(self.scaled), ALLOCATIONS["loss"])

    @torch.no_grad()
    def _divergence(self, model: PreTrainedModel, reference: DenseOutputs, batches: Sequence[Batch]) -> float:
        head, device = head_of(model), next(model.parameters()).device
        found = [
            head.divergence(_rows(reference(batch), batch), _rows(model(**to_device(batch.inputs, device)), batch))
            for batch in batches
        ]
        return float(torch.cat(found).double().mean())


def _rows(outputs: Any, batch: Batch) -> Tensor:
    """What a head compares: the logits of samples or tokens, or the features of samples."""
    if "logits" not in outputs:
        return feature_rows(outputs["last_hidden_state"], batch.mask)
    logits: Tensor = outputs["logits"].float()
    return logits if logits.ndim == 2 or batch.mask is None else logits[batch.mask.to(logits.device)]


def calibration_of(compressor: Compressor) -> Sequence[Batch]:
    """The batches that a compressor learns from."""
    assert isinstance(compressor.estimator, LayerEstimator)
    assert compressor.estimator.calibration is not None
    return compressor.estimator.calibration.batches


def _moved(batch: HiddenBatch, hidden: Tensor) -> HiddenBatch:
    return HiddenBatch(hidden, batch.arguments, batch.keywords, batch.mask)


def _first(batches: Sequence[Batch], samples: int) -> list[Batch]:
    """As many batches as hold ``samples`` samples."""
    size = max(len(batch.keys) for batch in batches)
    return list(islice(batches, math.ceil(samples / size)))
