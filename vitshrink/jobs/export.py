"""``export``: a checkpoint, dense or compressed, in a form that runs without vitshrink, compared with the original."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from vitshrink._version import __version__
from vitshrink.config.choosing import choose
from vitshrink.errors import OutputError, UsageError
from vitshrink.jobs.export_forms import FORMS, Form, Run
from vitshrink.jobs.result import published
from vitshrink.jobs.session import Session, Settings
from vitshrink.models import cost
from vitshrink.models.checkpoint import compressed_layers
from vitshrink.models.duals import Side, tower_of
from vitshrink.models.families import family_of
from vitshrink.models.hf_quantizer import list_structures
from vitshrink.models.publication import EXPORT
from vitshrink.models.structures.quantized import QuantizedLinear
from vitshrink.models.structures.static import StaticProduct
from vitshrink.models.tracing import outputs_of, quiet, trace_inputs
from vitshrink.runtime.extras import EXTRAS, require
from vitshrink.runtime.observer import Job, Observer, Silent
from vitshrink.runtime.storage import is_url

TOLERANCE = 1e-4
"""Largest difference of an output that is put up with; of its size, where outputs are larger than 1."""

ROUNDINGS = 2
"""Where activations are rounded: difference that is put up with, in multiples of what the rounding itself does."""

BATCH_SIZES = (1, 2, 7)
"""On which an exported model is compared that takes all; it was traced with two samples."""


@dataclass(frozen=True)
class Export:
    """What was written, and how far it is from the model it came from."""

    directory: Path
    file: str
    """The file that holds the weights, within the directory."""
    form: Form
    parameters: int
    """Numbers that are stored."""
    bytes: int
    difference: float
    """Largest difference of an output from the model's in float32."""
    largest: float
    """Largest output, for comparison."""
    rounding: float
    """Largest change of an output by the rounding of activations, 0 where none are rounded. Two programs agree no
    better: an input that differs in its last digit is rounded the other way somewhere, and so on from there."""
    batch_sizes: Sequence[int]
    warnings: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"directory": str(self.directory), "vitshrink": __version__}


def export(
    model: str,
    output: str,
    form: str,
    *,
    tower: Side | None = None,
    tolerance: float = TOLERANCE,
    batch_size: int | None = None,
    offline: bool = False,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> Export:
    """Export ``model`` to the directory ``output``: as ONNX, as an OpenVINO IR, as a dense
    checkpoint, or as a torch.export program. Low-rank layers lose their pivots, see ``models.plain``. ``tower`` is the
    tower of a dual encoder to export; only a dense checkpoint can hold both.

    The result takes batches of any size, or of ``batch_size``, and texts of any length that the model takes. It is
    compared with the model on random inputs of several sizes, or of that size, before it is published.

    Raises:
        UsageError: an unknown form, a model without compressed layers or a batch size for ``dense``, or a wrong tower.
        DependencyError: a package that the form needs is missing.
        CheckpointError: the model cannot be read.
        OutputError: the output cannot be written, or differs by more than ``tolerance`` and the rounding of
            activations.
    """
    write = choose(form, FORMS, "form")
    if not 0 < tolerance < float("inf"):
        raise UsageError(f"--tolerance {tolerance}: give a positive number such as {TOLERANCE:g}.")
    if form == "dense" and batch_size is not None:
        raise UsageError("--batch-size is for programs: a dense checkpoint takes batches of any size. Remove it.")
    if form in EXTRAS:
        require(form, f"--to {form}")
    if is_url(output):
        raise UsageError(
            f"{output}: export writes to a local directory only, not to a URL: give a directory and copy it."
        )
    if Path(output).suffix in (".onnx", ".xml", ".pt2"):
        raise UsageError(
            f"{output}: give a directory, because the configuration and processor files are written beside the weights."
        )
    job = Job(observer or Silent())
    session = _of_tower(Session.open(model, Settings(device="cpu", offline=offline), job), form, tower)
    source = session.source
    source.companions.tell(job)
    if form == "dense" and not compressed_layers(source.model):
        raise UsageError(f"{model} has no compressed layer: it already is the dense checkpoint.")
    with published(str(output), session, 5 * cost.parameters(source.model), overwrite=overwrite) as staging:
        with job.stage("export", f"Writing {'the dense checkpoint' if form == 'dense' else form}"):
            written = write(session, staging, batch_size)
            sizes = BATCH_SIZES if batch_size is None else (batch_size,)
            with quiet():
                difference, largest = _compare(source.model, written.run, sizes)
                rounding = _rounding(source.model, sizes)
        if not difference <= max(tolerance * max(1.0, largest), ROUNDINGS * rounding):  # a NaN is no match either
            raise OutputError(
                f"the {form} model differs from {model} by up to {difference:.2g} in outputs of up to "
                f"{largest:.3g}, so it was not written. To allow a larger difference, use --tolerance."
            )
        found = Export(
            Path(output),
            written.file,
            form,  # type: ignore[arg-type]
            written.parameters,
            written.bytes,
            difference,
            largest,
            rounding,
            sizes,
            job.warnings,
        )
        record = found.to_dict() | {
            "directory": Path(output).name,
            "model": model,
            "left_out": dict(source.companions.left),
        }
        (staging / EXPORT).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return found


def _of_tower(session: Session, form: str, tower: Side | None) -> Session:
    """The session of one tower alone, where that is asked for."""
    source = session.source
    if source.task != "image-text":
        if tower is not None:
            raise UsageError(f"--tower {tower}: {type(source.model).__name__} has only one tower: remove --tower.")
        return session
    if tower is None:
        if form == "dense":
            return session
        raise UsageError(
            f"{type(source.model).__name__} has two towers, which run separately in runtimes: pass --tower image "
            "or --tower text."
        )
    model = tower_of(source.model, tower)
    list_structures(model)
    described = replace(source.source, config=model.config.to_dict())
    return replace(session, source=replace(source, model=model, source=described, family=family_of(model)))


def _compare(model: PreTrainedModel, run: Run, sizes: Sequence[int]) -> tuple[float, float]:
    """The largest difference over all outputs and sizes of batches, and the largest output."""
    difference = largest = 0.0
    for batch_size in sizes:
        inputs = trace_inputs(model, batch_size)
        expected, found = outputs_of(model, inputs), run(inputs)
        if missing := expected.keys() - found.keys():
            raise OutputError(f"the exported model has no output {', '.join(sorted(missing))}.")
        for name, values in expected.items():
            largest = max(largest, float(values.abs().max()))
            difference = _worse(difference, float((found[name] - values).abs().max()))
    return difference, largest


def _rounding(model: PreTrainedModel, sizes: Sequence[int]) -> float:
    """The largest difference that the rounding of activations makes to an output."""
    if not any(map(_rounds, model.modules())):
        return 0.0
    rounded = iter([outputs_of(model, trace_inputs(model, size)) for size in sizes])
    with _without_rounding(model):
        return _compare(model, lambda _inputs: next(rounded), sizes)[0]


def _rounds(layer: nn.Module) -> bool:
    """Whether a layer rounds its inputs."""
    if isinstance(layer, QuantizedLinear):
        return layer.spec.activations == "dynamic"
    return isinstance(layer, StaticProduct)


@contextmanager
def _without_rounding(model: PreTrainedModel) -> Iterator[None]:
    """Inside, no layer rounds its inputs."""
    layers = [layer for layer in model.modules() if _rounds(layer)]
    before = [layer.spec if isinstance(layer, QuantizedLinear) else None for layer in layers]
    try:
        for layer in layers:
            if isinstance(layer, QuantizedLinear):
                layer.spec = replace(layer.spec, activations="none")
            elif isinstance(layer, StaticProduct):
                layer.rounds = False
        yield
    finally:
        for layer, spec in zip(layers, before, strict=True):
            if isinstance(layer, QuantizedLinear) and spec is not None:
                layer.spec = spec
            elif isinstance(layer, StaticProduct):
                layer.rounds = True


def _worse(one: float, other: float) -> float:
    return other if other != other or other > one else one
