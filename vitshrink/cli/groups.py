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

    as_json: bool = option(False, "Print only JSON on stdout.", panel=RUN, flags=("--json",))


@dataclass(frozen=True, kw_only=True)
class QuietOptions(Options):
    """Whether anything but errors is said."""

    quiet: bool = option(False, "Print only errors.", panel=RUN, flags=("--quiet", "-q"))


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

    config: Path | None = option(
        None, "Recipe (YAML) with any of these flags as entries. Flags override the recipe.", panel=RUN
    )


@dataclass(frozen=True, kw_only=True)
class RowOptions(Options):
    """A file that collects results."""

    csv: Path | None = option(None, "Append a row for each output to this CSV file.", panel=RUN)


@dataclass(frozen=True, kw_only=True)
class UploadOptions(Options):
    """Where on the Hub a result goes."""

    push_to_hub: str | None = option(
        None, "Upload the finished model to this Hub repository, such as me/small-vit.", panel=RUN
    )
    private: bool = option(False, "With --push-to-hub: make the repository private.", panel=RUN)


@dataclass(frozen=True, kw_only=True)
class FigureOptions(Options):
    """Where figures go."""

    figures: Path | None = option(None, "Write figures, their numbers and an HTML page to this directory.", panel=RUN)


@dataclass(frozen=True, kw_only=True)
class SweepGateOptions(GateOptions):
    """Bounds on every result of a sweep."""

    reworded: ClassVar = {
        "min_accuracy": {"help": "Minimum accuracy of every result, in percent."},
        "max_drop": {"help": "Maximum drop below the dense model, in points of accuracy."},
        "max_changed": {"help": "Maximum percentage of predictions that differ from the dense model."},
        "max_kl": {"help": "Maximum KL divergence from the dense model, in nats."},
        "max_error": {"help": "Maximum relative squared error of scores or features."},
        "max_size": {"help": "Maximum size of the weight files, e.g. 90MB."},
        "max_latency_ratio": {"help": "Maximum latency, as a fraction of the dense model's."},
    }


@dataclass(frozen=True, kw_only=True)
class SweepOptions(Options):
    """Which sweep is run, and how."""

    file: Path = required("YAML file with a matrix of jobs; see docs/batch.md.", positional=True)
    output: str | None = option(None, "Directory or URL for the results, instead of the one in the file.")
    jobs: int | None = option(
        None,
        "Number of processes at once; by default 1 on this machine, and as many as fit on a cluster.",
        flags=("--jobs", "-j"),
        low=1,
    )
    resume: bool = option(False, "Continue a sweep. Finished jobs whose inputs did not change do not run again.")
    fail_fast: bool = option(
        False, "Stop all jobs when one fails or misses a bound.", flags=("--fail-fast/--keep-going",)
    )
    time_limit: str | None = option(None, "Time limit of each job, e.g. 90s, 30m, 1.5h.")
    shard: str | None = option(
        None, "Run one part of the jobs, e.g. 3/8 on the third of eight machines; then use --collect.", panel=MACHINES
    )
    collect: bool = option(False, "Run nothing, and gather the results of the shards.", panel=MACHINES)
    engine: str = option("local", "Engine that runs the jobs: local, or ray (a cluster).", panel=MACHINES)
    address: str | None = option(
        None, "Address of a running Ray cluster, HOST:6379 or auto; by default a cluster starts here.", panel=MACHINES
    )
    dry_run: bool = option(False, "List the jobs and run nothing.")

    def check(self) -> None:
        """Raises UsageError for flags that mean nothing together."""
        others = ("shard", "jobs", "resume", "fail_fast", "engine", "address", "time_limit", "dry_run")
        if self.collect and (given := self.given(others)):
            raise UsageError(f"{given[0]} has no effect with --collect, which runs no job: remove it.")


@dataclass(frozen=True, kw_only=True)
class ResultRowOptions(RowOptions):
    """A file that collects the figures of evaluations."""

    reworded: ClassVar = {"csv": {"help": "Append the figures as a row to this CSV file."}}


@dataclass(frozen=True, kw_only=True)
class ResultOptions(DisplayOptions):
    """What is printed, where the result is printed in any case."""

    reworded: ClassVar = {"quiet": {"help": "Print only the result."}}
