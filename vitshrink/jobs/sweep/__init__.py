"""Many compressions from one file: a matrix of jobs, each in its own process, and one table of what came of them."""

from vitshrink.jobs.sweep.collecting import collect, missing
from vitshrink.jobs.sweep.fingerprint import fingerprints
from vitshrink.jobs.sweep.outcome import Outcome, Status, exit_code
from vitshrink.jobs.sweep.plan import JobPlan, SweepPlan, read_sweep
from vitshrink.jobs.sweep.results import write_results
from vitshrink.jobs.sweep.runner import SweepObserver, run_sweep
from vitshrink.jobs.sweep.shards import Shard

__all__ = [
    "JobPlan",
    "Outcome",
    "Shard",
    "Status",
    "SweepObserver",
    "SweepPlan",
    "collect",
    "exit_code",
    "fingerprints",
    "missing",
    "read_sweep",
    "run_sweep",
    "write_results",
]
