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

    model: str = required("A checkpoint directory, or a Hub id.", positional=True, reads=True, in_memory=False)
    output: str = required(
        "The directory to write; must not exist.", positional=True, changes="nothing", in_memory=False
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Where and how a job runs."""

    seed: int = option(0, "Of the choice of samples.", panel=RUN)
    device: str = option("auto", "auto, cpu, cuda, cuda:1 …", panel=RUN, in_memory=False)


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(Options):
    """Whether the network may be used."""

    offline: bool = option(False, "Never use the network.", panel=RUN, changes="nothing")


@dataclass(frozen=True, kw_only=True)
class BatchOptions(Options):
    """How many samples are read at once."""

    batch_size: int = option(32, "Samples a batch.", panel=RUN, low=1)


@dataclass(frozen=True, kw_only=True)
class AttentionOptions(Options):
    """The implementation of attention, by transformers' names."""

    attention: Attention = option(
        "sdpa", "sdpa, eager, or flash_attention_2 (in training, on a GPU).", panel=RUN, in_memory=False
    )


@dataclass(frozen=True, kw_only=True)
class SaveOptions(Options):
    """What may become of a directory that exists already."""

    overwrite: bool = option(
        False, "Replace an output that vitshrink wrote.", panel=RUN, changes="nothing", in_memory=False
    )


@dataclass(frozen=True, kw_only=True)
class TypeOptions(Options):
    """The type of the weights in the files."""

    dtype: str | None = option(
        None,
        "Type to save in; that of the source if not given.",
        panel=RUN,
        choices=DTYPES,
        why="not a type to save in.",
    )


RUNTIMES = ("torch", "torch-compile", "onnxruntime", "openvino")


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions(Options):
    """What models are timed in, and how."""

    runtime: str | None = option(
        None,
        "What is timed: torch, torch-compile, onnxruntime or openvino, into which models are exported; as they are if "
        "not given.",
        panel=RUN,
        suggested=RUNTIMES,
    )
    threads: int | None = option(
        None, "Threads on the CPU while it is timed; those of PyTorch if not given.", panel=RUN, low=1
    )


@dataclass(frozen=True, kw_only=True)
class ClockOptions(RuntimeOptions):
    """What a budget of time is about."""

    latency_batch_size: int | None = option(
        None, "Samples a batch, with --target-latency; 1 if not given.", panel=RUN, low=1
    )


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """What a report holds beside sizes and scores."""

    latency: tuple[int, ...] = option(
        (1,),
        "Time a batch of this size; repeat it for several.",
        panel=RUN,
        low=1,
        wanted="give batch sizes, which are at least 1.",
        changes="report",
    )
    thumbnails: bool = option(
        False,
        "Show the images that dense and compressed model disagree on in the report, which then holds them.",
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
        "A directory that keeps statistics and factors: another size of the same job is then quick, most of all with "
        "--refine 0.",
        panel=RUN,
        changes="nothing",
        writes=True,
    )
    save_every: float = option(
        30.0,
        "Seconds between two savings of what was computed, from which the same command goes on after a kill.",
        panel=RUN,
        low=0,
        wanted="give seconds, such as 60.",
        changes="nothing",
        in_memory=False,
    )
    dry_run: bool = option(
        False, "Print the plan and the sizes; write nothing.", panel=RUN, changes="nothing", in_memory=False
    )
