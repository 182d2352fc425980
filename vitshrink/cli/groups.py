"""Flags that belong to the command line alone: what is printed, and where else results go."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vitshrink.config.evaluation import GateOptions
from vitshrink.config.fields import RUN, Options, option, required
from vitshrink.errors import UsageError

MACHINES = "Many machines"


@dataclass(frozen=True, kw_only=True)
class JsonOptions(Options):
    """Whether a program reads the result."""

    as_json: bool = option(False, "Only JSON on stdout.", panel=RUN, flags=("--json",))


@dataclass(frozen=True, kw_only=True)
class QuietOptions(Options):
    """Whether anything but errors is said."""

    quiet: bool = option(False, "Only errors.", panel=RUN, flags=("--quiet", "-q"))


@dataclass(frozen=True, kw_only=True)
class DisplayOptions(JsonOptions, QuietOptions):
    """What is printed."""

    @property
    def silent(self) -> bool:
        """Whether neither progress nor tables are shown."""
        return self.quiet or self.as_json


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(Options):
    """A file that says what flags may say."""

    config: Path | None = option(None, "Recipe with any of these as entries; flags go before.", panel=RUN)


@dataclass(frozen=True, kw_only=True)
class RowOptions(Options):
    """A file that collects results."""

    csv: Path | None = option(None, "Append a row for every output to this file.", panel=RUN)


@dataclass(frozen=True, kw_only=True)
class UploadOptions(Options):
    """Where on the Hub a result goes."""

    push_to_hub: str | None = option(
        None, "Upload the finished result to this Hub model, such as me/small-vit.", panel=RUN
    )
    private: bool = option(False, "With --push-to-hub: make it private.", panel=RUN)


@dataclass(frozen=True, kw_only=True)
class FigureOptions(Options):
    """Where figures go."""

    figures: Path | None = option(
        None, "Write figures, their numbers and a page with both to this directory.", panel=RUN
    )


@dataclass(frozen=True, kw_only=True)
class SweepGateOptions(GateOptions):
    """Bounds on every result of a sweep."""

    reworded: ClassVar = {
        "min_accuracy": {"help": "Bound on every result, in percent."},
        "max_drop": {"help": "Points of accuracy below the dense model."},
        "max_changed": {"help": "Percent of the predictions that differ from the dense model's."},
        "max_kl": {"help": "Nats from the dense model."},
        "max_error": {"help": "Squared error of scores or features, as a share of their spread."},
        "max_size": {"help": "Bytes of the weight files, e.g. 90MB."},
        "max_latency_ratio": {"help": "Time of a pass, as a fraction of the dense."},
    }


@dataclass(frozen=True, kw_only=True)
class SweepOptions(Options):
    """Which sweep is run, and how."""

    file: Path = required("YAML with a matrix of jobs; see docs/batch.md.", positional=True)
    output: str | None = option(None, "Where the results go, a directory or a URL; instead of the file's.")
    jobs: int | None = option(
        None,
        "Processes at once; if not given 1 on this machine, and as many as there is room for on a cluster.",
        flags=("--jobs", "-j"),
        low=1,
    )
    resume: bool = option(False, "Go on with a sweep; what is finished and unchanged is not run again.")
    fail_fast: bool = option(
        False, "Stop all jobs at the first that fails or misses a bound.", flags=("--fail-fast/--keep-going",)
    )
    time_limit: str | None = option(None, "Of every job, e.g. 90s, 30m, 1.5h.")
    shard: str | None = option(
        None, "Run one of several parts, e.g. 3/8 on the third of eight machines; then --collect.", panel=MACHINES
    )
    collect: bool = option(
        False, "Run nothing: gather what the shards wrote into the results of the whole sweep.", panel=MACHINES
    )
    engine: str = option("local", "What runs the jobs: local, or ray (a cluster).", panel=MACHINES)
    address: str | None = option(
        None, "Of a running Ray cluster, HOST:6379 or auto; if not given one is started here.", panel=MACHINES
    )
    dry_run: bool = option(False, "List the jobs; run nothing.")

    def check(self) -> None:
        """Raises UsageError for flags that mean nothing together."""
        others = ("shard", "jobs", "resume", "fail_fast", "engine", "address", "time_limit", "dry_run")
        if self.collect and (given := self.given(others)):
            raise UsageError(f"{given[0]}: --collect runs no job; leave it out.")


@dataclass(frozen=True, kw_only=True)
class ResultRowOptions(RowOptions):
    """A file that collects the figures of evaluations."""

    reworded: ClassVar = {"csv": {"help": "Append the figures as a row to this file."}}


@dataclass(frozen=True, kw_only=True)
class ResultOptions(DisplayOptions):
    """What is printed, where the result is printed in any case."""

    reworded: ClassVar = {"quiet": {"help": "Only the result."}}
