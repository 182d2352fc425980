"""How small a model is to get: exactly one of these says it."""

from dataclasses import dataclass

from vitshrink.config.fields import SIZE, Options, entries_of, option
from vitshrink.config.quantities import parse_latency, parse_quantity
from vitshrink.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class CountOptions(Options):
    """Sizes in parameters; of integers, ``keep`` is a fraction of the bytes in float16."""

    keep: tuple[float, ...] = option(
        (),
        "Fraction of the model's parameters to keep; repeat the flag for several outputs.",
        panel=SIZE,
        above=0,
        below=1,
        wanted="give the fraction of the model's parameters to keep, above 0 and below 1.",
    )
    target_params: str | None = option(None, "Number of parameters of the result, e.g. 22M.", panel=SIZE)

    def check(self) -> None:
        if self.target_params is not None:
            parse_quantity(self.target_params, "--target-params")
        if len(set(self.keep)) != len(self.keep):
            raise UsageError("--keep: the same fraction is given twice.")


@dataclass(frozen=True, kw_only=True)
class BytesOptions(Options):
    """Sizes in bytes: of the file, or of a weight."""

    target_size: str | None = option(None, "Size of the weight files, e.g. 90MB.", panel=SIZE)
    bits: float | None = option(
        None,
        "Average number of bits per quantized weight, e.g. 3.5.",
        panel=SIZE,
        above=0,
        below=16,
        wanted="give the average number of bits per weight, above 0 and below 16.",
    )

    def check(self) -> None:
        if self.target_size is not None:
            parse_quantity(self.target_size, "--target-size")


@dataclass(frozen=True, kw_only=True)
class TimeOptions(Options):
    """Sizes in time."""

    target_latency: str | None = option(
        None,
        "Latency of a batch in --runtime: a fraction of the dense model's latency, e.g. 0.6, or a time, e.g. 5ms.",
        panel=SIZE,
    )

    def check(self) -> None:
        if self.target_latency is not None:
            parse_latency(self.target_latency, "--target-latency")


@dataclass(frozen=True, kw_only=True)
class RankSizeOptions(Options):
    """Sizes of layers as products of two factors."""

    rank: int | None = option(None, "One rank for all layers.", panel=SIZE, low=1)
    explained_variance: float | None = option(
        None,
        "Give every layer the smallest rank that keeps this fraction of its energy, e.g. 0.9.",
        panel=SIZE,
        above=0,
        below=1,
        wanted="give the fraction of energy that every layer keeps, above 0 and below 1.",
    )


@dataclass(frozen=True, kw_only=True)
class FidelityOptions(Options):
    """How far the outputs may be from the dense model's: the smallest model that keeps it on held-out samples."""

    max_changed: float | None = option(
        None,
        "Find the smallest model that changes at most this percentage of the predictions on held-out calibration "
        "samples (no labels needed).",
        panel=SIZE,
        low=0,
        high=100,
        wanted="give the percentage of predictions that may change, such as --max-changed 1.",
    )
    max_kl: float | None = option(
        None,
        "Find the smallest model with at most this KL divergence from the dense model, in nats, on held-out samples.",
        panel=SIZE,
        low=0,
        wanted="give the largest divergence in nats, such as --max-kl 1.",
    )
    max_error: float | None = option(
        None,
        "Find the smallest model with at most this relative squared error of scores or features, e.g. 0.01.",
        panel=SIZE,
        low=0,
        high=1,
        wanted=(
            "give the squared error as a fraction of the spread of the dense model's outputs, such as --max-error 0.01."
        ),
    )


@dataclass(frozen=True, kw_only=True)
class BoundOptions(FidelityOptions):
    """What may be lost: the smallest model that keeps a bound on held-out calibration samples."""

    max_accuracy_drop: float | None = option(
        None,
        "Find the smallest model that loses at most this many points of accuracy on held-out samples; they need "
        "labels.",
        panel=SIZE,
        low=0,
        high=100,
        wanted="give the points of accuracy that may be lost, such as --max-accuracy-drop 1.",
    )


FIDELITIES, BOUNDS = (tuple(entry.name for entry in entries_of(group)) for group in (FidelityOptions, BoundOptions))
"""The sizes that say how small by what may be lost: those that need no labels, and all."""


@dataclass(frozen=True, kw_only=True)
class SizeOptions(BoundOptions, RankSizeOptions, TimeOptions, BytesOptions, CountOptions):
    """Exactly one size or bound.

    Sizes: ``keep`` (fraction of the parameters, or of the bytes in float16 for integers; several give several outputs),
    ``target_params``, ``target_size`` (bytes of the file), ``bits`` (average per weight), ``target_latency`` (of a
    batch), ``rank`` and ``explained_variance`` (fraction of the energy that every layer keeps).

    Bounds, for the smallest model that keeps them on held-out calibration samples: ``max_changed`` (percentage of the
    predictions), ``max_kl`` (nats), ``max_error`` (squared error of scores or features as a fraction of their spread),
    ``max_accuracy_drop`` (points of accuracy; needs labels).
    """

    @property
    def sizes(self) -> list[str]:
        """The flags of the sizes that are given."""
        return self.given(SIZES)

    @property
    def sized(self) -> bool:
        """Whether the weights are to get smaller; fewer tokens or landmarks alone leave them as they are."""
        return bool(self.sizes)


SIZES = tuple(entry.name for entry in entries_of(SizeOptions))
