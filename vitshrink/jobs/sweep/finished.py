"""Jobs that have ended: whether their result is there and undamaged, and whether it keeps its bounds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vitshrink.errors import DataError, UsageError
from vitshrink.evaluation.gates import Gates
from vitshrink.jobs.sweep.outcome import Outcome, Status
from vitshrink.jobs.sweep.output import MODEL, damage, is_running
from vitshrink.jobs.sweep.plan import JobPlan, SweepPlan
from vitshrink.report import Report


def finished(plan: SweepPlan, job: JobPlan, wanted: Callable[[Outcome], bool]) -> Outcome | None:
    """What is written down of a job that ended well, if its result is there and undamaged.

    ``wanted`` tells whether it is the job that is meant, which may have had the name of another one. A job whose
    process has ended counts, too, where the sweep that started it has not lived to write that down.
    """
    directory = plan.output / job.name
    earlier = Outcome.read(directory)
    if earlier is None or not wanted(earlier) or earlier.status not in (Status.RUNNING, Status.PASSED, Status.GATE):
        return None
    return None if damage(plan, job) is not None or is_running(directory) else earlier


def judged(outcome: Outcome, gates: Gates, directory: Path) -> Outcome:
    """The outcome of a job whose result is there, held against its bounds."""
    try:
        status, message = judge(gates, Report.read(directory / MODEL))
    except (DataError, UsageError) as error:
        status, message = Status.FAILED, str(error)
    return replace(outcome, status=status, message=message)


def judge(gates: Gates, report: Report) -> tuple[Status, str]:
    """Whether a result keeps its bounds, and by how much. Raises UsageError where that cannot be told."""
    nbytes = report.bytes and report.bytes.compressed
    verdicts = gates.judge(report.evaluation, nbytes=nbytes, latency_ratio=report.latency_ratio)
    status = Status.PASSED if all(verdict.passed for verdict in verdicts) else Status.GATE
    return status, "; ".join(map(str, sorted(verdicts, key=lambda verdict: verdict.passed)))
