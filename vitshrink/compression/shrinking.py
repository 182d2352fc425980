"""A job on a model in memory, to which loading, saving and measuring are added elsewhere: one smaller model a size."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from vitshrink.compression import attentions
from vitshrink.compression.allocation import ALLOCATIONS, Allocation, Offer, Plan
from vitshrink.compression.attentions import AttentionCompression
from vitshrink.compression.compensation import COMPENSATIONS
from vitshrink.compression.layers import Compression, Compressor, Factors, choose_ranks
from vitshrink.compression.quantization import Quantization
from vitshrink.compression.search import Bound, Search
from vitshrink.config.choices import choose
from vitshrink.config.options import CompressConfig, parse_quantity, share_of
from vitshrink.data import Preprocessor, SampleSet
from vitshrink.data.opening import CalibrationData
from vitshrink.errors import TargetError, UsageError
from vitshrink.methods import AttentionMethod, Method, find_method, options_of
from vitshrink.methods.ranks import Storage
from vitshrink.models import cost
from vitshrink.models.checkpoint import HEADER_BYTES
from vitshrink.models.maps import approximate_maps, landmarks_of
from vitshrink.models.resolution import mix_tokens
from vitshrink.models.structures.landmarks import Landmarks
from vitshrink.models.structures.tokens import MixedTokens
from vitshrink.models.targets import Target, find_targets
from vitshrink.runtime import extras
from vitshrink.runtime.observer import Job
from vitshrink.runtime.state import Progress
from vitshrink.statistics.needs import Needs


@dataclass(frozen=True)
class Choices:
    """What a config asks for, complete: what it leaves open is decided by the method."""

    config: CompressConfig
    method: Method | AttentionMethod
    allocation: str
    compensation: str
    storage: Storage

    @classmethod
    def of(cls, config: CompressConfig) -> Self:
        """Raises UsageError for what can be known to make no sense before a model is loaded."""
        method = find_method(config.method)
        allocation = config.allocation or method.allocation
        choose(allocation, ALLOCATIONS, "allocation")
        repairs = attentions.COMPENSATIONS if isinstance(method, AttentionMethod) else COMPENSATIONS
        compensation = choose(config.compensation or method.compensation, {c: c for c in repairs}, "compensation")
        choices = cls(
            config, method, allocation, compensation, method.storage if config.storage == "auto" else config.storage
        )
        if choices.calibrated and config.calibration is None:
            what = f"compensation {compensation!r}" if compensation != "none" else f"allocation {allocation!r}"
            if method.needs is not Needs.WEIGHTS:
                what = f"method {method.name!r}"
            raise UsageError(
                f"{what} needs calibration data: pass --calibration with a folder, a file, a recipe or a Hub data set "
                "(a few hundred unlabelled samples do), or use --method svd --compensation none."
            )
        check_options(method, config.options)
        if isinstance(method, AttentionMethod):
            method.require(layers=config.layers, storage=choices.storage, allocation=allocation)
            if config.quantize is not None:
                raise UsageError(f"--quantize is for linear and low-rank layers: not with --method {method.name}.")
            if config.landmarks is not None and config.sized:
                raise UsageError(f"--landmarks replaces attentions, as --method {method.name} does: choose one.")
            if method.extra is not None:
                extras.require(method.extra, f"--method {method.name}")
        return choices

    @property
    def calibrated(self) -> bool:
        """Whether anything is learned from samples."""
        learned = self.method.needs is not Needs.WEIGHTS or self.compensation != "none" or self.allocation == "measured"
        return self.config.sized and learned

    def compressor(
        self,
        dense: PreTrainedModel,
        targets: Sequence[Target],
        dtype: torch.dtype,
        calibration: CalibrationData | None = None,
        progress: Progress | None = None,
    ) -> Compressor:
        """What turns ``dense`` into smaller models, stored as ``dtype``. Raises UsageError where it cannot."""
        allocation: Allocation = ALLOCATIONS[self.allocation]
        progress = progress or Progress()
        if isinstance(self.method, AttentionMethod):
            return AttentionCompression(
                self.config, dense, targets, self.method, allocation, self.compensation, calibration, progress
            )
        return Compression(
            self.config,
            dense,
            targets,
            self.method,
            allocation,
            self.compensation,
            self.storage,
            calibration,
            progress,
            Quantization.of(self.config, dtype) if self.config.counts_bytes else None,
        )


def check_options(method: Method | AttentionMethod, options: Mapping[str, Any]) -> None:
    """Raises UsageError for an option that the method does not have, or of another kind than its default."""
    defaults = options_of(method)
    for name, value in options.items():
        if not defaults:
            raise UsageError(f"--option {name}: method {method.name!r} has no options.")
        default = choose(name, defaults, f"--option of method {method.name!r}:")
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(value, kinds) or isinstance(value, bool) is not isinstance(default, bool):
            raise UsageError(f"--option {name}={value}: give a value such as {name}={default}.")


@dataclass(frozen=True)
class Size:
    """One requested size."""

    label: str
    """Name of the output below the given one, where there are several."""
    budget: int
    """Parameters of the whole model that may be stored, or bytes (``config.counts_bytes``)."""


@dataclass(frozen=True, eq=False)
class Shrunk:
    """The outcome for one size."""

    factors: Factors
    plan: Plan
    model: PreTrainedModel | None
    """None after a dry run."""
    job: Job


@dataclass(frozen=True, eq=False)
class Shrinking:
    """A dense model, and all that is to be done with it."""

    choices: Choices
    dense: PreTrainedModel
    base: PreTrainedModel
    """The dense model, with the tokens that the smaller ones will read."""
    targets: Sequence[Target]
    units: Sequence[Offer]
    """What there is to choose the rank of; nothing, where only the tokens change."""
    dtype: torch.dtype
    """Of the weights that will be stored."""
    bound: Bound | None
    sizes: Sequence[Size]
    landmarks: Landmarks | None

    @classmethod
    def of(cls, choices: Choices, dense: PreTrainedModel, dtype: torch.dtype) -> Self:
        """Raises UsageError and TargetError for what this model cannot become, before any work."""
        config = choices.config
        base = dense
        if config.tokens == "mixed" and config.token_budget is not None:
            base = copy.deepcopy(dense)
            mix_tokens(base, MixedTokens(config.token_budget, config.token_levels, config.token_scorer))
        landmarks = None
        if config.landmarks is not None:
            landmarks = landmarks_of(dense, config.landmarks, config.landmark_form)
        targets = find_targets(base, layers=config.layers, include=config.include, exclude=config.exclude)
        bound = Bound.of(config)
        if bound is not None:
            bound.require(dense)
        units: Sequence[Offer] = ()
        sizes = [Size("", cost.parameters(dense))]
        if config.sized:
            compression = choices.compressor(base, targets, dtype)
            units = compression.units()
            if config.rank is not None:
                choose_ranks(config, units, 0, ALLOCATIONS[choices.allocation])  # raises where nothing gets smaller
            sizes = requested_sizes(compression, dtype)
        return cls(choices, dense, base, targets, units, dtype, bound, sizes, landmarks)

    @property
    def allocated_by(self) -> str:
        """What the ranks go by, as a report says it."""
        config = self.choices.config
        if not config.sized:
            return "none"
        if config.explained_variance is not None:
            return "explained variance"
        return self.choices.allocation if config.rank is None else "fixed rank"

    def run(
        self,
        calibration: CalibrationData | None,
        held_out: SampleSet | None,
        preprocessor: Preprocessor | None,
        job: Job,
        progress: Progress | None = None,
    ) -> Iterator[Shrunk]:
        """One smaller model after the other, all from one calibration; the dense model is not changed.

        What an interrupted run has left in ``progress`` is not computed again.

        Raises:
            NumericsError: no layer can be factorised.
            DataError: nothing is held out, and the size depends on it.
            GateError: no size keeps within ``max_changed`` or ``max_kl``.
        """
        config, method = self.choices.config, self.choices.method
        if not config.sized:
            nothing = Factors({}, {}, {})
            yield Shrunk(
                nothing, {}, None if config.dry_run else self._finished(copy.deepcopy(self.base)), job.branch()
            )
            return
        compression = self.choices.compressor(self.base, self.targets, self.dtype, calibration, progress)
        search = None
        if self.bound is not None:
            quantization = Quantization.of(config, self.dtype)
            search = Search.on(held_out, preprocessor, compression, self.bound, self.dtype, job, quantization)
        first = compression.factorise_dense(job)
        refine = config.refine if method.needs is Needs.CURVATURE else 0
        if refine and config.dry_run:
            job.warn("a dry run does not refine: the ranks of the job itself may differ a little.")
            refine = 0
        for size in self.sizes:
            own = job.branch()
            if search is not None:
                found = search.smallest(first, refine, own)
                yield Shrunk(found.factors, found.plan, found.model, own)
                continue
            factors = _refined(compression, first, size, refine, own)
            plan = compression.plan(factors, size.budget)
            model = None if config.dry_run else self._finished(compression.build(factors, plan, own))
            yield Shrunk(factors, plan, model, own)

    def _finished(self, model: PreTrainedModel) -> PreTrainedModel:
        """With landmarks, where they are asked for: the last step, so that weights are fitted to the exact maps."""
        if self.landmarks is not None:
            approximate_maps(model, self.landmarks)
        return model


def _refined(compression: Compressor, first: Factors, size: Size, rounds: int, job: Job) -> Factors:
    """The factors after some rounds of refinement, from the last of them that an interrupted run has kept."""
    if not rounds:
        return first
    step = f"{size.label or 'size'}-{rounds}"
    kept = compression.resume(step)
    if kept is not None:
        return kept
    before = _refined(compression, first, size, rounds - 1, job)
    factors = compression.refine(before, compression.plan(before, size.budget), job, step)
    compression.forget(f"{size.label or 'size'}-{rounds - 1}")
    return factors


def requested_sizes(compression: Compressor, dtype: torch.dtype) -> list[Size]:
    """The requested sizes as budgets of the whole model. Raises TargetError for what no rank can reach."""
    config, total, least = compression.config, compression.whole, compression.least_budget()
    tensors = len(compression.dense.state_dict()) + 2 * len(compression.units())
    header = HEADER_BYTES * tensors
    if config.keep:
        sizes = [Size(f"keep-{keep}", share_of(keep, total)) for keep in config.keep]
    elif config.target_params:
        sizes = [Size("", parse_quantity(config.target_params, "--target-params"))]
    elif config.target_size:
        room = parse_quantity(config.target_size, "--target-size")
        sizes = [Size("", room if config.counts_bytes else (room - header) // dtype.itemsize)]
    else:
        sizes = [Size("", total - 1)]  # asked for by rank or by quality: any size but that of the dense model
    what = f"bytes as {config.quantize}" if config.counts_bytes else "parameters"
    for size in sizes:
        if least >= total:
            raise TargetError(
                f"no layer gets smaller at a rank that is a multiple of {config.rank_multiple}: "
                "give a smaller --rank-multiple."
            )
        if size.budget >= total:
            raise TargetError(
                f"{config.model} has only {total:,} {what}: ask for a smaller size than that"
                + (", or run `vitshrink quantize`." if config.counts_bytes else ".")
            )
        if size.budget < least:
            reachable = (
                f"--target-size {_up(least / 1e6)}MB"
                if config.counts_bytes
                else f"--keep {_up(least / total)}, --target-params {least} or "
                f"--target-size {_up((least * dtype.itemsize + header) / 1e6)}MB"
            )
            raise TargetError(
                f"cannot reach {max(size.budget, 0):,} {what}: what is not factorised, and rank "
                f"{config.rank_multiple} everywhere else, need {least:,} of {total:,}. The least to ask for is "
                f"{reachable}."
                + (" Choose more --layers to go lower." if config.layers != "all" or config.exclude else "")
            )
    return sizes


def _up(number: float) -> str:
    """Rounded up to three decimals, so that what a message calls reachable is."""
    return f"{math.ceil(number * 1000) / 1000:g}"
