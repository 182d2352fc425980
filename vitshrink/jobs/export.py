"""``export``: a checkpoint, dense or compressed, in a form that runs without vitshrink, compared with the original."""

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from vitshrink._version import __version__
from vitshrink.config.choices import choose
from vitshrink.errors import OutputError, UsageError, VitshrinkError
from vitshrink.models import cost
from vitshrink.models.checkpoint import compressed_layers, file_bytes, save, verify
from vitshrink.models.example import example_inputs
from vitshrink.models.loading import LoadedModel, load_dense
from vitshrink.models.onnx_model import Session, onnx_bytes, onnx_numbers
from vitshrink.models.publication import EXPORT, check_space, publish
from vitshrink.models.source import CONFIG, examine
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.structures.quantized import QuantizedEmbedding, QuantizedLinear
from vitshrink.runtime.extras import require
from vitshrink.runtime.observer import Job, Observer, Silent

Form = Literal["onnx", "dense", "torch"]

ONNX_FILE = "model.onnx"
PROGRAM_FILE = "model.pt2"
TOLERANCE = 1e-4
"""Largest difference of an output that is put up with; of its size, where outputs are larger than 1."""

ROUNDINGS = 2
"""Where activations are rounded: difference that is put up with, in multiples of what the rounding itself does."""

BATCH_SIZES = (1, 2, 7)
"""On which an exported model is compared; it was traced with two samples."""

Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


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
    tolerance: float = TOLERANCE,
    offline: bool = False,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> Export:
    """Write ``model`` into the directory ``output``: as ONNX, as a dense checkpoint, or as a torch.export program.

    Batches of any size, and texts of any length that the model can take, may be given to the result. It is compared
    with the model on random inputs of several sizes before it is published.

    Raises:
        UsageError: an unknown form, or a dense model that is to be made dense.
        DependencyError: a package that the form needs is missing.
        CheckpointError: the model cannot be read.
        OutputError: it cannot be written, or differs by more than ``tolerance`` and the rounding of activations.
    """
    choose(form, {name: name for name in get_args(Form)}, "form")
    if not 0 < tolerance < float("inf"):
        raise UsageError(f"--tolerance {tolerance}: give a positive number such as {TOLERANCE:g}.")
    if form == "onnx":
        require("onnx", "--to onnx")
    if Path(output).suffix in (".onnx", ".pt2"):
        raise UsageError(f"{output}: give a directory; the configuration and processor files go beside the weights.")
    job = Job(observer or Silent())
    with job.stage("load", "Loading the model"):
        source = load_dense(model, offline=offline, allow_compressed=True, warn=job.warn)
    source.companions.tell(job)
    if form == "dense" and not compressed_layers(source.model):
        raise UsageError(f"{model} has no compressed layer: it is the dense checkpoint already.")
    check_space(Path(output), 5 * cost.parameters(source.model))
    with publish(Path(output), overwrite=overwrite, protect=source.directory) as staging:
        write = {"onnx": _write_onnx, "dense": _write_dense, "torch": _write_program}[form]
        with job.stage("export", f"Writing {'the dense checkpoint' if form == 'dense' else form}"):
            file, run = write(source, staging, job)
            with _quiet():
                difference, largest = _compare(source.model, run)
                rounding = _rounding(source.model)
        if not difference <= max(tolerance * max(1.0, largest), ROUNDINGS * rounding):  # a NaN is no match either
            raise OutputError(
                f"the {form} model differs from {model} by up to {difference:.2g} in outputs of up to {largest:.3g}: "
                f"not written. Allow more with --tolerance if that is good enough."
            )
        weights = staging / file
        found = Export(
            Path(output),
            file,
            form,  # type: ignore[arg-type]
            onnx_numbers(weights) if form == "onnx" else _numbers(staging, source.model, form),
            onnx_bytes(weights) if form == "onnx" else weights.stat().st_size,
            difference,
            largest,
            rounding,
            BATCH_SIZES,
            job.warnings,
        )
        record = found.to_dict() | {
            "directory": Path(output).name,
            "model": model,
            "left_out": dict(source.companions.left),
        }
        (staging / EXPORT).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return found


def _numbers(staging: Path, model: PreTrainedModel, form: str) -> int:
    if form == "dense":
        return sum(tensor.numel for tensor in examine(staging).tensors.values())
    return cost.parameters(model)


def _write_onnx(source: LoadedModel, staging: Path, _job: Job) -> tuple[str, Run]:
    model, inputs = source.model, trace_inputs(source.model, 2)
    names = list(_outputs(model, inputs))
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            model,
            (),
            kwargs=dict(inputs),
            input_names=list(inputs),
            output_names=names,
            dynamic_shapes=_dynamic(inputs, "batch", "sequence"),
            dynamo=True,
            custom_translation_table=_missing_operators(),
            verbose=False,
        )
        assert program is not None
        for node in program.model.graph.all_nodes():
            # lines of the source files on this machine, once for each node: nobody else's business, and half the file
            # of a small model
            for key in [key for key in node.metadata_props if key != "namespace"]:
                del node.metadata_props[key]
        program.save(staging / ONNX_FILE)
    _write_companions(source, staging)
    session = Session.open(staging / ONNX_FILE)

    def run(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        values = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
        return dict(zip(session.outputs, map(torch.from_numpy, values), strict=True))

    return ONNX_FILE, run


def _missing_operators() -> dict[Any, Callable[..., Any]]:
    """Operators that ONNX has and the exporter does not know."""
    from onnxscript import INT32, ir
    from onnxscript import opset18 as op

    def product(left: Any, right: Any) -> Any:
        return op.MatMulInteger(left, right)

    def stable_sort(values: Any, *, dim: int = -1, descending: bool = False, **_stable: Any) -> Any:
        # TopK puts the lower index first among equals, as a stable sort does
        length: Any = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]))  # type: ignore[type-var]
        if values.dtype in (ir.DataType.UINT8, ir.DataType.BOOL):  # onnxruntime has no TopK of bytes
            values = op.Cast(values, to=INT32.dtype)
        return op.TopK(values, length, axis=dim, largest=int(descending))

    return {torch.ops.aten._int_mm.default: product, torch.ops.aten.sort.stable: stable_sort}


def _write_program(source: LoadedModel, staging: Path, _job: Job) -> tuple[str, Run]:
    inputs = trace_inputs(source.model, 2)
    with _quiet(), torch.no_grad():
        program = torch.export.export(
            source.model, (), dict(inputs), dynamic_shapes=_dynamic(inputs, Dim.AUTO, Dim.AUTO)
        )
        torch.export.save(program, staging / PROGRAM_FILE)
        reloaded = torch.export.load(staging / PROGRAM_FILE).module()
    _write_companions(source, staging)
    return PROGRAM_FILE, lambda batch: _outputs(reloaded, batch)


def _write_dense(source: LoadedModel, staging: Path, job: Job) -> tuple[str, Run]:
    dense = multiplied_out(source.model)
    save(dense, staging, source=source)
    verify(staging, dense, example_inputs(dense))
    before, after = file_bytes(source.directory), file_bytes(staging)
    job.warn(
        f"the dense checkpoint is no smaller than the original: {after / 1e6:.1f} MB, compressed it was "
        f"{before / 1e6:.1f} MB. It is for programs that cannot import vitshrink."
    )
    return examine(staging).weights[0].name, lambda batch: _outputs(dense, batch)


@torch.no_grad()
def multiplied_out(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model with plain linear layers in place of the compressed ones: the same function of its inputs."""
    dense = copy.deepcopy(model)
    for name, layer in compressed_layers(model).items():
        if isinstance(layer, QuantizedEmbedding):
            table = layer.dense_weight()
            dense.set_submodule(name, nn.Embedding(table.shape[0], table.shape[1], _weight=table), strict=True)
            continue
        if not isinstance(layer, LowRankLinear | QuantizedLinear):
            raise UsageError(f"{name} is a {type(layer).__name__}, which is no matrix: use --to onnx.")
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight.copy_(layer.dense_weight())
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)
        dense.set_submodule(name, linear, strict=True)
    del dense.config.quantization_config
    return dense.eval()


def trace_inputs(model: PreTrainedModel, batch_size: int) -> dict[str, Tensor]:
    """Random inputs, texts with padding: what is exported must not depend on its absence."""
    inputs = example_inputs(model, batch_size)
    if "input_ids" in inputs:
        tokens, generator = inputs["input_ids"], torch.Generator().manual_seed(batch_size)
        length = max(2, tokens.shape[1] // batch_size)  # another length for every batch size
        tokens = tokens[:, :length].clone()  # a view would leave its base in the guards of torch.export
        mask = torch.ones_like(tokens)
        mask[-1, length // 2 :] = 0
        types = torch.randint(model.config.type_vocab_size, tokens.shape, generator=generator)
        inputs = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types}
    return inputs


def _dynamic(inputs: Mapping[str, Tensor], batch: Any, sequence: Any) -> dict[str, dict[int, Any]]:
    """The dimensions that may differ from call to call, as the exporter wants them written."""
    return {name: {0: batch, 1: sequence} if "input_ids" in inputs else {0: batch} for name in inputs}


def _outputs(model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        found = model(**inputs)
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _compare(model: PreTrainedModel, run: Run) -> tuple[float, float]:
    """The largest difference over all outputs and sizes of batches, and the largest output."""
    difference = largest = 0.0
    for batch_size in BATCH_SIZES:
        inputs = trace_inputs(model, batch_size)
        expected, found = _outputs(model, inputs), run(inputs)
        if missing := expected.keys() - found.keys():
            raise OutputError(f"the exported model has no output {', '.join(sorted(missing))}.")
        for name, values in expected.items():
            largest = max(largest, float(values.abs().max()))
            difference = _worse(difference, float((found[name] - values).abs().max()))
    return difference, largest


def _rounding(model: PreTrainedModel) -> float:
    """The largest difference that the rounding of activations makes to an output."""
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    if not any(layer.spec.activations == "dynamic" for layer in layers):
        return 0.0
    exact = copy.deepcopy(model)
    for layer in exact.modules():
        if isinstance(layer, QuantizedLinear):
            layer.spec = replace(layer.spec, activations="none")
    return _compare(exact, lambda inputs: _outputs(model, inputs))[0]


def _worse(one: float, other: float) -> float:
    return other if other != other or other > one else one


def _write_companions(source: LoadedModel, staging: Path) -> None:
    """The configuration, as of a dense model, and the processor files."""
    config = {key: value for key, value in examine(source.directory).config.items() if key != "quantization_config"}
    (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    source.companions.copy_to(staging)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes of the exporters on their own progress; what they raise becomes an OutputError."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (VitshrinkError, MemoryError, OSError):
        raise
    except Exception as error:  # of any class there is, from several libraries
        first: BaseException = error
        while first.__cause__ is not None:  # the exporter wraps it in advice to those who develop the exporter
            first = first.__cause__
        reason = next(iter(str(first).strip().splitlines()), "")
        raise OutputError(
            f"the exporter of torch {torch.__version__} failed: {type(first).__name__}: {reason}"
        ) from error
    finally:
        logging.disable(disabled)
