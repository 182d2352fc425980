"""The jobs, each made of groups of options: frozen, checked where they are built, read from flags or YAML."""

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
    Preprocessing,
    columns_of,
)
from vitshrink.config.evaluation import SeparateEvaluationOptions
from vitshrink.config.fields import (
    DATA,
    RECOVERY,
    RUN,
    TECHNIQUES,
    Entry,
    Options,
    flag_of,
    option,
    required,
)
from vitshrink.config.job import JobOptions
from vitshrink.config.method import NO_INTEGERS, LayerOptions, Layers, MethodOptions, Precision
from vitshrink.config.names import quoted
from vitshrink.config.quantities import parse_duration, parse_quantity, quantized_bits, share_of
from vitshrink.config.reading import RENAMED, parse_option, read_recipe, renamed, warn_of_old_name
from vitshrink.config.run import (
    DTYPES,
    Attention,
    AttentionOptions,
    BatchOptions,
    ClockOptions,
    NetworkOptions,
    Paths,
    ReportOptions,
    RunOptions,
    RuntimeOptions,
    SaveOptions,
    StateOptions,
    TypeOptions,
)
from vitshrink.config.size import BOUNDS, FIDELITIES, SIZES, SizeOptions
from vitshrink.config.tokens import TokenOptions
from vitshrink.config.training import GAMMAS, FinetuneConfig
from vitshrink.errors import UsageError

__all__ = [
    "BOUNDS",
    "DTYPES",
    "FIDELITIES",
    "GAMMAS",
    "RENAMED",
    "SIZES",
    "Attention",
    "CompressConfig",
    "DataConfig",
    "EvalJob",
    "ExportJob",
    "FinetuneConfig",
    "FinetuneJob",
    "InspectJob",
    "Layers",
    "Precision",
    "Preprocessing",
    "flag_of",
    "parse_duration",
    "parse_option",
    "parse_quantity",
    "quantized_bits",
    "read_recipe",
    "renamed",
    "share_of",
    "warn_of_old_name",
]

RANKS_ONLY = ("allocation", "compensation", "options", "rank_multiple", "storage", "quantize", "refine", "probes")
"""What only ranks have: who gives one of these does not ask for integers."""

FACTORS_ONLY = ("options", "storage", "refine")
"""What only layers that are two factors have."""

A_CHECKPOINT = "Dense or compressed checkpoint: a directory or a Hub id."


# The fields of a job come in the order of its groups, from the last one to the first.
@dataclass(frozen=True, kw_only=True)
class CompressConfig(
    SaveOptions,
    TypeOptions,
    AttentionOptions,
    StateOptions,
    BatchOptions,
    NetworkOptions,
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


@dataclass(frozen=True, kw_only=True)
class TaughtOptions(Options):
    """Who teaches, and how."""

    teacher: str | None = option(None, "The dense model: a directory or a Hub id.", reads=True)
    finetune: FinetuneConfig = required(inlined=True)


@dataclass(frozen=True, kw_only=True)
class FinetuneJob(
    SaveOptions,
    TypeOptions,
    AttentionOptions,
    NetworkOptions,
    RunOptions,
    InputOptions,
    LabelOptions,
    ColumnOptions,
    SeparateEvaluationOptions,
    TaughtOptions,
    Paths,
    JobOptions,
):
    """Options of ``vitshrink finetune``, with those of ``FinetuneConfig``."""

    command_name: ClassVar = "finetune"
    what: ClassVar = {"model": "the compressed checkpoint", "output": "the directory to write"}
    example: ClassVar = "vitshrink finetune ./small ./recovered --teacher ./model --data ./photos"
    reworded: ClassVar = {
        "model": {"help": "Directory of a model that vitshrink compressed."},
        "eval": {"help": "Data to evaluate the result on."},
        "seed": {"help": "Seed for the order of the samples, the augmentations and the held-out split."},
        "attention": {"help": "sdpa, eager, or flash_attention_2 (on a GPU).", "panel": TECHNIQUES},
    }

    def check(self) -> None:
        if self.finetune.data is None:
            raise UsageError(
                "--data is missing: pass training samples as a folder, a file, a recipe or a Hub data set."
            )

    @property
    def data(self) -> DataConfig | None:
        if self.finetune.data is None:
            return None
        return DataConfig(self.finetune.data, self.finetune.split, **columns_of(self))


@dataclass(frozen=True, kw_only=True)
class MeasuredOptions(Options):
    """A model and the samples that it is measured on."""

    model: str = required(
        "Dense or compressed checkpoint (a directory or a Hub id), or an exported model (a directory, .onnx or .xml).",
        positional=True,
        reads=True,
    )
    data: str = required("Samples: a folder, a file, a recipe or a Hub data set.", panel=DATA)
    baseline: str | None = option(
        None, "Dense model to compare with. It may be of another kind than MODEL.", panel=DATA, reads=True
    )
    split: str | None = option(None, "Split of the data set.", panel=DATA)
    limit: int | None = option(None, "Maximum number of samples, drawn with --seed.", panel=DATA, low=1)
    labels: str | None = option(
        None, "File with the classes of a flat image folder, as lines of `image class`.", panel=DATA
    )
    texts: str | None = option(
        None, "Texts for CLIP and SigLIP, if the images have neither captions nor classes.", panel=DATA
    )
    template: tuple[str, ...] = option(
        (),
        (
            "Template that makes a text from a class name for CLIP and SigLIP, such as 'a photo of a {}.'; "
            "repeat the flag for several."
        ),
        panel=DATA,
    )


@dataclass(frozen=True, kw_only=True)
class EvalJob(
    RuntimeOptions,
    BatchOptions,
    NetworkOptions,
    RunOptions,
    TokenOptions,
    InputOptions,
    LabelOptions,
    ColumnOptions,
    MeasuredOptions,
    JobOptions,
):
    """Options of ``vitshrink eval``, without the bounds, which are ``GateOptions``."""

    latency: tuple[int, ...] = option(
        (), "Measure the latency of a batch of this size; repeat the flag for several sizes.", panel=RUN, low=1
    )

    command_name: ClassVar = "eval"
    what: ClassVar = {"model": "the checkpoint", "data": "the samples"}
    example: ClassVar = "vitshrink eval ./small --baseline ./model --data ./val"
    reworded: ClassVar = {
        "seed": {"help": "Seed for the samples, the masks and the intervals."},
        "batch_size": {"help": "Samples per batch; halved if GPU memory runs out."},
        "preprocess": {
            "help": (
                "checkpoint: as the checkpoint says; timm: resize and crop as timm does, to compare with its "
                "published accuracy."
            )
        },
    }

    def check(self) -> None:
        for template in self.template:
            if "{}" not in template:
                raise UsageError(f"--template {template!r} has no {{}} for the name of the class.")
        if self.tokens == "merge":
            raise UsageError(
                "eval does not choose where tokens merge. Run `vitshrink compress … --tokens merge "
                "--token-operations 0.67 --calibration DATA` first, then evaluate the result."
            )

    @property
    def eval_data(self) -> DataConfig:
        columns = columns_of(self)
        return DataConfig(
            self.data, self.split, **columns, labels=self.labels, texts=self.texts, templates=self.template
        )


@dataclass(frozen=True, kw_only=True)
class InspectJob(
    BatchOptions, NetworkOptions, RunOptions, LayerOptions, InputOptions, ColumnOptions, CalibrationOptions, JobOptions
):
    """Options of ``vitshrink inspect``."""

    model: str = required("Dense checkpoint: a directory or a Hub id.", positional=True, reads=True)
    samples: int = option(128, "Number of samples, if a data recipe does not set it.", panel=DATA, low=1)

    command_name: ClassVar = "inspect"
    what: ClassVar = {"model": "the dense checkpoint"}
    example: ClassVar = "vitshrink inspect ./model --calibration ./photos"
    reworded: ClassVar = {
        "calibration": {"help": "Samples that weight the spectra."},
        "seed": {"help": "Seed for the samples, if a data recipe does not set it."},
    }


@dataclass(frozen=True, kw_only=True)
class ExportJob(SaveOptions, NetworkOptions, Paths, JobOptions):
    """Options of ``vitshrink export``."""

    to: str = required(
        "onnx: model.onnx, for onnxruntime and others; openvino: model.xml and model.bin; torch: model.pt2, a "
        "torch.export program; dense: an ordinary checkpoint with the factors multiplied out (loads anywhere, but "
        "is not smaller).",
        suggested=("onnx", "openvino", "torch", "dense"),
    )
    tower: Literal["image", "text"] | None = option(
        None, "Tower of a dual encoder (CLIP, SigLIP) to export; needed for all forms except dense."
    )
    tolerance: float = option(
        1e-4,
        "Maximum difference from the outputs of PyTorch.",
        above=0,
        wanted="give a positive number such as 0.0001.",
    )

    command_name: ClassVar = "export"
    what: ClassVar = {
        "model": "the checkpoint",
        "output": "the directory to write",
        "to": "the form: onnx, openvino, torch or dense",
    }
    example: ClassVar = "vitshrink export ./small ./onnx --to onnx"
    reworded: ClassVar = {"model": {"help": A_CHECKPOINT}}
