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

    layers: Layers = option("all", "Which layers of a block to compress.", panel=METHOD)
    include: tuple[str, ...] = option(
        (), "Compress only layers whose name matches this regular expression.", panel=METHOD
    )
    exclude: tuple[str, ...] = option((), "Skip layers whose name matches this regular expression.", panel=METHOD)


@dataclass(frozen=True, kw_only=True)
class MethodOptions(Options):
    """The method, what goes with it, and the form in which layers are stored."""

    method: str = option("curvature", "Compression method; see `vitshrink methods`.", panel=METHOD)
    allocation: str | None = option(
        None,
        "How the ranks are distributed over the layers; the default depends on the method.",
        panel=METHOD,
        suggested=ALLOCATIONS,
    )
    compensation: str | None = option(
        None, "Repair after truncation; the default depends on the method.", panel=METHOD, suggested=COMPENSATIONS
    )
    options: Mapping[str, Any] = entries("Option of the method, e.g. alpha=0.3.", panel=METHOD, flags=("--option",))
    rank_multiple: int = option(1, "Every rank is a multiple of this number.", panel=METHOD, low=1)
    storage: Storage = option(
        "auto",
        ("How factors are stored. gauge: r(m+n-r) numbers per layer; factors: r(m+n); auto: depends on the method."),
        panel=METHOD,
    )
    quantize: str | None = option(
        None,
        "Also store factors and dense layers as int8 or int4. With --target-latency: static int8 (the default "
        "if --runtime is faster with it), or none.",
        panel=METHOD,
        suggested=("int8", "int4", "none"),
    )
    activations: str | None = option(
        None,
        "With --quantize: dynamic computes in int8 (default for int8), none computes in floating point.",
        panel=METHOD,
        suggested=("dynamic", "none"),
    )
    forms: Forms = option(
        "auto",
        "How layers may be stored. bits: integers of any bit width; rank: two low-rank factors; narrow: dense "
        "layers with fewer neurons and fewer or smaller heads; rank+narrow: the better of both for each MLP and "
        "attention; auto: bits if you give a size in bytes or a bound and no rank options, otherwise rank.",
        panel=METHOD,
    )
    refine: int = option(
        2,
        "How often the curvature is estimated again on the compressed model, for each size; not for light cuts.",
        panel=METHOD,
        low=0,
    )
    fast: bool = option(
        False,
        "Quick ranks from one pass over the samples; short for --refine 0 --allocation loss --compensation bias.",
        panel=METHOD,
    )
    thorough: bool = option(
        False,
        "More of everything that makes ranks: four refinements, effects on 256 samples, three steps of repairs.",
        panel=METHOD,
    )
    precision: Precision = option(
        "auto",
        "Precision of the forward and backward passes: bf16, no (float32), or auto (bf16 if it is fast).",
        panel=METHOD,
        choices=("auto", "no", "bf16"),
        why="the gradients of samples need the range of float32, and fp16 does not have it.",
    )
    probes: int = option(1, "Backward passes per batch to estimate the curvature.", panel=METHOD, low=1)

    def check(self) -> None:
        if self.fast and (slow := self.given(("allocation", "compensation", "refine"))):
            raise UsageError(f"--fast already sets {slow[0]}: remove one of them.")
        if self.fast and self.thorough:
            raise UsageError("--fast and --thorough are opposites: remove one of them.")
        if self.thorough and self.given(("refine",)):
            raise UsageError("--thorough already sets --refine: remove one of them.")
        if self.quantize in (None, NO_INTEGERS) and self.activations is not None:
            raise UsageError("--activations sets how a quantized model computes: pass --quantize int8 as well.")
        if self.quantize not in (None, NO_INTEGERS):
            quantized_bits(self.quantize, self.activations)
