"""``vitshrink eval``: a model measured on a data set."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitshrink.cli import checks, console
from vitshrink.cli.flags import command
from vitshrink.cli.groups import ResultOptions, ResultRowOptions
from vitshrink.config.evaluation import GateOptions
from vitshrink.config.fields import plain_values
from vitshrink.config.options import EvalJob, parse_quantity

if TYPE_CHECKING:
    from vitshrink.evaluation.gates import Gates
    from vitshrink.jobs.evaluate import Assessment


@command(EvalJob, GateOptions, ResultRowOptions, ResultOptions)
def evaluate_command(
    flags: dict[str, Any], bounds: GateOptions, rows: ResultRowOptions, display: ResultOptions
) -> None:
    """Evaluate MODEL: accuracy if the data have labels, and fidelity to --baseline if it is given.

    Example: vitshrink eval ./my-vit-small --baseline ./my-vit --data ./val
    """
    job = checks.job_of(EvalJob, flags, "the command line")
    largest = None if bounds.max_size is None else parse_quantity(bounds.max_size, "--max-size")
    checks.check_models(job)

    from vitshrink.cli.rendering import evaluation_table
    from vitshrink.evaluation.gates import Gates
    from vitshrink.report import append_rows

    gates = Gates(**plain_values(bounds) | {"max_size": largest})
    gates.require(baseline=job.baseline)
    found = _measured(job, gates, rows, display)
    if found is None:
        return
    if rows.csv is not None:
        append_rows(rows.csv, [found.to_row()])
    if display.as_json:
        console.show_json(found.to_dict())
    else:
        console.show(evaluation_table(found))
    gates.check(found.evaluation, nbytes=found.footprint.bytes, latency_ratio=found.latency_ratio)


def _measured(job: EvalJob, gates: "Gates", rows: ResultRowOptions, display: ResultOptions) -> "Assessment | None":
    """What the first of several processes found; None in the others."""
    from vitshrink.jobs.evaluate import evaluate_checkpoint
    from vitshrink.models.structures.tokens import MixedTokens
    from vitshrink.report import check_appendable
    from vitshrink.runtime import processes

    budget = job.token_budget
    processes.join(job.device)
    if rows.csv is not None and processes.is_main():
        check_appendable(rows.csv)
    found = evaluate_checkpoint(
        job.model,
        job.eval_data,
        baseline=job.baseline,
        limit=job.limit,
        batch_size=job.batch_size,
        max_length=job.max_length,
        preprocess=job.preprocess,
        class_map=Path(job.class_map) if job.class_map else None,
        max_bad_samples=job.max_bad_samples,
        workers=job.workers,
        runtime=job.runtime,
        number_of_threads=job.threads,
        latency=job.latency or ((1,) if job.runtime or gates.max_latency_ratio is not None else ()),
        device=job.device,
        offload=job.offload,
        seed=job.seed,
        offline=job.offline,
        resolution=job.resolution,
        tokens=None if budget is None else MixedTokens(budget, job.token_levels, job.token_scorer),
        landmarks=job.landmarks,
        landmark_form=job.landmark_form,
        observer=console.TerminalObserver(quiet=display.silent or not processes.is_main()),
    )
    main = processes.is_main()
    processes.leave()
    return found if main else None
