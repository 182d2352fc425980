"""The job of ``vitshrink compress``, which every lever has its options in."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from vitshrink.config.data import (
    CalibrationOptions,
    ColumnOptions,
    DataConfig,
    HoldoutOptions,
    InputOptions,
    LabelOptions,
    columns_of,
)
from vitshrink.config.evaluation import SeparateEvaluationOptions
from vitshrink.config.fields import RECOVERY, Entry, flag_of, option
from vitshrink.config.job import JobOptions
from vitshrink.config.method import NO_INTEGERS, LayerOptions, MethodOptions
from vitshrink.config.names import quoted
from vitshrink.config.reading import RENAMED, renamed
from vitshrink.config.run import (
    AttentionOptions,
    CalibrationBatchOptions,
    ClockOptions,
    NetworkOptions,
    OffloadOptions,
    Paths,
    ReportOptions,
    RunOptions,
    SaveOptions,
    StateOptions,
    TypeOptions,
)
from vitshrink.config.size import BOUNDS, SIZES, SizeOptions
from vitshrink.config.tokens import TokenOptions
from vitshrink.config.training import FinetuneConfig
from vitshrink.errors import UsageError

RANKS_ONLY = (
    "allocation",
    "compensation",
    "options",
    "rank_multiple",
    "storage",
    "quantize",
    "refine",
    "thorough",
    "probes",
)
"""What only ranks have: who gives one of these does not ask for integers."""

FACTORS_ONLY = ("options", "storage", "refine", "thorough")
"""What only layers that are two factors have."""


# The fields of a job come in the order of its groups, from the last one to the first.
@dataclass(frozen=True, kw_only=True)
class CompressConfig(
    SaveOptions,
    TypeOptions,
    AttentionOptions,
    StateOptions,
    CalibrationBatchOptions,
    NetworkOptions,
    OffloadOptions,
    RunOptions,
    ClockOptions,
    ReportOptions,
    InputOptions,
    LabelOptions,
    ColumnOptions,
    SeparateEvaluationOptions,
    HoldoutOptions,
    CalibrationOptions,
    TokenOptions,
    LayerOptions,
    MethodOptions,
    SizeOptions,
    Paths,
    JobOptions,
):
    """Options of ``vitshrink compress``. The fields are the flags, with ``_`` instead of ``-``."""

    finetune: FinetuneConfig | None = option(
        None,
        "Train after compression: distill (no labels) or supervised; see `vitshrink finetune --help`.",
        panel=RECOVERY,
        in_memory=False,
    )

    command_name: ClassVar = "compress"
    what: ClassVar = {"model": "the checkpoint to compress", "output": "the directory to write"}
    example: ClassVar = "vitshrink compress ./model ./small --keep 0.6"
    old_names: ClassVar = RENAMED
    reworded: ClassVar = {
        "image_column": {"help": "Image column of the calibration data."},
        "text_column": {"help": "Text column of the calibration data."},
        "text_pair_column": {"help": "Second text column of the calibration data."},
        "label_column": {"help": "Label column of the calibration data."},
    }

    def check(self) -> None:
        sizes, others = self.sizes, self.approximations
        if others and set(map(flag_of, BOUNDS)) & set(sizes):
            raise UsageError(
                f"{sizes[0]} searches for the size of the weights, which {others[0]} does not change: pass a size "
                "instead."
            )
        if sizes or not others:
            one_size(sizes, SIZES, "--keep 0.6", survey_of(self.model, self.calibration))
        if self.tokens == "merge" and self.calibration is None:
            raise UsageError(
                "--tokens merge measures which blocks lose least from merging: pass --calibration with a few dozen "
                "samples."
            )
        if self.tokens == "merge" and self.attention == "flash_attention_2":
            raise UsageError(
                "--tokens merge uses token sizes in attention, which flash_attention_2 does not support: use "
                "--attention sdpa."
            )
        for name in BOUNDS:
            if getattr(self, name) is not None and (self.calibration is None or self.holdout == 0):
                raise UsageError(
                    f"{flag_of(name)} is checked on held-out calibration samples: pass --calibration and a "
                    "--holdout above 0."
                )
        if self.offload:
            self._check_offload()
        self._check_time()
        if self.stores == "bits":
            self._check_bits()
        elif self.bits is not None:
            raise UsageError(f"--bits needs integers: remove --forms {self.stores} and the options that belong to it.")
        if self.stores in ("narrow", "rank+narrow"):
            self._check_narrow()
        if self.rank is not None and self.rank % self.rank_multiple:
            above = self.rank + -self.rank % self.rank_multiple
            below = f"--rank {above - self.rank_multiple} or " if above > self.rank_multiple else ""
            raise UsageError(
                f"--rank {self.rank} is not a multiple of --rank-multiple {self.rank_multiple}: use {below}--rank "
                f"{above}, or remove --rank-multiple."
            )

    def _check_offload(self) -> None:
        whole = {
            "--finetune": self.finetune is not None,
            "--target-latency": self.target_latency is not None,
            "--runtime": self.runtime is not None,
            "--tokens": self.tokens != "all",
            "--landmarks": self.landmarks is not None,
            "--probes": self.probes > 1,
            "--activations static": self.activations == "static",
            "--attention flash_attention_2": self.attention == "flash_attention_2",
        }
        for flag in (flag for flag, given in whole.items() if given):
            raise UsageError(f"{flag} needs the whole model on the GPU: remove it, or remove --offload.")

    def _check_time(self) -> None:
        if self.target_latency is None:
            if self.latency_batch_size is not None:
                raise UsageError(
                    "--latency-batch-size has no effect without --target-latency. To time other batch sizes, "
                    "use --latency."
                )
            if self.quantize == NO_INTEGERS:
                raise UsageError("--quantize none has no effect without --target-latency: remove it.")
            return
        if others := self.approximations:
            raise UsageError(f"--target-latency already decides how much is computed: remove {others[0]}.")
        if self.forms == "bits":
            raise UsageError(
                "--forms bits: entropy-coded integers are not faster. Remove it; --target-latency makes faster "
                "integers."
            )
        self._check_integers()

    def _check_integers(self) -> None:
        """Of a budget of time."""
        if self.quantize in (None, NO_INTEGERS):
            return
        if self.quantize != "int8" or self.activations is not None:
            flag = f"--quantize {self.quantize}" if self.quantize != "int8" else f"--activations {self.activations}"
            raise UsageError(f"{flag}: --target-latency quantizes to static int8: remove it.")
        if self.calibration is None:
            raise UsageError(
                "--quantize int8 with --target-latency needs the inputs of every layer: pass --calibration with "
                "a few hundred unlabeled samples."
            )
        if self.finetune is not None:
            raise UsageError(
                "--finetune cannot train integers: pass --quantize none, and quantize the result with "
                "`vitshrink quantize --activations static`."
            )

    @property
    def integers(self) -> bool | None:
        """Whether a budget of time is spent on integers; None where the runtime decides."""
        if self.target_latency is None or self.quantize == NO_INTEGERS:
            return False
        if self.quantize is not None:
            return True
        return None if self.calibration is not None and self.finetune is None else False

    @property
    def rounded_to(self) -> str | None:
        """The integers that weights are rounded to in the end, to the nearest."""
        return self.quantize if self.target_latency is None else None

    @property
    def merges(self) -> bool:
        """Whether tokens may be merged: where they can be, a budget of time is spent on them, too."""
        timed = self.target_latency is not None and self.forms == "auto" and self.calibration is not None
        return self.tokens == "merge" or timed

    def _check_bits(self) -> None:
        if self.calibration is None:
            raise UsageError(
                "integers need a few hundred samples: pass --calibration. Without samples, use `vitshrink "
                "quantize`, which rounds to nearest."
            )
        ranks = self.given(RANKS_ONLY)
        if ranks or self.method != "curvature":
            raise UsageError(f"--forms bits has no ranks: remove {(ranks or ['--method'])[0]}, or pass --forms rank.")
        if set(self.sizes) & {"--rank", "--explained-variance", "--target-params"}:
            raise UsageError(
                f"{self.sizes[0]} counts ranks or parameters, and integers do not change these. Use --target-size, "
                "--bits, --keep (of the bytes in float16) or a bound, such as --target-size 4MB."
            )

    def _check_narrow(self) -> None:
        """Of narrower layers, alone or beside ranks."""
        forms = f"--forms {self.stores}"
        if self.method != "curvature":
            raise UsageError(f"{forms} works with --method curvature only: remove --method {self.method}.")
        if unfit := sorted(set(self.sizes) & {"--rank", "--explained-variance"}):
            raise UsageError(
                f"{unfit[0]} is for low-rank layers only: use --keep, --target-params or another size with {forms}."
            )
        if self.stores == "narrow" and (unfit := self.given(FACTORS_ONLY)):
            raise UsageError(f"{forms} has no factors: remove {unfit[0]}, or pass --forms rank.")
        if self.landmarks is not None and self.layers != "mlp":
            raise UsageError(f"--landmarks and {forms} both replace attentions: choose one, or pass --layers mlp.")
        if self.allocation not in (None, "measured", "loss"):
            raise UsageError(f"--allocation {self.allocation} cannot be used with {forms}: use measured or loss.")

    @property
    def size(self) -> str:
        """What is asked for, as a table says it: ``keep 0.5``, ``landmarks 49``."""
        asked = {name: getattr(self, name) for name in (*SIZES, "token_budget", "token_operations", "landmarks")}
        values = {name: value if isinstance(value, tuple) else (value,) for name, value in asked.items()}
        return ", ".join(
            f"{name} {entry}" for name, entries in values.items() for entry in entries if entry is not None
        )

    @property
    def stores(self) -> Literal["bits", "rank", "narrow", "rank+narrow"]:
        """What ``forms`` comes to: bits where bytes or a loss are asked for, and nothing that only ranks have."""
        if self.forms != "auto":
            return self.forms
        in_bytes = any(getattr(self, name) is not None for name in ("target_size", "bits", *BOUNDS))
        classical = self.method != "curvature" or self.given(RANKS_ONLY)
        return "bits" if in_bytes and self.calibration is not None and not classical else "rank"

    @property
    def stored_dtype(self) -> str | None:
        """The type of what is stored as floating point; None is that of the source."""
        return self.dtype or ("float16" if self.stores == "bits" else None)

    @property
    def counts_bytes(self) -> bool:
        """Whether a plan goes by the bytes of the file, because weights are integers of several widths."""
        asked = (getattr(self, name) for name in ("target_size", *BOUNDS))
        return self.stores == "bits" or (self.rounded_to is not None and any(size is not None for size in asked))

    @property
    def finetune_data(self) -> DataConfig | None:
        if self.finetune is None or self.finetune.data is None:
            return None
        return DataConfig(self.finetune.data, self.finetune.split, **columns_of(self))

    def data_sets(self) -> dict[str, tuple[DataConfig, int | None]]:
        """Every set of samples that the job reads, by the property that says how, and how many of them at most."""
        sets = {
            "calibration_data": (self.calibration_data, self.samples + self.holdout),
            "eval_data": (self.eval_data, self.eval_limit),
            "finetune_data": (self.finetune_data, None),
        }
        return {name: (data, most) for name, (data, most) in sets.items() if data is not None}

    @classmethod
    def from_mapping(cls, entries: Mapping[str, Any], where: str = "the recipe") -> Self:
        """Build from flags or YAML keys, also old ones. Raises UsageError that names the entry, and the nearest one."""
        return super().from_mapping(renamed(entries, where), where)

    def always_said(self, entry: Entry) -> bool:
        """A data recipe has defaults of its own."""
        return entry.name in ("samples", "seed") and bool(re.search(r"\.ya?ml(:|$)", self.calibration or ""))


def one_size(given: Sequence[str], known: Sequence[str], example: str, survey: str) -> None:
    """Raises UsageError unless one flag is given, of those of the options that are known."""
    if len(given) != 1:
        what = f"{' and '.join(given)} were given" if given else "none was"
        hint = "" if given else f" To see what each size would lose, run `{survey}`."
        flags = ", ".join(map(flag_of, known))
        raise UsageError(f"choose a size with exactly one of {flags}, such as {example}; {what}.{hint}")


def survey_of(model: str, calibration: str | None) -> str:
    """The command line that shows what sizes there are."""
    return f"vitshrink frontier {quoted(model)} --calibration {quoted(calibration or 'DATA')}"
