"""What can be known to be wrong before anything is computed, or imported that computes."""

from collections.abc import Mapping
from typing import Any, TypeVar

from vitshrink.cli import catalog
from vitshrink.config.choosing import choose
from vitshrink.config.job import JobOptions
from vitshrink.config.method import ALLOCATIONS
from vitshrink.config.options import CompressConfig
from vitshrink.models import places

Job = TypeVar("Job", bound=JobOptions)


def check_methods(job: CompressConfig) -> None:
    """Raises UsageError for a method, its allocation, compensation or option that there is not."""
    method = choose(job.method, catalog.methods(), "method")
    if job.allocation is not None:
        choose(job.allocation, dict.fromkeys(ALLOCATIONS), "allocation")
    if job.compensation is not None:
        choose(job.compensation, dict.fromkeys(method.compensations), "compensation")
    method.check_option_names(job.options)


def check_models(job: JobOptions) -> None:
    """Raises CheckpointError for a directory or, without the network, a Hub model that is not here."""
    offline = bool(getattr(job, "offline", False))
    for name in (getattr(job, "model", None), getattr(job, "baseline", None), getattr(job, "teacher", None)):
        if name is not None and not name.endswith((".onnx", ".xml")):
            places.find(name, offline=offline)


def job_of(kind: type[Job], entries: Mapping[str, Any], where: str) -> Job:
    """The job of the entries, with what a data recipe says where nobody says anything else. Raises UsageError."""
    job = kind.from_mapping(entries, where)
    if (calibration := getattr(job, "calibration", None)) is None:
        return job
    from vitshrink.data import recipe_defaults

    defaults = recipe_defaults(calibration)
    return kind.from_mapping(defaults | dict(entries), where) if defaults else job
