"""What is read and written, and how a job runs."""

from dataclasses import dataclass
from typing import Literal

from vitshrink.config.fields import RUN, Options, option, required
from vitshrink.errors import UsageError

DTYPES = ("float32", "float16", "bfloat16")
Attention = Literal["sdpa", "eager", "flash_attention_2"]


@dataclass(frozen=True)
class Paths(Options):
    """A checkpoint and the directory to write."""

    model: str = required("Checkpoint directory or Hub id.", positional=True, reads=True, in_memory=False)
    output: str = required(
        "Directory to write; it must not exist.", positional=True, changes="nothing", in_memory=False
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Where and how a job runs."""

    seed: int = option(0, "Seed for the choice of samples.", panel=RUN)
    device: str = option("auto", "Device: auto, cpu, cuda, cuda:1 …", panel=RUN, in_memory=False)


@dataclass(frozen=True, kw_only=True)
class OffloadOptions(Options):
    """What is to be done where a GPU is too small for the model."""

    offload: bool = option(
        False, "Keep the model in main memory, and one block at a time on the GPU.", panel=RUN, in_memory=False
    )


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(Options):
    """Whether the network may be used."""

    offline: bool = option(False, "Never use the network.", panel=RUN, changes="nothing")


@dataclass(frozen=True, kw_only=True)
class BatchOptions(Options):
    """How many samples are read at once."""

    batch_size: int = option(32, "Samples per batch.", panel=RUN, low=1)


@dataclass(frozen=True, kw_only=True)
class CalibrationBatchOptions(Options):
    """How many samples are read at once, where some of them go backward through the model, too."""

    batch_size: int | None = option(
        None, "Samples per batch; if not given 32, and fewer in the calibration of a large model.", panel=RUN, low=1
    )


@dataclass(frozen=True, kw_only=True)
class AttentionOptions(Options):
    """The implementation of attention, by transformers' names."""

    attention: Attention = option(
        "sdpa",
        "Implementation of attention: sdpa, eager, or flash_attention_2 (for training on a GPU).",
        panel=RUN,
        in_memory=False,
    )


@dataclass(frozen=True, kw_only=True)
class SaveOptions(Options):
    """What may become of a directory that exists already."""

    overwrite: bool = option(
        False, "Replace an existing output that vitshrink wrote.", panel=RUN, changes="nothing", in_memory=False
    )


@dataclass(frozen=True, kw_only=True)
class TypeOptions(Options):
    """The type of the weights in the files."""

    dtype: str | None = option(
        None,
        "Type of the saved weights; the type of the source if not given.",
        panel=RUN,
        choices=DTYPES,
        why="not a type that weights can be saved in.",
    )


RUNTIMES = ("torch", "torch-compile", "onnxruntime", "openvino")


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions(Options):
    """What models are timed in, and how."""

    runtime: str | None = option(
        None,
        "Runtime in which latency is measured: torch, torch-compile, onnxruntime or openvino. vitshrink exports "
        "the models for it. If not given, they run as they are.",
        panel=RUN,
        suggested=RUNTIMES,
    )
    threads: int | None = option(
        None, "CPU threads for latency measurements; the setting of PyTorch if not given.", panel=RUN, low=1
    )


@dataclass(frozen=True, kw_only=True)
class ClockOptions(RuntimeOptions):
    """What a budget of time is about."""

    latency_batch_size: int | None = option(
        None, "Samples per batch for --target-latency; 1 if not given.", panel=RUN, low=1
    )


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """What a report holds beside sizes and scores."""

    latency: tuple[int, ...] = option(
        (1,),
        "Measure the latency of a batch of this size; repeat the flag for several sizes.",
        panel=RUN,
        low=1,
        wanted="give batch sizes, which are at least 1.",
        changes="report",
    )
    thumbnails: bool = option(
        False,
        "Show the images with different predictions in the report. The report then contains these images.",
        panel=RUN,
        changes="report",
    )

    def check(self) -> None:
        if not self.latency:
            raise UsageError("--latency : give batch sizes, which are at least 1.")


@dataclass(frozen=True, kw_only=True)
class StateOptions(Options):
    """What a job keeps beside its result, so that it or another need not do it again."""

    cache: str | None = option(
        None,
        "Directory that keeps statistics and factors, so that another size of the same job is quick, above all "
        "with --refine 0.",
        panel=RUN,
        changes="nothing",
        writes=True,
    )
    save_every: float = option(
        30.0,
        "Seconds between two saves of the job state. After a kill, the same command continues from it.",
        panel=RUN,
        low=0,
        wanted="give seconds, such as 60.",
        changes="nothing",
        in_memory=False,
    )
    dry_run: bool = option(
        False, "Print the plan and the sizes, and write nothing.", panel=RUN, changes="nothing", in_memory=False
    )
