"""What the shards of a sweep have written, gathered: the outcomes that one sweep of all jobs would have given."""

from collections.abc import Sequence
from dataclasses import replace

from vitshrink.errors import OutputError
from vitshrink.jobs.sweep.fingerprint import recipe_key
from vitshrink.jobs.sweep.finished import finished, judged
from vitshrink.jobs.sweep.outcome import Outcome, Status
from vitshrink.jobs.sweep.output import MODEL, locked
from vitshrink.jobs.sweep.plan import JobPlan, SweepPlan

MISSING = "no shard finished it"


def collect(plan: SweepPlan) -> list[Outcome]:
    """An outcome for every job of the plan, in its order; one that is missing is still waiting.

    A job counts where this version of vitshrink has run it by the recipe that the file asks for now. What the model and
    the data hold was a matter of its shard: neither has to be here.

    Raises:
        OutputError: there is no such output, or a sweep is writing it.
    """
    if not (plan.output if plan.store is None else plan.store).exists():
        raise OutputError(f"{plan.shown} does not exist: run its shards first, as with --shard 1/8.")
    with locked(plan, resume=True):
        return [_collected(plan, job) for job in plan.jobs]


def _collected(plan: SweepPlan, job: JobPlan) -> Outcome:
    directory, key = plan.output / job.name, recipe_key(job.config)
    there = Outcome.read(directory)
    if there is None or there.recipe != key:
        return Outcome(Status.WAITING, "", message=MISSING if there is None else "another recipe ran it")
    if found := finished(plan, job, lambda outcome: outcome.recipe == key):
        return judged(found, job.gates, directory)
    if there.status is Status.PASSED or (there.status is Status.GATE and (directory / MODEL).exists()):
        return replace(there, status=Status.WAITING, message="its model is damaged or missing")
    return there if there.status.ended else replace(there, status=Status.WAITING, message=MISSING)


def missing(plan: SweepPlan, outcomes: Sequence[Outcome]) -> list[str]:
    """The names of the jobs that no shard has run to its end."""
    return [job.name for job, outcome in zip(plan.jobs, outcomes, strict=True) if not outcome.status.ended]
