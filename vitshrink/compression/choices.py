"""What a job asks of compression, complete: what its config leaves open is decided by the method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from vitshrink.compression.allocation import ALLOCATIONS
from vitshrink.compression.attention_estimation import AttentionEstimator
from vitshrink.compression.candidates import Currency
from vitshrink.compression.compressor import Compressor, Estimator, Refiner, Repairs
from vitshrink.compression.effort import effort_of
from vitshrink.compression.estimation import LayerEstimator
from vitshrink.compression.forms import Maker, Material, Priced
from vitshrink.compression.forms.attention_part import AttentionMaker
from vitshrink.compression.forms.coded import CodedMaker
from vitshrink.compression.forms.low_rank import LowRankMaker
from vitshrink.compression.forms.narrow import NarrowMaker
from vitshrink.compression.narrow_estimation import READ, NarrowEstimator
from vitshrink.compression.pace import RUNTIME, rounds_in
from vitshrink.compression.quantization import Quantization
from vitshrink.compression.repairs import COMPENSATIONS
from vitshrink.compression.repairs.bias import RESCALING
from vitshrink.compression.repairs.layers import LayerRepairs, NoRepairs
from vitshrink.compression.sensitivity_estimation import SensitivityEstimator
from vitshrink.config.choosing import choose
from vitshrink.config.options import CompressConfig
from vitshrink.data.opening import CalibrationData
from vitshrink.errors import UsageError
from vitshrink.methods import AttentionMethod, LayerMethod, Method, find_method
from vitshrink.methods.ranks import Storage
from vitshrink.models.runtimes import find_runtime
from vitshrink.models.targets import Target, find_outside
from vitshrink.runtime import extras
from vitshrink.runtime.state import Progress
from vitshrink.statistics.needs import Needs

ATTENTION_COMPENSATIONS = ("none",)
"""Repairs of a model whose attentions were replaced: what a bias can absorb is part of the methods themselves."""


@dataclass(frozen=True)
class Choices:
    """What a config asks for, complete: what it leaves open is decided by the method."""

    config: CompressConfig
    method: Method
    allocation: str
    compensation: str
    storage: Storage

    @classmethod
    def of(cls, config: CompressConfig) -> Self:
        """Raises UsageError for what can be known to make no sense before a model is loaded."""
        method, effort = find_method(config.method), effort_of(config)
        quick = effort.allocation if method.allocation == "measured" else None
        unmeasured = "loss" if config.stores == "bits" else quick
        allocation = config.allocation or unmeasured or method.allocation
        choose(allocation, ALLOCATIONS, "allocation")
        repairs = ATTENTION_COMPENSATIONS if isinstance(method, AttentionMethod) else COMPENSATIONS
        short = effort.compensation if method.compensation in RESCALING else None
        biased = "bias" if config.stores in ("bits", "narrow") else short
        compensation = choose(
            config.compensation or biased or method.compensation,
            {c: c for c in repairs},
            "compensation",
        )
        choices = cls(
            config, method, allocation, compensation, method.storage if config.storage == "auto" else config.storage
        )
        if choices.calibrated and config.calibration is None:
            what = f"compensation {compensation!r}" if compensation != "none" else f"allocation {allocation!r}"
            if method.needs is not Needs.WEIGHTS:
                what = f"method {method.name!r}"
            raise UsageError(
                f"{what} needs calibration data: pass --calibration with a folder, a file, a recipe or a Hub "
                "data set (a few hundred unlabeled samples are enough), or use --method svd --compensation none."
            )
        check_options(method, config.options)
        if config.integers:
            rounds_in(config, find_runtime(config.runtime or RUNTIME))
        if isinstance(method, AttentionMethod):
            if config.target_latency is not None:
                raise UsageError(
                    "--target-latency works on linear layers and tokens: it cannot be used with --method "
                    f"{method.name}."
                )
            method.require(layers=config.layers, storage=choices.storage, allocation=allocation)
            if config.quantize is not None:
                raise UsageError(
                    f"--quantize works on linear and low-rank layers: it cannot be used with --method {method.name}."
                )
            if config.landmarks is not None and config.sized:
                raise UsageError(f"--landmarks and --method {method.name} both replace attentions: choose one.")
            if method.extra is not None:
                extras.require(method.extra, f"--method {method.name}")
        return choices

    @property
    def calibrated(self) -> bool:
        """Whether anything is learned from samples."""
        learned = self.method.needs is not Needs.WEIGHTS or self.compensation != "none" or self.allocation == "measured"
        return (self.config.sized and learned) or self.config.merges or self.config.integers is not False

    @property
    def rounds(self) -> int:
        """How often the job learns again from the compressed model."""
        if self.config.stores in ("bits", "narrow") or self.method.needs is not Needs.CURVATURE:
            return 0
        rounds = effort_of(self.config).rounds
        return self.config.refine if rounds is None else rounds

    def compressor(
        self,
        dense: PreTrainedModel,
        targets: Sequence[Target],
        dtype: torch.dtype,
        calibration: CalibrationData | None = None,
        progress: Progress | None = None,
        prices: Priced | None = None,
    ) -> Compressor:
        """What turns ``dense`` into smaller models, stored as ``dtype``; with ``prices``, for budgets of time.

        Raises UsageError where it cannot.
        """
        config, progress = self.config, progress or Progress()
        material = self._material(dense, targets, dtype, prices)
        makers: list[Maker]
        estimator: Estimator
        repairs: Repairs
        refiner: Refiner | None = None
        missing = None
        if config.stores == "bits":
            sites = [target.name for target in targets]
            if config.layers == "all" and not config.include:
                sites += find_outside(dense, exclude=config.exclude)
            makers = [CodedMaker(material, sites)]
            estimator = SensitivityEstimator(config, dense, sites, calibration, progress)
            repairs = NoRepairs()
        elif isinstance(self.method, AttentionMethod):
            makers = [AttentionMaker(material, self.method, config.rank)]
            estimator = AttentionEstimator(config, dense, targets, self.method, calibration, progress)
            repairs = NoRepairs()
        else:
            assert isinstance(self.method, LayerMethod)
            layers = LayerEstimator(
                config, dense, targets, self.method, self.compensation, material.measures, calibration, progress
            )
            makers, estimator, refiner = [LowRankMaker(material)], layers, layers
            if config.stores in ("narrow", "rank+narrow"):
                narrow = NarrowMaker(material)
                layers = replace(layers, full=_read_whole(narrow))
                ranks = config.stores == "rank+narrow"
                makers = [*makers, narrow] if ranks else [narrow]
                estimator = both = NarrowEstimator(layers, narrow, ranks)
                refiner = both if ranks else None
                missing = layers.missing if ranks and calibration is not None else None
            repairs = LayerRepairs(material, layers)
        return Compressor(config, material, makers, estimator, repairs, ALLOCATIONS[self.allocation], refiner, missing)

    def _material(
        self, dense: PreTrainedModel, targets: Sequence[Target], dtype: torch.dtype, prices: Priced | None
    ) -> Material:
        config = self.config
        currency: Currency = "bytes" if config.counts_bytes else "parameters"
        fixed = config.rank is not None or config.explained_variance is not None
        return Material(
            dense,
            targets,
            options=config.options,
            compensation=self.compensation,
            storage=self.storage,
            multiple=config.rank_multiple,
            dtype=dtype,
            currency=currency if prices is None else "nanoseconds",
            quantization=Quantization.of(config, dtype) if config.counts_bytes else None,
            measures=self.allocation == "measured" and not fixed,
            prices=prices,
        )


def _read_whole(maker: NarrowMaker) -> frozenset[str]:
    """The layers of which whole statistics are needed. Raises UsageError where nothing can be made narrower."""
    sites = maker.sites.values()
    found = frozenset(site.targets[role].name for site in sites for role in READ if role in site.targets)
    if not found:
        raise UsageError(
            "--forms narrow needs whole MLPs or attentions, and --layers, --include and --exclude leave none of "
            "them complete in any block."
        )
    return found


def check_options(method: Method, options: Mapping[str, Any]) -> None:
    """Raises UsageError for an option that the method does not have, or of another kind than its default."""
    defaults = method.options
    for name, value in options.items():
        if not defaults:
            raise UsageError(f"--option {name}: method {method.name!r} has no options.")
        default = choose(name, defaults, f"--option of method {method.name!r}:")
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(value, kinds) or isinstance(value, bool) is not isinstance(default, bool):
            raise UsageError(f"--option {name}={value}: give a value such as {name}={default}.")
