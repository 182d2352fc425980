"""The forms in which a checkpoint runs without vitshrink: ONNX, OpenVINO, a dense checkpoint, a torch program."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from vitshrink.errors import UsageError
from vitshrink.jobs.result import write_result
from vitshrink.jobs.session import Session
from vitshrink.models import cost
from vitshrink.models.checkpoint import compressed_layers
from vitshrink.models.loading import LoadedModel
from vitshrink.models.onnx_model import OnnxFile, onnx_bytes, onnx_numbers
from vitshrink.models.openvino_model import IR_FILE, convert, ir_bytes, open_ir
from vitshrink.models.plain import plain_view
from vitshrink.models.source import CONFIG
from vitshrink.models.structures.coded import decode_all
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.structures.quantized import QuantizedEmbedding, QuantizedLinear
from vitshrink.models.structures.static import StaticConv2d, StaticLinear
from vitshrink.models.tracing import dynamic_dimensions, outputs_of, quiet, trace_inputs
from vitshrink.models.tracing import write_onnx as trace_onnx

Form = Literal["onnx", "openvino", "dense", "torch"]

ONNX_FILE = "model.onnx"
PROGRAM_FILE = "model.pt2"

Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Written:
    """A model in another form."""

    file: str
    """The file that holds the weights, within the directory."""
    run: Run
    """What it gives for a batch, as it was read back."""
    parameters: int
    """Numbers that are stored."""
    bytes: int


def write_onnx(session: Session, staging: Path, batch_size: int | None) -> Written:
    """One program of any batch size if none is given, and for texts of any length. Raises OutputError."""
    file = _traced(session.source, staging, batch_size)
    _write_companions(session.source, staging)
    return Written(ONNX_FILE, _running(OnnxFile.open(file)), onnx_numbers(file), onnx_bytes(file))


def write_openvino(session: Session, staging: Path, batch_size: int | None) -> Written:
    """The same as an OpenVINO IR, which computes in float32. Raises OutputError."""
    with TemporaryDirectory() as folder, quiet():
        traced = _traced(session.source, Path(folder), batch_size)
        numbers, file = onnx_numbers(traced), convert(traced, staging)
    _write_companions(session.source, staging)
    return Written(IR_FILE, _running(open_ir(file)), numbers, ir_bytes(file))


def _traced(source: LoadedModel, directory: Path, batch_size: int | None) -> Path:
    """Write an ONNX file without pivots into a directory."""
    model, inputs = plain_view(source.model), trace_inputs(source.model, batch_size or 2)
    dynamic = dynamic_dimensions(inputs, None if batch_size else "batch", "sequence")
    return trace_onnx(model, inputs, list(outputs_of(model, inputs)), directory / ONNX_FILE, dynamic)


def _running(opened: OnnxFile) -> Run:
    def run(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        values = opened.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
        return dict(zip(opened.outputs, map(torch.from_numpy, values), strict=True))

    return run


def write_program(session: Session, staging: Path, batch_size: int | None) -> Written:
    """What torch.export.load reads. Raises OutputError."""
    source = session.source
    model, inputs = plain_view(source.model), trace_inputs(source.model, batch_size or 2)
    dynamic = dynamic_dimensions(inputs, None if batch_size else Dim.AUTO, Dim.AUTO)
    with quiet(), torch.no_grad():
        program = torch.export.export(model, (), dict(inputs), dynamic_shapes=dynamic)
        torch.export.save(program, staging / PROGRAM_FILE)
        reloaded = torch.export.load(staging / PROGRAM_FILE).module()
    _write_companions(source, staging)
    size = (staging / PROGRAM_FILE).stat().st_size
    return Written(PROGRAM_FILE, lambda batch: outputs_of(reloaded, batch), cost.parameters(model), size)


def write_dense(session: Session, staging: Path, _batch_size: int | None) -> Written:
    """A checkpoint of the dense architecture. Raises UsageError for structures that are no matrices."""
    dense = multiplied_out(session.source.model)
    stored = write_result(dense, staging, session, in_place=False).source  # compared later, as it is
    before, after = session.source.source.nbytes, stored.nbytes
    session.job.warn(
        f"the dense checkpoint is not smaller than the original: it has {after / 1000000.0:.1f} MB, and the "
        f"compressed one has {before / 1000000.0:.1f} MB. It is for programs that cannot import vitshrink."
    )
    numbers = sum(tensor.numel for tensor in stored.tensors.values())
    file = stored.weights[0]
    return Written(file.name, lambda batch: outputs_of(dense, batch), numbers, file.stat().st_size)


FORMS: dict[str, Callable[[Session, Path, int | None], Written]] = {
    "onnx": write_onnx,
    "openvino": write_openvino,
    "dense": write_dense,
    "torch": write_program,
}


@torch.no_grad()
def multiplied_out(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model with plain linear layers in place of the compressed ones: the same function of its inputs."""
    dense = copy.deepcopy(model)
    decode_all(dense)
    for name, layer in compressed_layers(dense).items():
        if isinstance(layer, QuantizedEmbedding):
            table = layer.dense_weight()
            dense.set_submodule(name, nn.Embedding(table.shape[0], table.shape[1], _weight=table), strict=True)
            continue
        if isinstance(layer, StaticConv2d):
            dense.set_submodule(name, layer.dense(), strict=True)
            continue
        if not isinstance(layer, LowRankLinear | QuantizedLinear | StaticLinear):
            raise UsageError(f"{name} is a {type(layer).__name__}, which cannot become a matrix: use --to onnx.")
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight.copy_(layer.dense_weight())
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)
        dense.set_submodule(name, linear, strict=True)
    del dense.config.quantization_config
    dense.eval()
    return dense


def _write_companions(source: LoadedModel, staging: Path) -> None:
    """The configuration, as of a dense model, and the processor files."""
    config = {key: value for key, value in source.source.config.items() if key != "quantization_config"}
    (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    source.companions.copy_to(staging)
