"""The jobs, each made of groups of options: frozen, checked where they are built, read from flags or YAML."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vitshrink.config.compress import CompressConfig
from vitshrink.config.data import (
    CalibrationOptions,
    ColumnOptions,
    DataConfig,
    InputOptions,
    LabelOptions,
    Preprocessing,
    columns_of,
)
from vitshrink.config.evaluation import SeparateEvaluationOptions
from vitshrink.config.fields import (
    DATA,
    RUN,
    TECHNIQUES,
    Options,
    flag_of,
    option,
    required,
)
from vitshrink.config.job import JobOptions
from vitshrink.config.method import LayerOptions, Layers, Precision
from vitshrink.config.quantities import parse_duration, parse_quantity, quantized_bits, share_of
from vitshrink.config.reading import RENAMED, parse_option, read_recipe, renamed, warn_of_old_name
from vitshrink.config.run import (
    DTYPES,
    Attention,
    AttentionOptions,
    BatchOptions,
    CalibrationBatchOptions,
    NetworkOptions,
    OffloadOptions,
    Paths,
    RunOptions,
    RuntimeOptions,
    SaveOptions,
    TypeOptions,
)
from vitshrink.config.size import BOUNDS, FIDELITIES, SIZES
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

A_CHECKPOINT = "Dense or compressed checkpoint: a directory or a Hub id."


# The fields of a job come in the order of its groups, from the last one to the first.
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
    data: str = required("Samples: a folder, a file, a URL, a recipe or a Hub data set.", panel=DATA)
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
    OffloadOptions,
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
        if self.offload and (self.latency or self.runtime):
            raise UsageError("--offload takes the time of copies: remove it, --latency and --runtime to measure that.")
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
    CalibrationBatchOptions,
    NetworkOptions,
    RunOptions,
    LayerOptions,
    InputOptions,
    ColumnOptions,
    CalibrationOptions,
    JobOptions,
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
    batch_size: int | None = option(
        None, "Samples in every batch, for a program that runs faster and takes no other; any if not given.", low=1
    )

    command_name: ClassVar = "export"
    what: ClassVar = {
        "model": "the checkpoint",
        "output": "the directory to write",
        "to": "the form: onnx, openvino, torch or dense",
    }
    example: ClassVar = "vitshrink export ./small ./onnx --to onnx"
    reworded: ClassVar = {"model": {"help": A_CHECKPOINT}}
