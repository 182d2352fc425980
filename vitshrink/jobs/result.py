"""What every job does at its end: what it wrote is verified, read back once, and published whole."""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from vitshrink.errors import UsageError
from vitshrink.jobs.session import Session
from vitshrink.models.checkpoint import save, verify
from vitshrink.models.example import example_inputs
from vitshrink.models.loading import LoadedModel, load_source, moved
from vitshrink.models.publication import REPORT, free_place, publish_by_main
from vitshrink.models.source import examine
from vitshrink.models.targets import blocks_of
from vitshrink.report import Report
from vitshrink.runtime import processes
from vitshrink.runtime.heap import give_back
from vitshrink.runtime.offloading import recall
from vitshrink.runtime.storage import is_url, scratch


@dataclass(frozen=True)
class CompressionResult:
    """One compressed model: its directory (None after a dry run; a string for a URL) and its report."""

    directory: Path | str | None
    report: Report


@contextmanager
def published(
    output: str, session: Session, bytes_needed: int, *, parts: Collection[str] = (), overwrite: bool = False
) -> Iterator[Path]:
    """A staging directory, with one for each of ``parts``: what is in it appears as ``output`` at the end, or nothing.

    Raises as ``publication.publish_by_main``; UsageError for several parts at a URL.
    """
    protected = session.source.directory
    if not is_url(output):
        with publish_by_main(
            Path(output), bytes_needed, parts=parts, overwrite=overwrite, protect=protected
        ) as staging:
            yield staging
        return
    if parts:
        raise UsageError(f"{output}: only one size at a time can be written to a URL: give one size, or use a sweep.")
    here = scratch("output") / "model"
    with processes.together():
        place = free_place(output, overwrite=overwrite) if processes.is_main() else None
    with publish_by_main(here, bytes_needed, overwrite=True) as staging:
        yield staging
    with processes.together():
        if place is not None:
            place.publish(here, REPORT)
            shutil.rmtree(here)


def result_at(output: str, part: str = "") -> Path | str:
    """Where a result lies, as a user finds it."""
    return output if is_url(output) else Path(output) / part


def write_result(
    model: PreTrainedModel,
    directory: Path,
    session: Session,
    *,
    dtype: torch.dtype | None = None,
    runs_in: torch.dtype | None = None,
    extra_files: Mapping[str, str] | None = None,
    finish: Callable[[PreTrainedModel], PreTrainedModel] | None = None,
    in_place: bool = True,
) -> LoadedModel:
    """Save a model in a staging directory, verify it, and give what was read back, in float32 on the session's device.

    The first process writes, and verifies what it reads back; the others read a copy of its files. The model is given
    away: it is cast ``in_place`` to ``dtype`` (the source's, if none is given), and on the CPU afterwards. Its config
    names ``runs_in`` for those who load it (``dtype``, or the source's, if none is given). ``finish`` makes of it what
    is written.

    Raises:
        NumericsError: a value does not fit the type it is saved in.
        OutputError: the directory cannot be written, or does not hold the model.
    """
    attention = session.settings.attention
    written: LoadedModel | None = None
    with processes.together():
        if processes.is_main():
            finished = model if finish is None else finish(model)
            recall(blocks_of(finished))
            saved = save(
                finished,
                directory,
                source=session.source,
                dtype=dtype,
                runs_in=runs_in or dtype or session.runs_in(None),
                extra_files=extra_files,
                in_place=in_place,
            )
            give_back()
            written = verify(directory, saved, example_inputs(session.source.model), attention=attention)
    processes.copy_from_main(directory)
    if written is None:
        source = examine(directory)
        written = load_source(source, dtype=source.dtype, attention=attention)
    moved(written.model, session.device, torch.float32)
    session.place(written.model)
    return written
