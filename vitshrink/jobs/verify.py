"""Whether a published directory still is what it was published as."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from vitshrink.errors import CheckpointError, DataError, UsageError
from vitshrink.models import cost
from vitshrink.models.checkpoint import compressed_layers
from vitshrink.models.example import example_inputs
from vitshrink.models.loading import LoadedModel, load_source
from vitshrink.models.source import examine
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.report import BeforeAfter, Report
from vitshrink.runtime import checksums


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; ``problem`` is None when it is as it should be."""

    name: str
    found: str
    problem: str | None = None


def verify_directory(directory: Path) -> list[Check]:
    """Check a directory that vitshrink published: files, strict load, finite outputs, and the figures of its report.

    Nothing is written. All checks run even if one of them fails, unless the model does not load.

    Raises:
        UsageError: there is no such directory.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory: name one that vitshrink wrote.")
    broken = checksums.broken_files(directory)
    problem = "; ".join(f"{name} {what}" for name, what in broken.items()) or None
    checks = [Check("checksums", f"{len(broken) or 'no'} files differ from {checksums.FILE_NAME}", problem)]
    try:
        loaded = load_source(examine(directory), dtype=torch.float32)
    except CheckpointError as error:
        return [*checks, Check("load", "the model does not load", str(error))]
    model = loaded.model
    compressed = len(compressed_layers(model))
    checks.append(Check("load", f"strictly, with {compressed} compressed layers", None))
    checks.append(_outputs(model))
    try:
        report = Report.read(directory)
    except DataError as error:
        return [*checks, Check("report", "there is none", str(error))]
    return [*checks, *_figures(report, loaded), _layers(report, model)]


@torch.no_grad()
def _outputs(model: PreTrainedModel) -> Check:
    outputs = model(**example_inputs(model))[0]
    bad = int((~torch.isfinite(outputs)).sum())
    return Check("outputs", f"{outputs.numel()} values", f"{bad} of them are NaN or infinite" if bad else None)


def _figures(report: Report, loaded: LoadedModel) -> list[Check]:
    """Parameters, bytes and operations, counted again."""
    model = loaded.model
    counted = {
        "parameters": (report.parameters, cost.parameters(model)),
        "bytes": (report.bytes, loaded.source.nbytes),
        "macs": (report.macs, cost.macs(model, example_inputs(model))),
    }
    return [_equal(name, group, found) for name, (group, found) in counted.items()]


def _equal(name: str, cost: BeforeAfter | None, found: int) -> Check:
    said = cost and cost.compressed
    return Check(name, f"{found:,}", None if said == found else f"the report says {said}")


def _layers(report: Report, model: PreTrainedModel) -> Check:
    """The ranks of the report against those of the layers."""
    ranks = {name: layer.rank for name, layer in compressed_layers(model).items() if isinstance(layer, LowRankLinear)}
    said = {layer.name: layer.rank for layer in report.layers if layer.rank is not None}
    different = sorted(name for name in ranks if ranks[name] != said.get(name))
    problem = ", ".join(f"{name} (report {said.get(name)}, model {ranks.get(name)})" for name in different[:5])
    return Check("ranks", f"of {len(ranks)} layers", problem or None)
