"""By which method which layers are compressed, and how they are stored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vitshrink.config.fields import METHOD, Options, entries, option
from vitshrink.config.quantities import quantized_bits
from vitshrink.errors import UsageError

Layers = Literal["attention", "mlp", "all"]
Precision = Literal["auto", "no", "bf16", "fp16"]
Storage = Literal["auto", "gauge", "factors"]
Forms = Literal["auto", "bits", "rank", "narrow", "rank+narrow"]

ALLOCATIONS = ("uniform-rank", "uniform-ratio", "energy", "loss", "measured")
NO_INTEGERS = "none"
"""Of ``quantize``: what is to be fast stays in floating point."""

COMPENSATIONS = ("none", "bias", "residual", "rescale", "stream")


@dataclass(frozen=True, kw_only=True)
class LayerOptions(Options):
    """Which layers of a model are meant."""

    layers: Layers = option("all", "Which layers of a block.", panel=METHOD)
    include: tuple[str, ...] = option((), "Only layers whose name matches this.", panel=METHOD)
    exclude: tuple[str, ...] = option((), "No layer whose name matches this.", panel=METHOD)


@dataclass(frozen=True, kw_only=True)
class MethodOptions(Options):
    """The method, what goes with it, and the form in which layers are stored."""

    method: str = option("curvature", "See `vitshrink methods`.", panel=METHOD)
    allocation: str | None = option(
        None, "How ranks are shared out; the method's own if not given.", panel=METHOD, suggested=ALLOCATIONS
    )
    compensation: str | None = option(
        None, "Repair after truncation; the method's own if not given.", panel=METHOD, suggested=COMPENSATIONS
    )
    options: Mapping[str, Any] = entries("An option of the method, e.g. alpha=0.3.", panel=METHOD, flags=("--option",))
    rank_multiple: int = option(1, "Ranks are multiples of this.", panel=METHOD, low=1)
    storage: Storage = option(
        "auto", "gauge: r(m+n-r) numbers a layer; factors: r(m+n); auto: what goes with the method.", panel=METHOD
    )
    quantize: str | None = option(
        None,
        "Store factors and dense layers as int8 or int4 as well. With --target-latency: int8, as `vitshrink quantize "
        "--activations static` makes it (the default where --runtime is faster with it), or none.",
        panel=METHOD,
        suggested=("int8", "int4", "none"),
    )
    activations: str | None = option(
        None,
        "With --quantize: dynamic (int8 arithmetic, the default for int8) or none.",
        panel=METHOD,
        suggested=("dynamic", "none"),
    )
    forms: Forms = option(
        "auto",
        "What layers may become. bits: integers of any fineness; rank: two factors; narrow: dense layers of fewer "
        "neurons, smaller heads and fewer; rank+narrow: whichever of both serves an MLP or an attention best; auto: "
        "bits for a size in bytes or a bound, unless options of ranks are given, else rank.",
        panel=METHOD,
    )
    refine: int = option(
        2,
        "Times the curvature is estimated again on the compressed model, for every size.",
        panel=METHOD,
        low=0,
    )
    fast: bool = option(
        False,
        "Ranks from one pass over the samples, with nothing measured at the output: as --refine 0 --allocation loss "
        "--compensation bias.",
        panel=METHOD,
    )
    precision: Precision = option(
        "auto",
        "Of the passes that gradients are taken through: bf16, no (float32), or auto (bf16 where it is fast).",
        panel=METHOD,
        choices=("auto", "no", "bf16"),
        why="gradients of samples need the range of float32, which fp16 has not.",
    )
    probes: int = option(1, "Backward passes a batch for the curvature.", panel=METHOD, low=1)

    def check(self) -> None:
        if self.fast and (slow := self.given(("allocation", "compensation", "refine"))):
            raise UsageError(f"--fast decides what {slow[0]} would: leave one of them out.")
        if self.quantize in (None, NO_INTEGERS) and self.activations is not None:
            raise UsageError("--activations says how a quantized model computes: pass --quantize int8 as well.")
        if self.quantize not in (None, NO_INTEGERS):
            quantized_bits(self.quantize, self.activations)
